"""The commands and the Python that README.md, docs/ and the experiments' docstrings show."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
  ROOT / "README.md",
  *sorted(ROOT.glob("*/README.md")),
  *sorted(ROOT.glob("experiments/*/README.md")),
  *sorted(path for path in (ROOT / "docs").rglob("*.md") if "adr" not in path.parts),
]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
_COMMAND = re.compile(r"([A-Z_]+=\S+ +)*(q4jax |python (-m |\S+\.py)|make )")


@dataclass(frozen=True)
class Command:
  """One command line: where it is shown, and its words without variables, comments and pipes."""

  page: str
  words: tuple[str, ...]

  @property
  def name(self) -> str:
    """`q4jax info`, `python -m experiments.sinks`, `make demo`: what rules go by."""
    return " ".join(self.words[: 3 if self.words[:2] == ("python", "-m") else 2])

  @property
  def line(self) -> str:
    return " ".join(self.words)

  @property
  def arguments(self) -> list[str]:
    return list(self.words[len(self.name.split()) :])

  def __str__(self) -> str:
    return f"{self.page}: {shlex.join(self.words)}"


def blocks(page: Path) -> Iterator[tuple[str, str]]:
  """Language ("" if none) and text of each fenced block."""
  yield from _BLOCK.findall(page.read_text())


def in_blocks() -> list[Command]:
  """Each command of a block without a language, once. Where lines begin with "$ ", others are
  output.
  """
  found: dict[str, Command] = {}
  for page in PAGES:
    for language, text in blocks(page):
      lines = [] if language else text.replace("\\\n", " ").splitlines()
      if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
      for command in _commands(str(page.relative_to(ROOT)), lines):
        found[str(command)] = command
  return list(found.values())


def in_docstrings() -> list[list[Command]]:
  """The commands of each script in experiments/, which its docstring shows indented."""
  found = []
  for path in sorted((ROOT / "experiments").glob("*.py")):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    lines = [line[2:] for line in re.sub(r"\\\n *", "", text).splitlines() if line[:2] == "  "]
    commands = list(_commands(f"experiments/{path.name}", lines))
    if commands:
      found.append(commands)
  return found


def _commands(page: str, lines: list[str]) -> Iterator[Command]:
  for line in lines:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>")
    lexer.whitespace_split = True
    if " | q4jax " not in line and not _COMMAND.match(line):
      continue
    words = list(lexer)
    while words[0] not in ("q4jax", "python", "make"):  # variables, or what is piped in
      words = words[1:]
    end = next((i for i, word in enumerate(words) if word[0] in "|>"), len(words))
    yield Command(page, tuple(words[:end]))
