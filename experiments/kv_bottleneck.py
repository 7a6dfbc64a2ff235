r"""What a decoded token waits for as its text grows: latency, bandwidth, cache hits, a roofline.

  python -m experiments.kv_bottleneck                                   # 30 s
  python -m experiments.kv_bottleneck --model=1b.Q4_K_M.gguf --lengths=512,2048,8192

On a quiet machine; the processor is named in the record. For each length and cache, single tokens
are decoded after so many, one by one (q4jax/engine/bench.py), and timed: median and 99th
percentile. A token must read all weights and its keys and values once; so many bytes over the time
is the bandwidth, and over what the same machine reads plainly (measured beside) the roofline. Hits
of the last-level cache are counted by `perf` where the processor's counters are to be had; virtual
machines often hide them, and then the table says so.

Expected: the weights weigh more than a short text's keys and values, so the curve is flat; int4
flattens it further. `tiny` fits into caches whole, so that its roofline is of a memory that it need
not read.
"""

import dataclasses
import sys
from typing import Any

import numpy as np

from experiments import inputs, plots
from experiments.config_flags import option
from experiments.counters import counting
from experiments.experiment import Claim, command
from q4jax.engine import bench
from q4jax.engine.engine import Engine
from q4jax.errors import ConfigError
from q4jax.kv.config import KVConfig
from q4jax.kv.protect import Protect
from q4jax.model.model import Model
from q4jax_kernels import probe
from q4jax_kernels.kv_format import KVFormat

Record = dict[str, Any]
CACHES = ("float16", "int4")


@dataclasses.dataclass(frozen=True)
class Config:
  """A row for each cache and length."""

  model: str = option("tiny", "A model that q4jax.load takes, or tiny_f16.")
  lengths: tuple[int, ...] = option((256, 512, 1024), "Tokens in the cache.")
  caches: tuple[str, ...] = option(CACHES, "float16 (dense), int4 (rotated blocks).")
  group: int = option(32, "Numbers that share a scale in int4.")
  tokens: int = option(200, "Timed tokens of each row; 99% of them are as fast as the P99.")
  probe_mib: int = option(256, "Bytes of a plain read, for the roofline.")


def run(config: Config) -> list[Record]:
  """A record for each row of the table."""
  wrong = set(config.caches) - set(CACHES)
  if wrong:
    raise ConfigError(f"--caches: '{wrong.pop()}' is none of {', '.join(CACHES)}.")
  model = inputs.model(config.model)
  format = KVFormat(4, config.group)
  int4 = KVConfig(format, format, rotate=True, protect=Protect(4, 32, 0))
  buffer = np.ones(config.probe_mib << 20, np.uint8)
  records = []
  for cache in config.caches:
    kv = int4 if cache == "int4" else None
    engine = Engine(model, kv=kv)
    for length in config.lengths:
      plain = max(probe.read_bandwidth(buffer, probe.threads()) for _ in range(3))
      test = bench.Test(0, 1, length)
      with counting() as counts:
        (result,) = bench.bench(engine, [test], config.tokens)
      seconds = np.array(result.seconds)
      nbytes = model.nbytes + length * kv_bytes(model, kv)
      median = float(np.median(seconds))
      record = {
        "cache": cache, "length": length, "tokens": len(seconds),
        "median_ms": 1e3 * median, "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
        "bytes": nbytes, "kv_share": 1 - model.nbytes / nbytes,
        "gb_per_s": nbytes / median / 1e9, "plain_gb_per_s": plain / 1e9,
        "roofline_ms": 1e3 * nbytes / plain,
        "llc_hits": counts.hit_rate, "llc_why_not": counts.reason,
      }  # fmt: skip
      records.append(record)
      print(f"{cache} {length}: {1e3 * median:.2f} ms", file=sys.stderr, flush=True)
  return records


def kv_bytes(model: Model, kv: KVConfig | None) -> float:
  """Bytes of a token's keys and values in all layers."""
  bits = 16 if kv is None else kv.bits_per_value(model.config.head_dim)
  return model.config.kv_bytes_per_token * bits / 16


def table(records: list[Record]) -> list[list[str]]:
  """Rows for Markdown."""
  head = ["cache", "length", "median ms", "P99 ms", "MB read", "of them KV", "GB/s",
          "plain read GB/s", "roofline ms", "LLC hits"]  # fmt: skip
  return [head] + [
    [
      r["cache"],
      str(r["length"]),
      f"{r['median_ms']:.3f}",
      f"{r['p99_ms']:.3f}",
      f"{r['bytes'] / 1e6:.2f}",
      f"{100 * r['kv_share']:.0f} %",
      f"{r['gb_per_s']:.2f}",
      f"{r['plain_gb_per_s']:.1f}",
      f"{r['roofline_ms']:.3f}",
      r["llc_why_not"] if r["llc_hits"] is None else f"{100 * r['llc_hits']:.1f} %",
    ]
    for r in records
  ]


def plot(records: list[Record], path: str) -> None:
  """Latencies beside the roofline, and bandwidths, against the length."""
  with plots.figure(path, columns=2) as (left, right):
    for i, cache in enumerate(dict.fromkeys(r["cache"] for r in records)):
      mine = sorted((r for r in records if r["cache"] == cache), key=lambda r: r["length"])
      x, color = [r["length"] for r in mine], f"C{i}"
      left.plot(x, [r["median_ms"] for r in mine], "o-", color=color, label=f"{cache}, median")
      left.plot(x, [r["p99_ms"] for r in mine], "^--", color=color, label=f"{cache}, P99")
      left.plot(x, [r["roofline_ms"] for r in mine], ":", color=color, label=f"{cache}, roofline")
      right.plot(x, [r["gb_per_s"] for r in mine], "o-", color=color, label=cache)
    plain = [r["plain_gb_per_s"] for r in records]
    right.axhline(float(np.median(plain)), color="grey", ls=":", label="plain read")
    top = 1.4 * max(r["p99_ms"] for r in records)  # room for the legend
    left.set(xlabel="tokens in the cache", ylabel="ms a token", ylim=(0, top))
    right.set(xlabel="tokens in the cache", ylabel="bytes that must be read, GB/s", ylim=(0, None))
    for axis in (left, right):
      axis.grid(alpha=0.3)
      axis.legend(fontsize="small", ncols=2)


def quick() -> list[Config]:
  """All six rows in one config: times are compared with those of the same minute."""
  return [Config()]


def full() -> list[Config]:
  """More tokens and lengths."""
  return [Config(lengths=(256, 512, 1024, 2000), tokens=2000)]


def _of(length: int, name: str) -> Any:
  def measure(records: list[Record]) -> float | None:
    found = [r[name] for r in records if (r["cache"], r["length"]) == ("int4", length)]
    return found[0] if found and found[0] is not None else None

  return measure


def _hits(length: int) -> Any:
  def measure(records: list[Record]) -> float | None:
    found = _of(length, "llc_hits")(records)
    return None if found is None else 100 * found

  return measure


CLAIMS = tuple(
  claim
  for length, bandwidth, hits, p99 in (
    (256, 824, 84, 12), (512, 1517, 70, 29), (1024, 1842, 62, 76),
  )
  for claim in (
    Claim(f"bandwidth at length {length}", bandwidth, "GB/s", "bytes that must be read over time",
          _of(length, "gb_per_s"), "another kind of machine, with another memory"),
    Claim(f"LLC hits at length {length}", hits, "%", "perf stat", _hits(length)),
    Claim(f"P99 at length {length}", p99, "ms", "single decoded tokens, int4 cache",
          _of(length, "p99_ms"), "another model; the claimed curve grows 6.3x from 256 to 1024"),
  )
)  # fmt: skip
VERSION = 1

if __name__ == "__main__":
  command(__name__)
