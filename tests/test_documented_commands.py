"""Every command and every Python block of the documentation runs, on `tiny` and little text.

A command that is new needs a line in `documented_rules.SMALL`, or in `NOT_RUN` with the reason; its
flags are read by the command's own parser either way.
"""

import contextlib
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import absl.app
import pytest
from absl import flags

import documented
import q4jax
from documented import ROOT, Command
from documented_rules import CHANGED, ERRORS, FLOAT, GIVEN, NOT_RUN, SLOW, SMALL, TEXTS, WRITTEN
from launch import trials
from q4jax.cli import main as cli
from q4jax.cli import parsing
from q4jax.formats.gguf import GGUFFile
from q4jax.kv import policy
from q4jax_kernels import ffi

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
COMMANDS = documented.in_blocks()
SHOWN = [*COMMANDS, *(command for all in documented.in_docstrings() for command in all)]
# Each command line once, and of a script the first that it shows.
RUN = {c.line: c for c in [*(all[0] for all in documented.in_docstrings()), *COMMANDS]}.values()
by_command = pytest.mark.parametrize("command", SHOWN, ids=str)


def reason(command: Command) -> str | None:
  return next(
    (why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command.line)), None
  )


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("calibrated") / "calibration"
  text = str(ROOT / "q4jax/data/held_out.txt")
  small = ["--ctx=32", "--sequences=2"]
  assert cli.main(["calibrate", str(ROOT / FLOAT), str(folder), f"--text={text}", *small]) == 0
  return folder


@pytest.fixture
def folder(tmp_path: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """Where commands run: paths of the repository and stand-ins for a reader's own files."""
  for name in ("docs", "experiments", "launch", "q4jax"):
    (tmp_path / name).symlink_to(ROOT / name)
  (tmp_path / "calibration").symlink_to(calibration)
  for name in ("llama.f16.gguf", "model.f16.gguf"):
    (tmp_path / name).symlink_to(ROOT / FLOAT)
  for name in ("model.gguf", "llama-3.2-1b.Q4_K_M.gguf"):
    (tmp_path / name).symlink_to(ROOT / "q4jax/data/tiny.Q4_K_M.gguf")
  text = (ROOT / "q4jax/data/held_out.txt").read_text()
  (tmp_path / "small.txt").write_text(text[:2000])
  (tmp_path / "long.txt").write_text(text[:6000])
  (tmp_path / "runs").mkdir()
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("sys.stdin", io.StringIO("A class is\n"))
  return tmp_path


def small(command: Command) -> list[str]:
  """The arguments with stand-ins for files, and with the flags that make it short."""
  arguments = []
  positions = iter(_positional(command))
  for word in command.arguments:
    name, _, value = word.removeprefix("--").partition("=")
    if not word.startswith("--"):
      word = _stand_in(next(positions, ""), word)
    elif name in TEXTS:
      word = f"--{name}={'long' if name == 'held_out' else 'small'}.txt"
    elif name in WRITTEN:
      word = f"--{name}=runs/{Path(value).name}"
    elif name == "calibration":
      word = "--calibration=calibration"
    elif name.endswith("model") and not Path(value).exists() and value != "tiny":
      is_float = "float" in name or re.search(r"\bf(16|32)\b", value)
      word = f"--{name}={FLOAT if is_float else 'tiny'}"
    arguments.append(word)
  return arguments + SMALL[command.name].split()


def _positional(command: Command) -> tuple[str, ...]:
  if command.words[0] != "q4jax":
    return ()
  return importlib.import_module(f"q4jax.cli.{command.words[1]}").ARGUMENTS


def _stand_in(kind: str, word: str) -> str:
  if kind == "OUT":
    return "runs/out.gguf" if word == "OUT" else f"runs/{Path(word).name}"
  if not kind or word == "tiny" or Path(word).exists():
    return word
  return FLOAT if kind in ("SOURCE", "REFERENCE") else "tiny"


@contextlib.contextmanager
def script(command: Command, arguments: list[str]) -> Iterator[Callable[[list[str]], Any]]:
  """The main function of `python -m MODULE` or `python FILE`, its flags read by absl."""
  mains: list[Any] = []
  values, argv = flags.FLAGS, [command.words[-1], *arguments]
  # Flags of scripts that other tests have imported: two may share a name.
  before = {name: values[name] for name in values}
  own = {n: f for n, f in before.items() if "absl" not in str(values.find_module_defining_flag(n))}
  for name in own:
    delattr(values, name)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(absl.app, "run", lambda main, *_: mains.append(main))
    patch.setattr(sys, "argv", argv)
    try:
      if command.words[1] == "-m":
        patch.setattr(sys, "argv", [command.words[2].split(".")[-1], *arguments])
        runpy.run_module(command.words[2], run_name="__main__")
      else:
        runpy.run_path(command.words[1], run_name="__main__")
        mains.append(lambda _: None)
      rest = values(argv)
      yield lambda _: mains[0](rest)
    finally:
      values.unparse_flags()
      for name in set(values) - set(before) | set(own):
        if name in values:
          delattr(values, name)
      for name, flag in own.items():
        values[name] = flag
      values.mark_as_parsed()


@by_command
def test_its_flags_exist(command: Command, folder: Path) -> None:
  """A flag that is gone, a value that cannot be, and a command that nobody knows, fail here."""
  assert command.name in SMALL or reason(command), f"{command} is new: give it a line in SMALL"
  if command.line in ERRORS or command.name.startswith("python -m oracles"):
    return
  if command.words[0] == "make":
    recipe = _recipe(command.words[1]).replace("\\\n", " ").splitlines()
    for arguments in (shlex.split(step)[1:] for step in recipe if "/bin/q4jax " in step):
      module = importlib.import_module(f"q4jax.cli.{arguments[0]}")
      parsing.parse(arguments[0], module, arguments[1:])
  elif command.words[0] == "q4jax":
    arguments = [word for word in command.arguments if word != "..."]
    module = importlib.import_module(f"q4jax.cli.{command.words[1]}")
    parsing.parse(command.words[1], module, arguments)
  elif command.words[1] == "-m":
    with script(command, command.arguments):
      pass


def _recipe(target: str) -> str:
  """What `make TARGET` would do; fails where there is no such target."""
  dry = ["make", "--dry-run", "--always-make", "--directory", str(ROOT), target]
  return subprocess.run(dry, capture_output=True, text=True, check=True).stdout


def _marks(text: str) -> list[pytest.MarkDecorator]:
  return [pytest.mark.slow] if SLOW.fullmatch(text) else []


@pytest.mark.parametrize("command", [pytest.param(c, id=str(c), marks=_marks(c.line)) for c in RUN])
def test_it_runs(command: Command, folder: Path) -> None:
  if why := reason(command):
    pytest.skip(why)
  native = ("bench_int4_matmul", "bench_kv_attention", "profile_decode")
  if command.name.endswith(native) and not ffi.available():
    pytest.skip("needs the native library")
  arguments = command.arguments if command.line in ERRORS else small(command)
  if command.words[0] == "q4jax":
    assert cli.main([command.words[1], *arguments]) == ERRORS.get(command.line, 0)
    return
  with script(command, arguments) as main:
    assert not main(arguments)


PYTHON = [
  (page, text)
  for page in documented.PAGES
  for language, text in documented.blocks(page)
  if language == "python"
]


@pytest.mark.parametrize(
  ("page", "text"), PYTHON, ids=[str(page.relative_to(ROOT)) for page, _ in PYTHON]
)
def test_python_runs(page: Path, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  name = str(page.relative_to(ROOT))
  for long, short in CHANGED.get(name, {}).items():
    assert long in text
    text = text.replace(long, short)
  monkeypatch.setattr(policy._POLICIES, "_classes", dict(policy._POLICIES._classes))
  module = types.ModuleType("__documented__")
  given: dict[str, Callable[[], Any]] = {
    "q4jax": lambda: q4jax,
    "model": lambda: q4jax.load("tiny"),
    "prompt": lambda: Path("small.txt").read_text(),
    "metadata": lambda: {
      **GGUFFile.open("model.gguf").metadata,
      "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    },
  }
  vars(module).update({word: given[word]() for word in GIVEN.get(name, ())})
  monkeypatch.setitem(sys.modules, module.__name__, module)
  exec(compile(text, name, "exec"), vars(module))


def test_descriptions_of_sweeps_are_sound(tmp_path: Path) -> None:
  sweeps = [
    b for p in documented.PAGES for language, b in documented.blocks(p) if language == "toml"
  ]
  assert sweeps
  for i, text in enumerate(sweeps):
    path = tmp_path / f"{i}.toml"
    path.write_text(text)
    assert trials.load(path).trials
