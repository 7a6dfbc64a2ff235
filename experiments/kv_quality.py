r"""The KV cache's quality table: perplexity, KL and agreement against bytes, store by store and
policy by policy.

  python -m experiments.kv_quality --rows=int8,int4r,keep60,int4r+keep60   # a minute on two cores
  python -m experiments.kv_quality --text=book.txt --out=experiments/results/kv_quality.json

The text is cut into sequences; each is read to its middle densely, compressed, and stepped through
token by token (q4jax/kv/quality.py). Rows are joined of parts by "+":

  f16 f32 int8 int4    how blocks are stored (int8 and int4 asymmetric, --group); k8v4: both
  int8r int4r k8v4r    the same with rotated heads
  keep60               the share of the prompt's tokens that stays, by --policy and --select
  a policy's name      that policy instead of --policy, e.g. keep50+knorm
  mask                 hide instead of evict
"""

import dataclasses
import sys
from typing import Any

from experiments import inputs, plots, stepping
from experiments.config_flags import option
from experiments.experiment import Claim, command, each
from q4jax.errors import ConfigError
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy, policy_names
from q4jax.kv.protect import Protect
from q4jax.kv.select import UnionRank
from q4jax_kernels.kv_format import KVFormat


@dataclasses.dataclass(frozen=True)
class Config:
  """What to evaluate."""

  model: str = option("tiny", "A model that q4jax.load takes.")
  text: str = option("held_out", "held_out or calibration, a file, or hf://datasets/...")
  rows: tuple[str, ...] = option(
    ("f16", "int8", "int4", "int4r", "k8v4r", "keep60", "int8+keep60", "int4r+keep60"),
    "Rows of the table; see above.",
  )
  policy: str = option("snapkv", "Policy of the rows that keep less than all.")
  select: str = option("rank", "How union_rank compares heads: zscore, logz or rank.")
  group: int = option(32, "Numbers that share a scale; where it does not divide a head, the head.")
  ctx: int = option(512, "Tokens of a sequence.")
  sequences: int = option(16, "Sequences.")
  batch: int = option(16, "Sequences at once.")
  sink: int = option(4, "First tokens that stay.")
  recent: int = option(64, "Newest tokens that stay.")
  out: str = option("", "File to write the records to, as JSON.")


def kv_config(row: str, config: Config, head_dim: int) -> KVConfig:
  """The cache that a row's name stands for; ConfigError names the part that is not understood."""
  group = config.group if head_dim % config.group == 0 else None
  kv = KVConfig(protect=Protect(config.sink, config.recent, 0))
  stores = {"f16": (16, 16), "f32": (32, 32), "int8": (8, 8), "int4": (4, 4), "k8v4": (8, 4)}
  policy, keep, chosen = config.policy, None, ""
  for part in row.split("+"):
    if part.removesuffix("r") in stores:
      formats = [
        KVFormat(bits, None if bits >= 16 else group) for bits in stores[part.removesuffix("r")]
      ]
      kv = dataclasses.replace(kv, key=formats[0], value=formats[1], rotate=part.endswith("r"))
    elif part.startswith("keep") and part[4:].isdigit():
      keep = int(part[4:]) / 100
    elif part == "mask":
      kv, chosen = dataclasses.replace(kv, mask=True), part
    elif part in policy_names():
      policy = chosen = part
    else:
      raise ConfigError(
        f"row '{row}': '{part}' is none of {', '.join(stores)} (or one with an r), keepNN, mask, "
        f"or a policy ({', '.join(policy_names())})."
      )
  if keep is None and chosen:
    raise ConfigError(
      f"row '{row}': '{chosen}' evicts nothing without a share to keep; add keepNN."
    )
  if keep is None:
    return kv
  select = UnionRank(keep, by=config.select)  # type: ignore[arg-type]
  return dataclasses.replace(kv, policy=get_policy(policy), select=select)


def run(config: Config) -> list[dict[str, Any]]:
  """A record for each row."""
  if config.sequences % config.batch:
    raise ConfigError(
      f"--sequences={config.sequences} are no whole number of batches of --batch={config.batch}."
    )
  model = inputs.model(config.model)
  kvs = {row: kv_config(row, config, model.config.head_dim) for row in config.rows}
  sequences = inputs.sequences(model, config.text, config.sequences, config.ctx)
  records = []
  for row, kv in kvs.items():
    measured = stepping.measure(model, sequences, kv, config.batch)
    records.append({"row": row, **measured, "bits": kv.bits_per_value(model.config.head_dim)})
    print(f"{row}: {records[-1]['ratio']:.4f}", file=sys.stderr, flush=True)
  return records


def table(records: list[dict[str, Any]]) -> list[list[str]]:
  """Rows for Markdown."""
  head = [
    "cache",
    "bits",
    "kept",
    "bytes of f16",
    "perplexity",
    "against dense",
    "KL",
    "same top-1",
  ]
  return [head] + [
    [
      r["row"],
      f"{r['bits']:.2f}",
      f"{r['keep_ratio']:.3f}",
      f"{1 / r['compression']:.3f}",
      f"{r['ppl']:.3f}",
      f"{100 * (r['ratio'] - 1):+.2f} % ± {100 * r['ratio_stderr']:.2f}",
      f"{r['kl']:.5f}",
      f"{100 * r['top1']:.2f} %",
    ]
    for r in records
  ]


def plot(records: list[dict[str, Any]], path: str) -> None:
  """The change of perplexity against bytes, a point for each row."""
  with plots.figure(path, width=9) as (axis,):
    for r in records:
      plots.with_interval(axis, [1 / r["compression"]], [r], label=r["row"])
    plots.change_axis(axis, xlabel="bytes of a float16 cache", title="stores and policies")
    axis.legend(fontsize="small", ncols=2)


def quick() -> list[Config]:
  """Five rows, a minute."""
  rows = ("f16", "int8", "keep60", "int4r+keep60", "int4r+keep60+value_snap")
  return each(Config(rows=rows, sequences=8, batch=8, recent=32), "rows")


def full() -> list[Config]:
  """All stores, and every policy at two shares."""
  policies = [f"keep{keep}+{name}" for keep in (60, 40) for name in policy_names()]
  return each(Config(rows=(*Config().rows, *policies), sequences=64, ctx=896), "rows")


CLAIMS: tuple[Claim, ...] = ()
VERSION = 1

if __name__ == "__main__":
  command(__name__)
