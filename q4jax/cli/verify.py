"""Checks that a model or a calibration is what it says, reading every byte of it.

  q4jax verify model.qbin
  q4jax verify model.gguf --json
  q4jax verify calibration.json
  q4jax verify folder

A model: its structure, the checksums of a .qbin, and that every scale and minimum of its blocks
(and every value of its float tensors) is finite. A calibration: the JSON Schema, and what that
cannot say. A folder: each .gguf, .qbin and calibration in it.

The exit code is 1 if anything is wrong; all failures are listed.

--json prints one object: path, ok, files, tensors, checksums (that were compared), records, seconds
and failures, each with path, tensor (null where it is the file) and problem.
"""

import time
from contextlib import nullcontext
from dataclasses import asdict

from absl import flags as absl_flags

from q4jax.cli import common

ARGUMENTS = ("PATH",)
FLAGS = absl_flags.FlagValues()
common.define_json(FLAGS)


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Prints what is wrong, or that nothing is."""
  path = common.find_model(arguments[0], flags)
  from q4jax.offline.verify import verify

  begin = time.perf_counter()
  with common.bar("verifying") if common.watched(flags) else nullcontext() as advance:
    report = verify(path, advance)
  seconds = time.perf_counter() - begin
  failures = report.failures
  if flags.json:
    about = {"path": str(path), "ok": not failures, **asdict(report), "seconds": round(seconds, 3)}
    common.print_json(about)
    return 1 if failures else 0
  for failure in failures:  # Names are a stranger's: no escape sequences for the terminal.
    where = "" if failure.tensor is None else f"{failure.path}: {failure.tensor}: "
    text = where + failure.problem
    print("".join(char if char.isprintable() else "?" for char in text))
  counts = (
    f"{report.files} file(s), {report.tensors} tensors, {report.checksums} checksums, "
    f"{report.records} records in {seconds:.1f} s"
  )
  if failures:
    first = failures[0]
    where = first.tensor or first.path
    common.note(f"q4jax: error: {len(failures)} failure(s), first in {where!r}; {counts}")
    return 1
  print(f"ok: {counts}")
  return 0
