"""The one shape that all tables have, and what follows from it: a command, a cache key, claims.

An experiment is a module with

  Config            a frozen dataclass of options (config_flags.option); it may have an `out`
  run(config)       -> records, dicts that JSON can hold
  table(records)    -> rows of cells, the first one the head
  plot(records, path)  writes a PNG
  CLAIMS            rows of the reference table that it measures
  VERSION           counted up when records of the same config would mean something else
  quick(), full()   -> Configs: minutes on two cores, and what a paper would want

experiments/reproduce.py runs them all; to add one, add its name to `NAMES`.
"""

import dataclasses
import hashlib
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from absl import app, flags

import q4jax
from experiments import config_flags, inputs
from experiments.provenance import markdown, save
from q4jax.errors import ConfigError, MissingDependencyError

Record = dict[str, Any]

NAMES: tuple[str, ...] = (
  "quant_error",
  "group_size",
  "kv_group_size",
  "sinks",
  "kv_frontier",
  "kv_threshold",
  "kv_quality",
  "kv_bottleneck",
  "end_to_end",
  "kv_retrieval",
  "qat_variants",
  "bench_int4_matmul",
  "bench_kv_attention",
)


@dataclasses.dataclass(frozen=True)
class Claim:
  """A row of the reference table, to stand beside what is measured here.

  Attributes:
    claim: what of.
    claimed: the number that was published.
    unit: of both numbers.
    how: how it is measured here.
    measure: the number from an experiment's records; None where they do not hold it.
    sentence: what to say of it, from the records and the number.
  """

  claim: str
  claimed: float
  unit: str
  how: str
  measure: Callable[[list[Record]], float | None]
  sentence: str = ""

  def row(self, records: list[Record]) -> Record:
    """The claim beside the measurement; `measured` and `ratio` (to claimed) None without one."""
    measured = self.measure(records)
    return {
      "claim": self.claim,
      "claimed": self.claimed,
      "unit": self.unit,
      "measured": measured,
      "ratio": None if measured is None else measured / self.claimed,
      "how": self.how,
      "sentence": self.sentence,
    }


class Experiment(Protocol):
  """What the module of an experiment holds; see above."""

  __doc__: str | None
  __name__: str
  CLAIMS: Sequence[Claim]
  VERSION: int
  Config: type

  def run(self, config: Any) -> list[Record]: ...
  def table(self, records: list[Record]) -> list[list[str]]: ...
  def plot(self, records: list[Record], path: str) -> None: ...
  def quick(self) -> list[Any]: ...
  def full(self) -> list[Any]: ...


def load(name: str) -> Experiment:
  """The experiment of that name; ConfigError where there is none."""
  if name not in NAMES:
    raise ConfigError(f"'{name}' is no experiment; there are {', '.join(NAMES)}.")
  return cast(Experiment, importlib.import_module(f"experiments.{name}"))


def each(config: Any, *fields: str) -> list[Any]:
  """A config for every combination of the values that these fields, tuples, hold: a row each, so
  that each is cached by itself.
  """
  values = [[(value,) for value in getattr(config, field)] for field in fields]
  return [
    dataclasses.replace(config, **dict(zip(fields, one, strict=True)))
    for one in itertools.product(*values)
  ]


def key(name: str, version: int, config: Any) -> str:
  """What names the records of a config: 16 hexadecimal digits. The contents of the files that it
  names as models or texts are part of it, where they are written to is not.
  """
  values = {k: v for k, v in dataclasses.asdict(config).items() if k != "out"}
  files = {
    k: inputs.digest(inputs.where(kind, v))
    for kind in ("text", "model")
    for k, v in values.items()
    if v and (k == kind or k.endswith(f"_{kind}"))
  }
  text = json.dumps([name, version, values, files], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def claims_table(rows: list[Record]) -> list[list[str]]:
  """Rows for Markdown, of `Claim.row`s."""
  head = ["claim", "claimed", "measured", "ratio", "measured here as", ""]
  return [head] + [
    [
      row["claim"],
      f"{row['claimed']:g} {row['unit']}".strip(),
      "not here" if row["measured"] is None else f"{row['measured']:.3g} {row['unit']}".strip(),
      "" if row["ratio"] is None else f"{row['ratio']:.2f}",
      row["how"],
      row["sentence"],
    ]
    for row in rows
  ]


def text(experiment: Experiment, records: list[Record]) -> str:
  """The table of an experiment and its claims, as Markdown."""
  parts = [markdown(experiment.table(records))]
  rows = [claim.row(records) for claim in experiment.CLAIMS]
  if any(row["measured"] is not None for row in rows):
    parts.append(markdown(claims_table(rows)))
  return "\n\n".join(parts) + "\n"


def command(module: str) -> None:
  """What `python -m experiments.NAME` does: flags of the Config, run, print, write."""
  name = module if module != "__main__" else Path(sys.argv[0]).stem
  experiment = load(name)
  config_flags.define(experiment.Config)
  own = "out" in {field.name for field in dataclasses.fields(experiment.Config)}
  if not own:
    flags.DEFINE_string("out", "", "JSON file of the records; .md and .png are written beside it.")

  def main(_: list[str]) -> None:
    config: Any = config_flags.read(experiment.Config)
    try:
      records = experiment.run(config)
    except (q4jax.Q4JaxError, OSError) as error:
      raise app.UsageError(str(error)) from error
    print(text(experiment, records))
    out = flags.FLAGS.out
    if not out:
      return
    save(out, config, records)
    Path(out).with_suffix(".md").write_text(text(experiment, records))
    try:
      experiment.plot(records, str(Path(out).with_suffix(".png")))
    except MissingDependencyError as error:
      print(f"no plot: {error}", file=sys.stderr)

  app.run(main)
