"""`q4jax COMMAND ...`: finds the command, reads its flags, and turns errors into exit codes.

Exit codes: 0 done; 1 an error that the message explains; 2 a command line that makes no sense; 130
stopped by Ctrl-C; 141 whoever read the output went away.
"""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from q4jax import __version__
from q4jax.errors import Q4JaxError

# Each is a module q4jax.cli.NAME with a docstring (its help), ARGUMENTS (names of its positional
# arguments), FLAGS (absl FlagValues) and run(flags, arguments) -> exit code.
COMMANDS = {
  "info": "what a model file holds, and the memory that it needs",
  "tokenize": "text to token ids and back",
  "generate": "continue a prompt, or several as one batch",
  "chat": "talk with a model",
  "perplexity": "how well a model predicts a text, as llama.cpp measures it",
  "bench": "speed of prefill and decode, in llama-bench's records",
  "convert": "a model from one format to another, its weights as they are",
  "calibrate": "watch what flows through a model, for quantisers to use",
  "quantize": "round a model to fewer bits: mixes of k-quants, int2 to int8, GPTQ, AWQ, HQQ",
  "diff": "how far one form of a model is from another, weights and predictions",
  "export": "a model as StableHLO, to run with JAX alone",
  "verify": "whether a model or a calibration is whole and sound",
  "qat": "train a model under the rounding it will be stored with",
  "demo": "the model that comes with q4jax writes a few lines",
}

_HELP = """\
q4jax {version}: Llama models with int4 weights, in JAX.

usage: q4jax COMMAND [MODEL] [--flag=value ...]

commands:
{commands}

MODEL is the path of a .gguf or .qbin file or of a Hugging Face folder; hf://org/repo/file.gguf or
hf://org/repo (downloaded once); or tiny (the model that comes with q4jax). Start here:

  q4jax demo
  q4jax generate tiny --prompt="The built-in function" --temperature=0
  q4jax COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command line, without the program's name; returns the exit code."""
  arguments = list(sys.argv[1:] if argv is None else argv)
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")  # A terminal without UTF-8 gets question marks.
  try:
    code = _dispatch(arguments)
    sys.stdout.flush()
    return code
  except Q4JaxError as error:
    _say("error", error)
    return 1
  except KeyboardInterrupt:
    return 130
  except BrokenPipeError:
    # The interpreter flushes stdout once more as it exits; let that go nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def process() -> NoReturn:
  """What the process `q4jax` does: `main`, whose exit code is its own."""
  code = main()
  if code == 130:
    # XLA may still be computing, and crashes where the interpreter is taken down under it.
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):
        stream.flush()
    os._exit(code)
  sys.exit(code)


def _dispatch(arguments: list[str]) -> int:
  if not arguments or arguments[0] in ("-h", "--help"):
    commands = "\n".join(f"  {name:12}{summary}" for name, summary in COMMANDS.items())
    text = _HELP.format(version=__version__, commands=commands)
    print(text, end="", file=sys.stdout if arguments else sys.stderr)
    return 0 if arguments else 2
  if arguments[0] == "--version":
    print(f"q4jax {__version__}")
    return 0
  # absl's flags take as long to import as all the rest; the help above does without.
  from q4jax.cli import parsing

  try:
    name = parsing.command(arguments[0], COMMANDS)
    module = importlib.import_module(f"q4jax.cli.{name}")
    if parsing.asks_for_help(arguments[1:]):
      print(parsing.help_text(name, module), end="")
      return 0
    flags, rest = parsing.parse(name, module, arguments[1:])
    return int(module.run(flags, rest))
  except parsing.UsageError as error:
    _say("usage", error)
    return 2


def _say(kind: str, error: Exception) -> None:
  sys.stdout.flush()
  print(f"q4jax: {kind}: {' '.join(str(error).split())}", file=sys.stderr)
