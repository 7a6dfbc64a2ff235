"""Opens malformed files in a child process and reports what each did: its error, seconds, memory.

PYTHONPATH=.:kernels:tests python -m formats.refusals q4jax.formats.gguf:GGUFFile.open PATH...
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
  """What opening a file did.

  Attributes:
    error: names of the exception's classes from its own down to BaseException; none if it opened.
    growth: peak resident bytes above those before opening.
  """

  error: list[str]
  message: str
  seconds: float
  growth: int


def outcomes(opener: str, paths: Sequence[Path], timeout: float = 120) -> list[Outcome]:
  """Opens each path, in one child process, with `opener`, as "module:name"."""
  path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "tests"))
  child = subprocess.run(
    [sys.executable, "-m", "formats.refusals", opener, *map(str, paths)],
    env={**os.environ, "PYTHONPATH": path},
    stdout=subprocess.PIPE,
    text=True,
    timeout=timeout,
    check=True,
  )
  return [Outcome(**json.loads(line)) for line in child.stdout.splitlines()]


def _memory(field: str) -> int:
  """A field of /proc/self/status in bytes: VmRSS is resident now, VmHWM was at the peak."""
  status = Path("/proc/self/status").read_text()
  return int(status.split(f"{field}:")[1].split()[0]) * 1024


def _outcome(opener: str, path: str) -> Outcome:
  module, name = opener.split(":")
  function = reduce(getattr, name.split("."), import_module(module))
  Path("/proc/self/clear_refs").write_text("5")  # Sets the peak to what is resident.
  before = _memory("VmRSS")
  start = time.perf_counter()
  error: list[str] = []
  message = ""
  try:
    function(path)  # type: ignore[operator]
  except Exception as exception:
    error, message = [kind.__name__ for kind in type(exception).__mro__], str(exception)
  seconds = time.perf_counter() - start
  return Outcome(error, message, seconds, _memory("VmHWM") - before)


if __name__ == "__main__":
  for argument in sys.argv[2:]:
    print(json.dumps(asdict(_outcome(sys.argv[1], argument))), flush=True)
