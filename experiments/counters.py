"""The processor's own counts, by `perf stat`, where the machine lets it count."""

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import getpid

EVENTS = ("LLC-loads", "LLC-load-misses")


@dataclass
class Counts:
  """Last-level cache: hits over loads; None, and why, where that was not counted."""

  hit_rate: float | None = None
  reason: str = ""


@contextmanager
def counting(perf: str = "perf") -> Iterator[Counts]:
  """Counts of this process, all threads, while the block runs; filled in when it ends."""
  counts = Counts()
  if shutil.which(perf) is None:
    counts.reason = "perf is not installed"
    yield counts
    return
  with tempfile.NamedTemporaryFile("r") as file:
    command = [
      perf,
      "stat",
      "-x",
      ",",
      "-e",
      ",".join(EVENTS),
      "-p",
      str(getpid()),
      "-o",
      file.name,
    ]
    process = subprocess.Popen(
      command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
      yield counts
    finally:
      process.send_signal(signal.SIGINT)
      _, said = process.communicate(timeout=30)
    found = {}
    for line in file.read().splitlines():
      fields = line.split(",")
      if len(fields) > 2:
        found[fields[2].split(":")[0]] = fields[0]
  values = [found.get(event, "") for event in EVENTS]
  if all(value.isdecimal() for value in values) and int(values[0]):
    loads, misses = map(int, values)
    counts.hit_rate = 1 - misses / loads
  else:
    said = (said or "").strip().splitlines()[0] if (said or "").strip() else ""
    counts.reason = f"perf counts no {EVENTS[0]} here: {values[0] or said or 'it wrote nothing'}"
