r"""The headline: float weights, int4 weights, and int4 weights with a compressed KV cache.

  python -m experiments.end_to_end                          # half a minute
  python -m experiments.end_to_end \
    --float_model=llama.f16.gguf --int4_model=llama.Q4_K_M.gguf --text=book.txt

On a quiet machine; the processor is named in the record. Three sides:

  float     the float model, its cache dense float16
  int4      the quantised one, its cache dense float16
  int4+KV   the same, its cache in rotated int4 blocks of which --keep stays (union_rank, snapkv)

Memory is what arrays hold: all weights, and the caches of --sequences texts of --ctx tokens. Times
are of single tokens decoded at depth --ctx / 2 (median, 99th percentile), tokens/s of 32 in a row
there (q4jax/engine/bench.py). Perplexity is of the text's second halves, stepped through token by
token over each side's cache.

Expected: memory falls to 0.4 or less, and the cache costs more perplexity than the weights. A model
as small as `tiny` spends a token's time on other things than memory, so that its int4 is hardly
faster, its packed cache slower than a dense one, and nothing of this says how a large one behaves.
"""

import dataclasses
import sys
from typing import Any

import numpy as np

from experiments import inputs, plots, stepping
from experiments.config_flags import option
from experiments.experiment import Claim, command
from q4jax.engine import bench
from q4jax.engine.engine import Engine
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy
from q4jax.kv.protect import Protect
from q4jax.kv.select import UnionRank
from q4jax_kernels.kv_format import KVFormat

Record = dict[str, Any]
SIDES = ("float", "int4", "int4+KV")


@dataclasses.dataclass(frozen=True)
class Config:
  """Three rows."""

  float_model: str = option("tiny_f16", "The float model: what q4jax.load takes, or tiny_f16.")
  int4_model: str = option("tiny", "The quantised model.")
  text: str = option("held_out", "held_out or calibration, a file, or hf://datasets/...")
  keep: float = option(0.6, "Share of the tokens that stays.")
  policy: str = option("snapkv", "What scores tokens.")
  group: int = option(32, "Numbers of the cache that share a scale.")
  sink: int = option(4, "First tokens that stay floats.")
  recent: int = option(32, "Newest tokens that stay floats.")
  ctx: int = option(1024, "Tokens of a sequence.")
  sequences: int = option(8, "Sequences.")
  tokens: int = option(200, "Timed tokens of each side.")


def run(config: Config) -> list[Record]:
  """A record for each side."""
  format = KVFormat(4, config.group)
  kv = KVConfig(
    format, format, rotate=True, policy=get_policy(config.policy),
    select=UnionRank(config.keep, by="rank"), protect=Protect(config.sink, config.recent, 0),
    evict_every=64,
  )  # fmt: skip
  records = []
  for side in SIDES:
    model = inputs.model(config.float_model if side == "float" else config.int4_model)
    used = kv if side == "int4+KV" else None
    sequences = inputs.sequences(model, config.text, config.sequences, config.ctx)
    measured = stepping.measure(model, sequences, used or KVConfig())
    cache = measured["cache_bytes"] if used else measured["float16_bytes"]
    tests = [bench.Test(0, 1, config.ctx // 2), bench.Test(0, 32, config.ctx // 2)]
    engine = Engine(model, kv=used)
    (one,) = bench.bench(engine, tests[:1], config.tokens)
    (many,) = bench.bench(engine, tests[1:], max(3, config.tokens // 32))
    record = {
      "side": side, "weights_bytes": model.nbytes, "cache_bytes": cache,
      "memory_bytes": model.nbytes + cache,
      "median_ms": 1e3 * float(np.median(one.seconds)),
      "p99_ms": 1e3 * float(np.quantile(one.seconds, 0.99)),
      "tokens_per_s": float(np.median(many.rates)),
      "ppl": measured["ppl"] if used else measured["dense_ppl"],
      "kept": measured["keep_ratio"] if used else 1.0,
      "scored": measured["tokens"],
    }  # fmt: skip
    records.append(record)
    print(f"{side}: {record['ppl']:.3f}", file=sys.stderr, flush=True)
  return records


def table(records: list[Record]) -> list[list[str]]:
  """Rows for Markdown; each number with its ratio to the float side's."""
  base = records[0]

  def cell(r: Record, name: str, scale: float, digits: int) -> str:
    return f"{scale * r[name]:.{digits}f} ({r[name] / base[name]:.2f})"

  head = ["", "weights MB", "caches MB", "memory MB", "median ms", "P99 ms", "tok/s", "perplexity"]
  return [head] + [
    [
      r["side"],
      cell(r, "weights_bytes", 1e-6, 2),
      cell(r, "cache_bytes", 1e-6, 2),
      cell(r, "memory_bytes", 1e-6, 2),
      cell(r, "median_ms", 1, 3),
      cell(r, "p99_ms", 1, 3),
      cell(r, "tokens_per_s", 1, 0),
      f"{r['ppl']:.3f} ({100 * (r['ppl'] / base['ppl'] - 1):+.2f} %)",
    ]
    for r in records
  ]


def plot(records: list[Record], path: str) -> None:
  """Four bar charts, a bar for each side."""
  charts = (
    ("memory_bytes", 1e-6, "memory, MB"), ("p99_ms", 1, "P99 latency, ms"),
    ("tokens_per_s", 1, "tokens a second"), ("ppl", 1, "perplexity"),
  )  # fmt: skip
  with plots.figure(path, columns=4, width=3.2) as axes:
    for axis, (name, scale, title) in zip(axes, charts, strict=True):
      bars = axis.bar([r["side"] for r in records], [scale * r[name] for r in records],
                      color=["C7", "C0", "C2"][: len(records)])  # fmt: skip
      axis.bar_label(bars, fmt="%.4g")
      axis.set(title=title)
      axis.margins(y=0.12)


def quick() -> list[Config]:
  """One config: times are compared with those of the same minute."""
  return [Config(ctx=512)]


def full() -> list[Config]:
  """More text."""
  return [Config(sequences=32), Config(keep=1.0, sequences=32)]


def _ratio(name: str) -> Any:
  def measure(records: list[Record]) -> float | None:
    of = {r["side"]: r[name] for r in records}
    return of["int4+KV"] / of["float"]

  return measure


def _perplexity(records: list[Record]) -> float | None:
  found = _ratio("ppl")(records)
  return None if found is None else 100 * (found - 1)


_SMALL = (
  "of a model that fits into the processor's caches, so no evidence for or against a large one"
)
CLAIMS = (
  Claim("memory, int4 + KV at 0.6 over float16", 0.27, "", "weights and caches in arrays, ratio",
        _ratio("memory_bytes"),
        "the shorter the texts, the more of their cache is the float ring and sinks"),
  Claim("P99 latency, the same", 0.44, "", "single decoded tokens, ratio", _ratio("p99_ms"),
        _SMALL),
  Claim("perplexity, the same", 7.5, "% more", "stepping through the compressed cache",
        _perplexity),
  Claim("throughput, the same", 2.3, "x", "one sequence, tokens/s, ratio", _ratio("tokens_per_s"),
        _SMALL),
)  # fmt: skip
VERSION = 1

if __name__ == "__main__":
  command(__name__)
