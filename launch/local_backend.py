"""Runs the trials of a sweep here, each in a process of its own.

FOLDER/HASH/record.json   what the experiment wrote, and under the key "trial" which trial it was;
                          with that key, the trial is done
FOLDER/HASH/log.txt       what it printed, of all attempts
FOLDER/lock               held while a sweep uses the folder
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from experiments.tiny.checkpoint import write_atomic
from launch.trials import Sweep, Trial
from q4jax.errors import ConfigError

_POLL_S = 0.05
# Between asking a process to end and ending it.
_GRACE_S = 5.0

Status = Literal["done", "found", "failed", "timeout"]


@dataclasses.dataclass(frozen=True)
class Result:
  """What became of a trial; "found" if it was done before. Seconds of its last attempt."""

  trial: Trial
  status: Status
  attempts: int
  seconds: float
  log: Path


class Interrupted(Exception):
  """SIGINT or SIGTERM came; what ran has been ended."""

  def __init__(self, number: int) -> None:
    super().__init__(f"signal {number}")
    self.number = number


@dataclasses.dataclass
class _Running:
  trial: Trial
  process: subprocess.Popen
  attempt: int
  began: float


def record_path(folder: Path, trial: Trial) -> Path:
  """Where the trial's record is, once it is done."""
  return folder / trial.hash / "record.json"


def finished(folder: Path, trial: Trial) -> dict[str, Any] | None:
  """The trial's record, if it is done."""
  try:
    record = json.loads(record_path(folder, trial).read_bytes())
  except (OSError, ValueError):
    return None
  done = isinstance(record, dict) and record.get("trial", {}).get("hash") == trial.hash
  return record if done else None


def run(sweep: Sweep, folder: Path, workers: int, report: Callable[[Result], None]) -> list[Result]:
  """Runs what is not yet done, `workers` trials at a time; `report` hears of each as it ends.

  Whatever it raises, the processes that it started are ended first, with all their children.

  Raises:
    ConfigError: another sweep uses the folder.
    Interrupted: SIGINT (Ctrl-C) or SIGTERM.
  """
  results: dict[str, Result] = {}
  queue = [(trial, 1) for trial in sweep.trials]
  running: list[_Running] = []

  def end(result: Result) -> None:
    results[result.trial.hash] = result
    report(result)

  with _locked(folder), _signals() as came:
    try:
      while queue or running:
        if came:
          raise Interrupted(came[0])
        while queue and len(running) < workers:
          trial, attempt = queue.pop(0)
          if finished(folder, trial) is not None:
            end(Result(trial, "found", 0, 0.0, _log(folder, trial)))
          else:
            running.append(_start(trial, attempt, folder))
        for one in list(running):
          status = _status(one, folder, sweep)
          if status is None:
            continue
          running.remove(one)
          if status != "done" and one.attempt <= sweep.retries:
            queue.insert(0, (one.trial, one.attempt + 1))
            continue
          seconds = time.monotonic() - one.began
          end(Result(one.trial, status, one.attempt, seconds, _log(folder, one.trial)))
        if running:
          time.sleep(_POLL_S)
    finally:
      _stop([one.process for one in running])
  return [results[trial.hash] for trial in sweep.trials]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(
        f"another sweep writes to {folder}; wait for it, or give another --out."
      ) from None
    yield


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """The signals that came, to be looked at between steps.

  An exception in the midst of starting a process would lose sight of it.
  """
  came: list[int] = []
  before = {
    number: signal.signal(number, lambda n, _: came.append(n))
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield came
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _log(folder: Path, trial: Trial) -> Path:
  return folder / trial.hash / "log.txt"


def _start(trial: Trial, attempt: int, folder: Path) -> _Running:
  record = record_path(folder, trial)
  record.parent.mkdir(exist_ok=True)
  record.unlink(missing_ok=True)
  command = trial.command(record, sys.executable)
  with _log(folder, trial).open("w" if attempt == 1 else "a") as log:
    log.write(f"$ {' '.join(command)}\n")
    log.flush()
    # A session of its own: Ctrl-C reaches us alone, and its children end with it.
    process = subprocess.Popen(
      command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
  return _Running(trial, process, attempt, time.monotonic())


def _status(one: _Running, folder: Path, sweep: Sweep) -> Status | None:
  """How an attempt ended; None if it has not. A record that was written is signed."""
  seconds = time.monotonic() - one.began
  code = one.process.poll()
  if code is None and sweep.timeout_s and seconds > sweep.timeout_s:
    _stop([one.process])
    _note(folder, one.trial, f"stopped after {sweep.timeout_s:g} s")
    return "timeout"
  if code is None:
    return None
  if code:
    _note(folder, one.trial, f"exit code {code}")
    return "failed"
  path = record_path(folder, one.trial)
  try:
    record = json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    _note(folder, one.trial, f"exit code 0, but no record: {error}")
    return "failed"
  about = {
    "hash": one.trial.hash,
    "experiment": one.trial.experiment,
    "flags": dict(one.trial.flags),
    "sweep": sweep.name,
    "attempts": one.attempt,
    "seconds": round(seconds, 3),
  }
  write_atomic(path, (json.dumps({**record, "trial": about}, indent=1) + "\n").encode())
  return "done"


def _note(folder: Path, trial: Trial, text: str) -> None:
  with _log(folder, trial).open("a") as log:
    log.write(f"[sweep] {text}\n")


def _stop(processes: list[subprocess.Popen]) -> None:
  """Ends processes and their children: asked first, then killed."""
  for process in processes:
    _signal(process, signal.SIGTERM)
  deadline = time.monotonic() + _GRACE_S
  for process in processes:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(max(0.0, deadline - time.monotonic()))
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
  with contextlib.suppress(ProcessLookupError):  # they have all gone
    os.killpg(process.pid, number)
