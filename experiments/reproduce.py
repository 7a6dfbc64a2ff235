r"""Every table, from one command: records, tables, plots, and one report that holds them all.

  python -m experiments.reproduce --quick                      # 7 to 10 minutes, two CPUs
  python -m experiments.reproduce --only=sinks,kv_group_size
  python -m experiments.reproduce --full --out=runs/full       # hours

Writes under --out, for each experiment (experiments/experiment.py: `NAMES`), NAME.jsonl (a record a
line, with its config, device, versions and commit), NAME.csv, NAME.md and, with matplotlib,
NAME.png; and report.html, which needs no other file, and report.md.

The records of each config are kept in --out/cache as soon as they are measured, named by a hash of
the experiment, its version, the config and the model's and text's contents: a run that was killed
goes on where it was, and a second one only writes. --fresh measures anew. An experiment that fails
is reported, does not stop the others, and makes the exit status 1.
"""

import contextlib
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

import q4jax
from experiments import experiment, report
from experiments.experiment import Experiment
from experiments.provenance import provenance
from experiments.report import Result
from experiments.tiny.checkpoint import write_atomic
from q4jax.errors import ConfigError


def reproduce(
  experiments: Mapping[str, Experiment], level: str, out: Path, fresh: bool = False
) -> list[Result]:
  """Runs the experiments' `quick` or `full` configs, as `level` says, and writes what they gave."""
  begin = time.monotonic()
  results = []
  jobs: list[tuple[Result, Any]] = []
  for name, module in experiments.items():
    result = Result(name, module)
    results.append(result)
    with _caught(result):
      jobs += [(result, config) for config in getattr(module, level)()]
  with _progress(len(jobs)) as advance:
    for result, config in jobs:
      advance(result.name)
      with _caught(result, config):
        result.runs.append(_run(result, config, out / "cache", fresh))
  for result in results:
    with _caught(result):
      report.write_tables(result, out)
  report.write(results, out, level, time.monotonic() - begin)
  return results


def _run(result: Result, config: Any, cache: Path, fresh: bool) -> dict[str, Any]:
  """The records of a config, with where they are from; out of the cache if they are there."""
  assert result.experiment is not None
  key = experiment.key(result.name, result.experiment.VERSION, config)
  path = cache / f"{result.name}-{key}.json"
  if path.exists() and not fresh:
    result.cached += 1
    return json.loads(path.read_text())
  begin = time.monotonic()
  records = result.experiment.run(config)
  run = {
    "experiment": result.name,
    "key": key,
    **provenance(),
    "seconds": round(time.monotonic() - begin, 2),
    "config": dataclasses.asdict(config),
    "records": records,
  }
  write_atomic(path, (json.dumps(run, indent=1) + "\n").encode())
  return json.loads(json.dumps(run))


@contextlib.contextmanager
def _caught(result: Result, config: Any = None) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # Whatever it is, the other experiments are not to miss it.
    what = f"{config}\n" if config is not None else ""
    if isinstance(error, q4jax.Q4JaxError):
      result.errors.append(f"{what}{type(error).__name__}: {error}")
    else:
      result.errors.append(what + traceback.format_exc())
    print(f"{result.name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
  """A bar on stderr, or a line for each step where that is no terminal."""
  if not sys.stderr.isatty():
    done = iter(range(1, total + 1))
    yield lambda name: print(f"[{next(done)}/{total}] {name}", file=sys.stderr, flush=True)
    return
  from rich.console import Console
  from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

  columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
  with Progress(*columns, console=Console(stderr=True)) as bar:
    task = bar.add_task("", total=total)
    started = False

    def advance(name: str) -> None:
      nonlocal started
      bar.update(task, description=name, advance=int(started))
      started = True

    yield advance
    bar.update(task, completed=total)


def _load(names: list[str]) -> Mapping[str, Experiment]:
  unknown = [name for name in names if name not in experiment.NAMES]
  if unknown:
    raise ConfigError(
      f"--only: {', '.join(unknown)} is no experiment; there are {', '.join(experiment.NAMES)}."
    )
  return {name: experiment.load(name) for name in names or experiment.NAMES}


def main(_: list[str]) -> None:
  f = flags.FLAGS
  if f.quick and f.full:
    raise app.UsageError("--quick and --full exclude each other.")
  try:
    experiments = _load(f.only)
  except ConfigError as error:
    raise app.UsageError(str(error)) from error
  out = Path(f.out)
  results = reproduce(experiments, "full" if f.full else "quick", out, f.fresh)
  failed = [result.name for result in results if result.errors]
  cached = sum(result.cached for result in results)
  runs = sum(len(result.runs) for result in results)
  print(f"{runs} runs, {cached} of them from the cache: {out / 'report.html'}")
  if failed:
    print(f"failed: {', '.join(failed)}; the report says how.", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  flags.DEFINE_bool("quick", False, "Few rows on little text; the default.")
  flags.DEFINE_bool("full", False, "All rows.")
  flags.DEFINE_list("only", [], f"Experiments to run, of {', '.join(experiment.NAMES)}; or all.")
  flags.DEFINE_string("out", "runs/reproduce", "Folder to write to, and to go on from.")
  flags.DEFINE_bool("fresh", False, "Measure what the cache has, too.")
  app.run(main)
