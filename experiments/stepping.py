"""Records of a compressed cache's cost, by stepping through texts (q4jax/kv/quality.py)."""

from typing import Any

import numpy as np

from experiments.intervals import bootstrap
from q4jax.errors import ConfigError
from q4jax.kv.config import KVConfig
from q4jax.kv.quality import stepped_quality
from q4jax.model.model import Model


def measure(
  model: Model, sequences: np.ndarray, kv: KVConfig, batch: int = 0, prompt: int = 0
) -> dict[str, Any]:
  """One record of int[S, T]; each sequence is read to `prompt` (its middle if 0), compressed, and
  stepped to its end, `batch` of them (all if 0) together.

  `by_sequence` are the mean differences of losses, ln(perplexity / dense perplexity), one of each
  sequence; `ratio_low` and `ratio_high` the 95% bootstrap interval over them.

  ConfigError if the sequences are no whole number of batches.
  """
  count = len(sequences)
  batch = batch or count
  if count % batch:
    raise ConfigError(
      f"--sequences={count} are no whole number of batches of --batch={batch}."
    )  # fmt: skip
  prompt = prompt or sequences.shape[1] // 2
  parts = [
    stepped_quality(model, sequences[i : i + batch], prompt, kv) for i in range(0, count, batch)
  ]
  mean = lambda values: float(np.mean(list(values)))  # noqa: E731
  by_sequence = [value for part in parts for value in part.by_sequence]
  low, high = bootstrap(by_sequence)
  return {
    "ppl": float(np.exp(mean(np.log(p.ppl) for p in parts))),
    "dense_ppl": float(np.exp(mean(np.log(p.dense_ppl) for p in parts))),
    "ratio": float(np.exp(mean(by_sequence))),
    "ratio_stderr": float(np.sqrt(mean(p.ratio_stderr**2 for p in parts) / len(parts))),
    "ratio_low": float(np.exp(low)),
    "ratio_high": float(np.exp(high)),
    "kl": mean(p.kl for p in parts),
    "top1": mean(p.top1 for p in parts),
    "keep_ratio": mean(p.usage.keep_ratio for p in parts),
    "compression": mean(p.usage.compression for p in parts),
    "cache_bytes": sum(p.usage.block_bytes + p.usage.dense_bytes for p in parts),
    "float16_bytes": sum(p.usage.float16_bytes for p in parts),
    "tokens": sum(p.tokens for p in parts),
    "by_sequence": [round(value, 7) for value in by_sequence],
  }


def change(record: dict[str, Any]) -> str:
  """The perplexity's change in per cent, with its interval, for a table."""
  return (
    f"{100 * (record['ratio'] - 1):+.2f} % "
    f"({100 * (record['ratio_low'] - 1):+.2f} to {100 * (record['ratio_high'] - 1):+.2f})"
  )
