r"""The KV cache's quality table: perplexity, KL and agreement against bytes, store by store and
policy by policy.

  python -m experiments.kv_quality --model=tiny --text=book.txt \
    --rows=int8,int4r,keep60,int4r+keep60 --out=experiments/results/kv_quality.json

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
from pathlib import Path
from typing import Any

import numpy as np
from absl import app

import q4jax
from experiments import config_flags
from experiments.config_flags import option
from experiments.provenance import markdown, save
from q4jax.errors import ConfigError
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy, policy_names
from q4jax.kv.protect import Protect
from q4jax.kv.quality import Quality, stepped_quality
from q4jax.kv.select import UnionRank
from q4jax_kernels.kv_format import KVFormat


@dataclasses.dataclass(frozen=True)
class Config:
  """What to evaluate."""

  model: str = option("tiny", "A model that q4jax.load takes.")
  text: str = option("", "A text file.")
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
  model = q4jax.load(config.model)
  kvs = {row: kv_config(row, config, model.config.head_dim) for row in config.rows}
  tokens = np.asarray(
    model.tokenizer.encode_parts([Path(config.text).read_text()], add_eos=False), np.int32
  )
  count = config.sequences * config.ctx
  if len(tokens) < count:
    raise ConfigError(
      f"--text has {len(tokens)} tokens; {config.sequences} sequences of {config.ctx} need {count}."
    )
  sequences = tokens[:count].reshape(config.sequences, config.ctx).copy()
  bos = model.tokenizer.encode_parts([], add_eos=False)
  sequences[:, : len(bos)] = bos
  records = []
  for row, kv in kvs.items():
    parts = [
      stepped_quality(model, sequences[i : i + config.batch], config.ctx // 2, kv)
      for i in range(0, config.sequences, config.batch)
    ]
    records.append({"row": row, **_joined(parts), "bits": kv.bits_per_value(model.config.head_dim)})
    print(f"{row}: {records[-1]['ratio']:.4f}", file=sys.stderr, flush=True)
  return records


def _joined(parts: list[Quality]) -> dict[str, float]:
  """Means of equally large batches."""
  mean = lambda values: float(np.mean(list(values)))  # noqa: E731
  log_ratio = mean(np.log(p.ratio) for p in parts)
  return {
    "ppl": float(np.exp(mean(np.log(p.ppl) for p in parts))),
    "dense_ppl": float(np.exp(mean(np.log(p.dense_ppl) for p in parts))),
    "ratio": float(np.exp(log_ratio)),
    "ratio_stderr": float(np.sqrt(mean(p.ratio_stderr**2 for p in parts) / len(parts))),
    "kl": mean(p.kl for p in parts),
    "top1": mean(p.top1 for p in parts),
    "keep_ratio": mean(p.usage.keep_ratio for p in parts),
    "compression": mean(p.usage.compression for p in parts),
    "tokens": sum(p.tokens for p in parts),
  }


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


def main(_: list[str]) -> None:
  config = config_flags.read(Config)
  if not config.text:
    raise app.UsageError("--text is needed.")
  try:
    records = run(config)
  except q4jax.Q4JaxError as error:
    raise app.UsageError(str(error)) from error
  print(markdown(table(records)))
  if config.out:
    save(config.out, config, records)


if __name__ == "__main__":
  config_flags.define(Config)
  app.run(main)
