"""Imports point down: kernels <- q4jax <- experiments <- colab, launch; tests may import all."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TOP = {".ci", "colab", "docs", "experiments", "kernels", "launch", "q4jax", "tests"}
ABOVE = {"experiments", "launch", "colab", "tests"}
QAT = "q4jax.qat"
DOORS = {"q4jax.loading", "q4jax.cli", "q4jax.serve"}
# What the files of a folder may not import: these modules, or anything inside them.
FORBIDDEN = {
  "kernels": {"flax", "q4jax", *ABOVE},
  "q4jax": {"gguf", *ABOVE},  # our own reader takes hostile files; gguf-py writes ours
  "q4jax/errors.py": {"q4jax", "q4jax_kernels"},
  "q4jax/records.py": {"q4jax.formats", "q4jax.quant", "q4jax.model", "q4jax.engine", *DOORS},
  "q4jax/formats": {"q4jax.model", "q4jax.engine", "q4jax.kv", QAT, *DOORS},
  "q4jax/text": {"q4jax.model", "q4jax.engine", "q4jax.kv", QAT, *DOORS},
  "q4jax/model": {"q4jax.formats", "q4jax.engine", QAT, *DOORS},
  "q4jax/kv": {"q4jax.formats", "q4jax.quant", "q4jax.text", "q4jax.engine", QAT, *DOORS},
  "q4jax/quant": {"q4jax.model", "q4jax.engine", QAT, *DOORS},
  "q4jax/engine": {"q4jax.formats", QAT, *DOORS},
  "q4jax/offline": {"q4jax.engine", QAT, *DOORS},
  "q4jax/loading.py": {QAT},
  "q4jax/compare.py": {QAT},
  "q4jax/qat": {"q4jax.engine", "q4jax.kv", *DOORS},
}
EXCEPT = {"q4jax/formats/gguf_sink.py": {"gguf"}, "q4jax/formats/imatrix.py": {"gguf"}}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = {canonicalize_name(Requirement(r).name) for r in PROJECT["dependencies"]}
DISTRIBUTIONS = packages_distributions()


def imports(tree: ast.AST, package: str = "", into_functions: bool = True) -> Iterator[str]:
  """Each imported name in full, `from a import b` as `a.b`; relative ones resolved in `package`."""
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
      base = ".".join([*parents, *([node.module] if node.module else [])])
      yield from (f"{base}.{alias.name}" for alias in node.names)
    elif into_functions or not isinstance(
      node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    ):
      yield from imports(node, package, into_functions)


def violations(file: str, source: str) -> list[str]:
  """What the source of `file`, a path from the root, imports and may not."""
  tree = ast.parse(source, file)
  package = ".".join(Path(file.removeprefix("kernels/")).parent.parts)
  rules = [
    names - EXCEPT.get(file, set())
    for folder, names in FORBIDDEN.items()
    if f"{file}/".startswith(f"{folder}/")
  ]
  down = [
    f"{file} imports {name}, which stands above it"
    for name in imports(tree, package)
    if any(f"{name}.".startswith(f"{module}.") for names in rules for module in names)
  ]
  optional = [
    f"{file} imports {name} outside a function, and no dependency brings it"
    for name in imports(tree, package, into_functions=False)
    if not always_there(name.split(".")[0])
  ]
  return down + optional


def always_there(package: str) -> bool:
  """Whether a plain `pip install q4jax` brings the package; others come with an extra."""
  brought_by = {canonicalize_name(name) for name in DISTRIBUTIONS.get(package, [])}
  ours = package in ("q4jax", "q4jax_kernels")
  return ours or package in sys.stdlib_module_names or bool(brought_by & REQUIRED)


def test_imports_point_down() -> None:
  files = [*ROOT.glob("kernels/q4jax_kernels/**/*.py"), *ROOT.glob("q4jax/**/*.py")]
  assert files
  paths = [(str(file.relative_to(ROOT)), file.read_text()) for file in files]
  assert not [found for path, source in paths for found in violations(path, source)]


@pytest.mark.parametrize(
  ("file", "source"),
  [
    ("kernels/q4jax_kernels/dispatch.py", "import q4jax.errors"),
    ("kernels/q4jax_kernels/dispatch.py", "from q4jax import errors"),
    ("kernels/q4jax_kernels/dispatch.py", "def f():\n  import q4jax"),
    ("q4jax/loading.py", "from experiments.train import run"),
    ("q4jax/loading.py", "try:\n  import torch\nexcept ImportError:\n  pass"),
    ("q4jax/loading.py", "import scipy.linalg"),
    ("q4jax/loading.py", "def f():\n  import gguf"),
    ("q4jax/formats/gguf_checkpoint.py", "def f():\n  import gguf"),
    ("q4jax/formats/gguf_sink.py", "def f():\n  import experiments"),
    ("q4jax/model/llama.py", "from ..formats import gguf"),
    ("q4jax/model/llama.py", "from q4jax.formats.gguf import GGUFFile"),
    ("q4jax/formats/gguf.py", "from q4jax import model"),
    ("q4jax/errors.py", "import q4jax.config"),
    ("q4jax/kv/cache.py", "from q4jax.engine import Engine"),
    ("q4jax/kv/quality.py", "from q4jax.text.tokenizer import Tokenizer"),
    ("q4jax/kv/quality.py", "def f():\n  from q4jax import loading"),
    ("q4jax/offline/quantize.py", "from q4jax.qat import export"),
    ("q4jax/qat/trainer.py", "import optax"),
    ("q4jax/qat/trainer.py", "from q4jax.loading import load"),
  ],
)
def test_finds(file: str, source: str) -> None:
  assert violations(file, source)


@pytest.mark.parametrize(
  ("file", "source"),
  [
    ("kernels/q4jax_kernels/dispatch.py", "import jax\nimport os\nfrom q4jax_kernels import ffi"),
    ("q4jax/loading.py", "from q4jax.formats import gguf\nfrom q4jax.model import llama"),
    ("q4jax/loading.py", "def f():\n  import torch"),
    ("q4jax/formats/gguf_sink.py", "def f():\n  import gguf"),
    ("q4jax/model/llama.py", "from .layers import Attention"),
    ("q4jax/kv/cache.py", "from q4jax.model.caches import Compressed\nimport q4jax_kernels"),
  ],
)
def test_allows(file: str, source: str) -> None:
  assert not violations(file, source)


def test_top_level_folders() -> None:
  if not (ROOT / ".git").exists():
    pytest.skip("not a git checkout: which files belong to the project is unknown")
  listing = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout
  folders = {path.split("/")[0] for path in listing.splitlines() if "/" in path}
  assert folders <= TOP, f"new top-level folders: {folders - TOP}"
