"""English text that every Python installation carries, as whole documents with a held-out split.

One document is one module read from top to bottom: its docstrings under the signatures that they
describe, and blocks of comments where they stand; or one topic of the language reference
(`pydoc_data.topics`), or one package's long description. Source files are parsed, never imported
(the interpreter's own C modules have no source, so theirs are read from the running interpreter).

What is kept is prose: text that is not English, tables of digits, licence headers, and anything
most of whose lines have been seen before are dropped. Documents are split by the hash of their
name; of a held-out document everything that shares lines with the training text is dropped too.
"""

import ast
import hashlib
import importlib
import importlib.metadata
import inspect
import io
import re
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What q4jax and its extras install, directly or not, under BSD, Apache, MIT or PSF licences. Of two
# nearly equal texts the first read stays.
PACKAGES = (
  *("numpy", "scipy", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "absl-py", "etils"),
  *("treescope", "opt_einsum", "ml_dtypes", "tensorstore", "protobuf", "tokenizers", "msgpack"),
  *("huggingface_hub", "jinja2", "rich", "jaxtyping", "fsspec", "filelock", "packaging", "click"),
  *("httpx2", "httpcore2", "anyio", "h11", "Pygments", "markdown-it-py", "simplejson", "humanize"),
  *(
    "aiofiles",
    "typing_extensions",
    "wadler_lindig",
    "prometheus_client",
    "psutil",
    "zipp",
    "idna",
  ),
  *("PyYAML", "requests", "urllib3", "setuptools", "pip", "wheel", "pandas", "matplotlib", "grain"),
  *("fastapi", "starlette", "uvicorn", "pydantic", "ray", "aiohttp", "attrs", "jsonschema"),
  *("Pillow", "fonttools", "contourpy", "python-dateutil", "pyparsing", "cloudpickle"),
)
SKIPPED_FOLDERS = frozenset(
  (
    *("test", "tests", "testing", "_vendor", "vendor", "thirdparty_files"),
    *("idlelib", "lib2to3", "site-packages", "pydoc_data"),
    "dialects",  # MLIR's, written by a generator: thousands of the same few sentences
  )
)
HELD_OUT_PERCENT, VALIDATION_PERCENT = 5, 2
MIN_DOCUMENT = 400  # Characters; shorter documents are shims and constants.
_LICENCE = re.compile(
  r"copyright|licensed under|all rights reserved|spdx-|permission is hereby|redistribution and use",
  re.IGNORECASE,
)


@dataclass(frozen=True)
class Document:
  """Pieces of one module or topic in order. A piece is a heading (or "") and a text."""

  name: str
  source: str
  pieces: tuple[tuple[str, str], ...]

  @property
  def text(self) -> str:
    return "\n\n".join(f"{h}\n{t}" if h else t for h, t in self.pieces)

  @property
  def split(self) -> str:
    """ "train", "validation" (to choose a checkpoint by) or "held_out" (to report on)."""
    percent = int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 100
    if percent < HELD_OUT_PERCENT:
      return "held_out"
    return "validation" if percent < HELD_OUT_PERCENT + VALIDATION_PERCENT else "train"


# Reading.


def documents() -> Iterator[Document]:
  """Every document before filtering, in an order that depends only on what is installed."""
  yield from _topics()
  for name in sorted(sys.builtin_module_names):
    yield _interpreter_module(name)
  yield from _standard_library()
  for package in PACKAGES:
    yield from _distribution(package)


def _topics() -> Iterator[Document]:
  from pydoc_data.topics import topics

  # The longest first: short topics are cut out of them and fall to the filter of seen lines.
  for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
    yield Document(f"topic {name}", "python reference", (("", text),))


def _interpreter_module(name: str) -> Document:
  module = importlib.import_module(name)
  pieces = [(f"# {name}", inspect.getdoc(module) or "")]
  for key, value in sorted(vars(module).items()):
    if not callable(value) or key.startswith("__"):
      continue
    pieces.append((_runtime_heading(key, value), inspect.getdoc(value) or ""))
    if isinstance(value, type):
      for method, attribute in sorted(vars(value).items()):
        if not method.startswith("__") and (text := inspect.getdoc(attribute)):
          pieces.append((_runtime_heading(f"{key}.{method}", attribute), text))
  return Document(name, "python", tuple(pieces))


def _runtime_heading(name: str, value: object) -> str:
  try:
    return name + str(inspect.signature(value))  # type: ignore[arg-type]
  except (TypeError, ValueError):  # Not callable, or C code that does not tell.
    return name


def _distribution(package: str) -> Iterator[Document]:
  """A package's long description, then its modules; nothing where it is not installed."""
  try:
    found = importlib.metadata.distribution(package)
  except importlib.metadata.PackageNotFoundError:
    return
  description = found.metadata.json.get("description")
  if isinstance(description, str) and description:
    yield Document(f"description of {package}", package, (("", description),))
  for file in sorted(found.files or ()):
    if file.suffix == ".py" and ".." not in file.parts and "__editable__" not in file.name:
      yield from _module(Path(str(found.locate_file(file))), file.parts, package)


def _standard_library() -> Iterator[Document]:
  root = Path(sysconfig.get_path("stdlib"))
  for path in sorted(root.rglob("*.py")):
    yield from _module(path, path.relative_to(root).parts, "python")


def _module(path: Path, parts: tuple[str, ...], source: str) -> Iterator[Document]:
  """The document of one source file; none for tests, copies of other packages and templates."""
  stem = path.stem
  if SKIPPED_FOLDERS.intersection(parts) or stem.startswith("test_") or stem.endswith("_test"):
    return
  name = ".".join([*parts[:-1], stem]).removesuffix(".__init__")
  try:
    code = path.read_text(encoding="utf-8")
    tree = ast.parse(code)
  except (SyntaxError, UnicodeDecodeError):  # Templates and files for other versions of Python.
    return
  found = [*_docstrings(tree, name), *_comments(code)]
  found.sort(key=lambda item: item[0])
  yield Document(name, source, tuple((heading, text) for _, heading, text in found))


def _docstrings(tree: ast.Module, name: str) -> Iterator[tuple[int, str, str]]:
  """(line, heading, text) of the docstrings of a module, and of strings handed to `add_newdoc`."""

  def visit(node: ast.AST, owner: str) -> Iterator[tuple[int, str, str]]:
    for child in ast.iter_child_nodes(node):
      inner = owner
      if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(child):
          yield child.lineno, owner + _signature(child), text
        inner = f"{owner}{child.name}."
      elif isinstance(child, ast.Call) and "doc" in ast.unparse(child.func):
        texts = [a.value for a in _flat(child.args) if isinstance(a, ast.Constant)]
        *names, text = [t for t in texts if isinstance(t, str)] or [""]
        if len(text) > 80:
          yield child.lineno, ".".join(names), inspect.cleandoc(text)
      yield from visit(child, inner)

  yield 0, f"# {name}", ast.get_docstring(tree) or ""
  yield from visit(tree, "")


def _flat(args: list[ast.expr]) -> Iterator[ast.expr]:
  for arg in args:
    if isinstance(arg, ast.Tuple):
      yield from arg.elts
    else:
      yield arg


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
  if isinstance(node, ast.ClassDef):
    inside = ", ".join(ast.unparse(base) for base in node.bases)
    return f"class {node.name}({inside})" if inside else f"class {node.name}"
  full = f"{node.name}({ast.unparse(node.args)})"
  if node.returns is not None:
    full += f" -> {ast.unparse(node.returns)}"
  if len(full) <= 200:
    return full
  return f"{node.name}({', '.join(a.arg for a in node.args.args)})"


def _comments(code: str) -> Iterator[tuple[int, str, str]]:
  """Blocks of at least two lines that hold nothing but a comment."""
  block: list[str] = []
  start = 0
  for token in tokenize.generate_tokens(io.StringIO(code).readline):
    if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
      if block and token.start[0] != start + len(block):
        yield from _comment_block(start, block)
        block = []
      if not block:
        start = token.start[0]
      block.append(re.sub(r"^#+[:!|]? ?", "", token.string))
  yield from _comment_block(start, block)


def _comment_block(start: int, block: list[str]) -> Iterator[tuple[int, str, str]]:
  if len(block) >= 2:
    yield start, "", textwrap.dedent("\n".join(block))


# Cleaning.


def clean(text: str) -> str:
  """Unix lines without tabs, trailing blanks, rows of digits or runs of empty lines."""
  text = text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(4)
  text = re.sub(r"[ \t\f\v]+$", "", text, flags=re.MULTILINE)
  lines = [line for line in text.split("\n") if not _is_numbers(line)]
  return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _is_numbers(line: str) -> bool:
  dense = re.sub(r"\s", "", line)
  return (
    len(dense) > 30
    and sum(c.isalpha() for c in dense) < 0.2 * len(dense)
    and any(c.isdigit() for c in dense)
  )


def is_prose(text: str) -> bool:
  """English rather than a table, a data blob, a licence or another language."""
  dense = re.sub(r"\s", "", text)
  if len(dense) < 20 or _LICENCE.search(text):
    return False
  ascii_share = sum(c.isascii() for c in dense) / len(dense)
  letters = sum(c.isalpha() for c in dense) / len(dense)
  words = re.findall(r"[a-z]+", text.lower())
  # Function words make up a third of English and hardly any of code or data.
  common = sum(w in _FUNCTION_WORDS for w in words)
  longest = max(len(w) for w in text.split())
  return ascii_share > 0.95 and letters > 0.6 and common >= 0.08 * len(words) and longest < 200


_FUNCTION_WORDS = frozenset(
  re.findall(
    r"\w+",
    """
    the of a an to in is and for be that with as by on or if are this it from not can at which will
    has must have when was should only all may but use used any its into than return returns
    """,
  )
)


class SeenLines:
  """Remembers lines, to tell how much of a text is not new."""

  def __init__(self) -> None:
    self._seen: set[int] = set()

  @staticmethod
  def _keys(text: str) -> list[int]:
    lines = (re.sub(r"[\W\d_]+", " ", line).strip().lower() for line in text.split("\n"))
    return [hash_text(line) for line in lines if len(line) >= 20]

  def share(self, text: str) -> float:
    """The share of the text's lines of 20 letters or more that were seen; 0 if it has none."""
    keys = self._keys(text)
    return sum(k in self._seen for k in keys) / len(keys) if keys else 0.0

  def add(self, text: str) -> None:
    self._seen.update(self._keys(text))


def hash_text(text: str) -> int:
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def filtered(raw: list[Document]) -> dict[str, list[Document]]:
  """Clean documents without repetitions, by split."""
  seen, texts = SeenLines(), set[int]()

  def keep(document: Document, limit: float) -> Document:
    pieces = []
    for heading, text in document.pieces:
      text = clean(text)
      # Short docstrings have no long lines: an equal one must not come twice either.
      if not is_prose(text) or hash_text(text) in texts or seen.share(text) > limit:
        continue
      texts.add(hash_text(text))
      seen.add(text)
      pieces.append((heading, text))
    return Document(document.name, document.source, tuple(pieces))

  # Training text first: what the other splits share with it is then cut from them.
  limits = {"train": 0.5, "validation": 0.1, "held_out": 0.1}
  kept = {split: [keep(d, s) for d in raw if d.split == split] for split, s in limits.items()}
  return {split: [d for d in part if len(d.text) >= MIN_DOCUMENT] for split, part in kept.items()}


def sizes(part: list[Document]) -> dict[str, int]:
  """Bytes of UTF-8 by source."""
  result: dict[str, int] = {}
  for d in part:
    result[d.source] = result.get(d.source, 0) + len(d.text.encode())
  return result


def provenance() -> dict[str, dict[str, str]]:
  """Version and licence of everything that the corpus is read from."""
  result = {"python": {"version": sys.version.split()[0], "licence": "PSF-2.0"}}
  for package in PACKAGES:
    try:
      m = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
      continue
    classifiers = (c for c in m.get_all("Classifier", ()) if c.startswith("License"))
    named = m.get_all("License-Expression") or [*classifiers] or m.get_all("License", ["unknown"])
    licence = str(named[0]).split("\n")[0].split(" :: ")[-1]
    result[package] = {"version": m["Version"], "licence": licence}
  return result
