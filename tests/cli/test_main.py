"""Commands are found, helped and refused; every documented exit code is met."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from q4jax import __version__
from q4jax.cli.main import COMMANDS

from .conftest import ROOT, Run, finished, start


def test_help_lists_the_commands(q4jax: Run) -> None:
  result = q4jax("--help")
  assert result.code == 0 and result.err == ""
  assert all(f"  {name} " in result.out for name in COMMANDS)


def test_nothing_typed_is_a_usage_error_that_shows_the_help(q4jax: Run) -> None:
  result = q4jax()
  assert result.code == 2 and result.out == "" and "commands:" in result.err


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_teaches_itself(q4jax: Run, name: str) -> None:
  result = q4jax(name, "--help")
  assert result.code == 0 and result.err == ""
  assert result.out.count(f"q4jax {name}") >= 3  # The usage and two examples or more.
  module = importlib.import_module(f"q4jax.cli.{name}")
  for flag in module.FLAGS:
    assert f"--{flag}" in result.out or f"--[no]{flag}" in result.out
    assert module.FLAGS[flag].help


def test_help_does_without_jax() -> None:
  code = (
    "import sys; from q4jax.cli.main import COMMANDS, main\n"
    "for name in COMMANDS: main([name, '--help'])\n"
    "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    capture_output=True,
    env={"PYTHONPATH": "."},
    check=False,
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  ("line", "said"),
  [
    ("generat x", "Did you mean generate?"),
    ("tok x", "Did you mean tokenize?"),
    ("zzz", "The commands are info, tokenize"),
    ("--json info x", "before flags"),
    ("generate x --promt=a", "Did you mean --prompt?"),
    ("generate x --prompt=a --undefok=promt --promt=a", "no flag --undefok"),
    ("generate x y --prompt=a", "takes no argument 'y'"),
    ("generate --prompt=a", "needs MODEL"),
    ("generate x --prompt", "Missing value for flag --prompt"),
    ("generate x --prompt=a --max_tokens=many", "max_tokens"),
    ("generate x --prompt=a --max_tokens=0", "max_tokens"),
    ("generate x --prompt=a --temperature=-1", "temperature"),
    ("generate x --prompt=a --kv_dtype=int3", "kv_dtype"),
    ("generate x --prompt=a --threads=0", "threads"),
    ("generate x --prompt=a --logprobs=2", "--json"),
    ("generate x", "--prompt"),
    ("generate x --prompt=a --file=b", "not both"),
    ("tokenize x", "--text"),
    ("tokenize x --text=a --ids=1", "one of"),
    ("tokenize x --ids=1,b", "'b'"),
    ("perplexity x", "--file"),
    ("bench x --pp=ten", "--pp=ten"),
    ("bench x --pp=0 --tg=0", "nothing to measure"),
    ("info x --json=perhaps", "json"),
    ("demo x", "takes no argument 'x'"),
  ],
)
def test_usage_errors(q4jax: Run, line: str, said: str) -> None:
  result = q4jax(*line.split())
  assert result.code == 2 and result.out == ""
  assert result.err.startswith("q4jax: usage: ") and result.err.count("\n") == 1
  assert said in result.err


def commands_on(path: object) -> list[list[object]]:
  return [
    ["info", path],
    ["tokenize", path, "--text=a"],
    ["generate", path, "--prompt=a"],
    ["perplexity", path, f"--file={__file__}"],
    ["bench", path],
  ]


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty"])
def test_files_that_are_no_models(q4jax: Run, tmp_path: Path, index: int, kind: str) -> None:
  path = tmp_path / "model\nname.gguf"  # Errors stay on one line whatever the name.
  if kind == "folder":
    path.mkdir()
  elif kind != "missing":
    path.write_text("" if kind == "empty" else "This is a text, and no GGUF file at all.\n" * 9)
  result = q4jax(*commands_on(path)[index])
  assert result.code == 1 and result.out == ""
  assert result.err.startswith("q4jax: error: ") and result.err.count("\n") == 1
  assert "name.gguf" in result.err


@pytest.mark.parametrize("command", ["generate", "perplexity", "tokenize"])
def test_text_files_that_cannot_be_read(
  q4jax: Run, model_file: Path, tmp_path: Path, command: str
) -> None:
  binary = tmp_path / "binary"
  binary.write_bytes(b"abc\xff")
  for path, said in ((tmp_path / "none", "No such file"), (binary, "byte 3")):
    result = q4jax(command, model_file, f"--file={path}")
    assert result.code == 1 and result.out == "" and said in result.err


def test_flags_stand_anywhere_and_in_both_forms(q4jax: Run, vocabulary_file: Path) -> None:
  a = q4jax("tokenize", vocabulary_file, "--text=ab c", "--json")
  b = q4jax("tokenize", "--json", "--text", "ab c", vocabulary_file)
  assert a.code == b.code == 0 and a.out == b.out
  # The next command line starts from the defaults again.
  assert not q4jax("tokenize", vocabulary_file, "--text=a").out.startswith("{")


def test_a_real_process() -> None:
  done = finished(start("--version"))
  assert (done.code, done.out, done.err) == (0, f"q4jax {__version__}\n", "")


def test_a_reader_that_leaves_is_no_error(vocabulary_file: Path) -> None:
  child = start("tokenize", vocabulary_file, f"--text={'many tokens ' * 5000}")
  assert child.stdout and child.stderr
  child.stdout.readline()
  child.stdout.close()
  assert child.stderr.read() == ""
  assert child.wait(60) == 141


def test_a_terminal_without_utf8(vocabulary_file: Path) -> None:
  env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
  text = f"--text={'é'}"
  done = finished(start("tokenize", vocabulary_file, text, "--json", env=env))
  assert done.code == 0 and json.loads(done.out)["text"] == "é"
  done = finished(start("tokenize", vocabulary_file, "--ids=198,172", env=env))
  assert done.code == 0 and done.out == "?\n"


def test_ctrl_c_leaves_without_taking_the_interpreter_down() -> None:
  """XLA may be computing, and has crashed when it was: what runs at exit would show here."""
  script = (
    "import atexit, os; from q4jax.cli import main as m; atexit.register(os._exit, 9); "
    "m.main = lambda: print('told') or {}; m.process()"
  )
  for code, seen in ((130, 130), (1, 9)):
    done = subprocess.run(
      [sys.executable, "-c", script.format(code)],
      cwd=ROOT, env={"PYTHONPATH": ".:kernels"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == seen, done.stderr
    assert code != 130 or done.stdout == "told\n"
