r"""Accuracy of retrieval against the share of the cache that is kept, for every eviction policy.

  python -m experiments.kv_retrieval --out=experiments/results/kv_retrieval.json
  python -m experiments.kv_retrieval --policies=snapkv,random --keeps=0.4 --samples=50   # a minute

The model (experiments/retrieval) answers questions about a context of made-up symbols, in three
tasks (experiments/retrieval/tasks.py): passkey, multikey, mqar. Each context is read densely,
compressed, and the question and its answer are stepped through token by token, as when generating:

  agnostic  compressed before the question is known: a policy must keep whatever may be asked
  aware     the questions were the end of what was compressed, and are asked again

A sample is right if every token of every answer is the likeliest one; intervals are Wilson's, 95%.
Samples come from --seed, apart from those that the model was trained on. Rows are named as in
experiments/kv_quality.py. All samples of all tasks go through the same programs, so that a row
compiles once. --seconds and --resume=1 divide the work: rows that --out holds are not done again.
"""

import dataclasses
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app

import q4jax
from experiments import config_flags, kv_quality
from experiments.config_flags import option
from experiments.experiment import Claim
from experiments.provenance import markdown, provenance
from experiments.retrieval import plot as curves
from experiments.retrieval.steps import MODES, Programs, read, right
from experiments.retrieval.tasks import TASKS, Sizes
from experiments.tiny import checkpoint
from q4jax.errors import ConfigError, MissingDependencyError
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy, policy_names

DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Config:
  """What to measure."""

  model: str = option("experiments/retrieval/retrieval.f16.gguf", "The retrieval model.")
  policies: tuple[str, ...] = option(("all",), "Policies, or all.")
  keeps: tuple[float, ...] = option((0.8, 0.6, 0.4, 0.2, 0.1), "Shares of the prompt that stay.")
  rows: tuple[str, ...] = option(
    (DENSE, "f16", "int8", "int4", "int4r", "int4r+keep60+snapkv", "int4r+keep60+keydiff"),
    "Further rows, named as in kv_quality; dense: the cache as prefill leaves it.",
  )
  select: str = option("zscore", "How union_rank compares heads: zscore, logz or rank.")
  samples: int = option(200, "Samples of each task and mode.")
  batch: int = option(50, "Of these at once.")
  context: int = option(256, "Tokens before the questions.")
  pairs: int = option(16, "Pairs in a context of multikey and mqar.")
  asked: int = option(4, "Questions of mqar.")
  seed: int = option(0, "Seed of the samples.")
  sink: int = option(4, "First tokens that stay.")
  recent: int = option(8, "Newest tokens that stay.")
  block_size: int = option(16, "Tokens of a kv block.")
  seconds: float = option(0.0, "Begin no row after this time; 0: all.")
  resume: int = option(0, "1: keep the rows that --out has.")
  out: str = option("", "JSON file of the records; .md and, with matplotlib, .png beside it.")


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
  """Wilson's interval for a share, by default of 95 % (JASA 22, 1927)."""
  share, extra = right / of, z * z / of
  centre = (share + extra / 2) / (1 + extra)
  half = z / (1 + extra) * math.sqrt(share * (1 - share) / of + extra / (4 * of))
  return centre - half, centre + half


def kv_config(row: str, config: Config, head_dim: int) -> KVConfig | None:
  """The cache that a row's name stands for; None is the dense one."""
  if row == DENSE:
    return None
  named = kv_quality.Config(select=config.select, sink=config.sink, recent=config.recent)
  kv = kv_quality.kv_config(row, named, head_dim)
  return dataclasses.replace(kv, block_size=config.block_size)


def policies(config: Config) -> list[str]:
  """The policies to measure; of a policy's names the one that its file has."""
  if config.policies != ("all",):
    return list(config.policies)
  return [name for name in policy_names() if type(get_policy(name)).__module__.endswith(f".{name}")]


def rows(config: Config) -> list[str]:
  """Names of all rows."""
  evicting = [f"keep{100 * keep:.0f}+{name}" for name in policies(config) for keep in config.keeps]
  return [*config.rows, *evicting]


def run(config: Config, done: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
  """A record for each row, task and mode; those of rows in `done` are taken over.

  Raises:
    ConfigError: a row or size that means nothing.
  """
  begin = time.monotonic()
  if config.samples % config.batch:
    raise ConfigError(
      f"--samples={config.samples} are no whole number of batches of --batch={config.batch}."
    )
  model = q4jax.load(config.model)
  kvs = {row: kv_config(row, config, model.config.head_dim) for row in rows(config)}
  for kv in kvs.values():
    if kv is not None:
      kv.check(model.config)
  records = [r for r in done or [] if r["row"] in kvs]
  left = [row for row in kvs if row not in {r["row"] for r in records}]
  programs = Programs(model)
  sizes = Sizes(config.context, config.pairs, config.asked)
  batches = read(model, programs, config.seed, config.samples, config.batch, sizes) if left else []
  for i, row in enumerate(left):
    if 0 < config.seconds < time.monotonic() - begin:
      print(f"{len(left) - i} rows are left: again with --resume=1.", file=sys.stderr)
      break
    measured = [right(model, programs, batch, kvs[row]) for batch in batches]
    good = np.concatenate([g.reshape(len(TASKS), len(MODES), -1) for g, _ in measured], axis=-1)
    kept = float(np.mean([kept for _, kept in measured]))
    records += _records(row, good.sum(-1), config.samples, kept)
    shares = " ".join(f"{100 * share:.0f}" for share in good.mean(-1).reshape(-1))
    print(f"[{i + 1}/{len(left)}] {row} {shares} {time.monotonic() - begin:.0f} s",
      file=sys.stderr, flush=True)  # fmt: skip
  return sorted(records, key=lambda r: list(kvs).index(r["row"]))


def _records(row: str, good: np.ndarray, samples: int, kept: float) -> list[dict[str, Any]]:
  policy = next((part for part in row.split("+") if part in policy_names()), None)
  keep = next((int(part[4:]) / 100 for part in row.split("+") if part.startswith("keep")), 1.0)
  records = []
  for i, task in enumerate(TASKS):
    for j, mode in enumerate(MODES):
      low, high = wilson(int(good[i, j]), samples)
      records.append({
        "row": row, "policy": policy, "keep": keep, "kept": kept, "task": task, "mode": mode,
        "right": int(good[i, j]), "samples": samples, "accuracy": good[i, j] / samples,
        "low": low, "high": high,
      })  # fmt: skip
  return records


def table(records: list[dict[str, Any]]) -> list[list[str]]:
  """Rows for Markdown: per cent, with the interval."""
  columns = [(task, mode) for mode in MODES for task in TASKS]
  lines = [["cache", "kept", *(f"{task}, {mode}" for task, mode in columns)]]
  for row in dict.fromkeys(r["row"] for r in records):
    mine = {(r["task"], r["mode"]): r for r in records if r["row"] == row}
    cells = [
      f"{100 * r['accuracy']:.1f} ({100 * r['low']:.0f}-{100 * r['high']:.0f})"
      for r in (mine[column] for column in columns)
    ]
    lines.append([row, f"{next(iter(mine.values()))['kept']:.3f}", *cells])
  return lines


def plot(records: list[dict[str, Any]], path: str) -> None:
  """Accuracy against keep, a panel for each task and mode."""
  curves.plot(records, path)


def quick() -> list[Config]:
  """Four policies at three shares, a minute and a half."""
  names = ("snapkv", "keydiff", "streaming", "random")
  return [Config(policies=names, keeps=(0.6, 0.4, 0.2), rows=(DENSE, "f16", "int4r"), samples=50)]


def full() -> list[Config]:
  """The whole table."""
  return [Config()]


CLAIMS: tuple[Claim, ...] = ()
VERSION = 1


def _previous(config: Config, digest: str) -> list[dict[str, Any]]:
  """The records in --out; none if there is no file. ConfigError if they are of something else."""
  if not config.resume or not Path(config.out).exists():
    return []
  whole = json.loads(Path(config.out).read_text())
  free = ("policies", "keeps", "rows", "batch", "seconds", "resume", "out")
  now = json.loads(json.dumps(dataclasses.asdict(config)))
  other = [k for k, v in whole["config"].items() if k not in free and v != now[k]]
  if other or whole["model_sha256"] != digest:
    raise ConfigError(
      f"{config.out} was measured with another {other[0] if other else 'model file'}. Give another "
      "--out, or --resume=0 to replace it."
    )
  return whole["records"]


def main(_: list[str]) -> None:
  config = config_flags.read(Config)
  try:
    digest = hashlib.sha256(Path(config.model).read_bytes()).hexdigest()
    records = run(config, _previous(config, digest))
  except (q4jax.Q4JaxError, OSError) as error:
    raise app.UsageError(str(error)) from error
  print(markdown(table(records)))
  if not config.out:
    return
  whole = {**provenance(), "config": dataclasses.asdict(config), "model_sha256": digest}
  lines = ",\n".join(map(json.dumps, records))
  path = Path(config.out)
  text = f'{json.dumps(whole, indent=1)[:-2]},\n "records": [\n{lines}\n ]\n}}\n'
  checkpoint.write_atomic(path, text.encode())
  path.with_suffix(".md").write_text(markdown(table(records)) + "\n")
  try:
    plot(records, str(path.with_suffix(".png")))
  except MissingDependencyError as error:
    print(f"no plot: {error}", file=sys.stderr)


if __name__ == "__main__":
  config_flags.define(Config)
  app.run(main)
