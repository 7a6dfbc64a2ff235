r"""Runs a sweep: an experiment with each combination of flags that a description names.

  python -m launch.sweep launch/sweeps/quant_grid.toml --dry_run
  python -m launch.sweep launch/sweeps/quant_grid.toml --workers=2 --out=runs/quant_grid

What a description says: launch/trials.py. Trials run here, in processes of their own
(launch/local_backend.py). A trial that is done is not run again, so that the same command goes on
after Ctrl-C, a crash or a longer description; delete a trial's folder to run it anew. What a failed
one printed last is shown. The table at the end is Markdown.

Exit codes: 0 all trials are done; 1 some failed; 2 the command or the description makes no sense,
and nothing was started; 130 Ctrl-C, 143 SIGTERM: the processes have been ended.
"""

import shlex
import sys
from pathlib import Path

from absl import app, flags

from experiments.provenance import markdown
from launch import local_backend, trials
from launch.local_backend import Interrupted, Result
from launch.trials import Sweep
from q4jax.errors import ConfigError

_TAIL_LINES = 15


def define() -> None:
  """The flags of the command."""
  flags.DEFINE_string("out", "", "Folder of logs and records; runs/NAME, of NAME.toml, if none.")
  flags.DEFINE_integer("workers", 1, "Trials that run at a time.", lower_bound=1)
  flags.DEFINE_boolean("dry_run", False, "Print the commands of what is to do, and run nothing.")


def show(sweep: Sweep, folder: Path) -> None:
  """Prints the command of each trial that is not done, to be pasted into a shell."""
  todo = [t for t in sweep.trials if local_backend.finished(folder, t) is None]
  for trial in todo:
    print(shlex.join(trial.command(local_backend.record_path(folder, trial))))
  print(f"{len(todo)} of {len(sweep.trials)} trials to run", file=sys.stderr)


def table(sweep: Sweep, results: list[Result]) -> str:
  """What became of each trial, as Markdown."""
  head = ["trial", *sweep.swept, "status", "attempts", "seconds"]
  rows = [
    [
      r.trial.hash,
      *(r.trial.flags[flag] for flag in sweep.swept),
      r.status,
      str(r.attempts or ""),
      f"{r.seconds:.1f}" if r.attempts else "",
    ]
    for r in results
  ]
  return markdown([head, *rows])


def main(argv: list[str]) -> int:
  """Runs or shows the sweep of the file that the command names; returns the exit code."""
  if len(argv) != 2:
    return _usage(f"one description is needed; got {len(argv) - 1}. See --help.")
  try:
    sweep = trials.load(argv[1])
    folder = Path(flags.FLAGS.out or Path("runs") / sweep.name)
    if flags.FLAGS.dry_run:
      show(sweep, folder)
      return 0
    progress = _Progress(len(sweep.trials))
    results = local_backend.run(sweep, folder, flags.FLAGS.workers, progress)
  except ConfigError as error:
    return _usage(str(error))
  except Interrupted as error:
    print("sweep: interrupted; the same command goes on from here.", file=sys.stderr)
    return 128 + error.number
  print(table(sweep, results))
  failed = sum(r.status in ("failed", "timeout") for r in results)
  print(f"{len(results) - failed} of {len(results)} trials done; {folder}", file=sys.stderr)
  return 1 if failed else 0


class _Progress:
  """Says to stderr how each trial ended."""

  def __init__(self, total: int) -> None:
    self.done, self.total = 0, total

  def __call__(self, r: Result) -> None:
    self.done += 1
    words = " ".join(f"--{name}={value}" for name, value in r.trial.flags.items())
    print(f"[{self.done}/{self.total}] {r.trial.hash} {r.status} {words}", file=sys.stderr)
    if r.status in ("failed", "timeout"):
      tail = r.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
      print("\n".join(f"  | {line}" for line in [f"{r.log}:", *tail]), file=sys.stderr)
    sys.stderr.flush()


def _usage(message: str) -> int:
  print(f"sweep: error: {message}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  define()
  app.run(main)
