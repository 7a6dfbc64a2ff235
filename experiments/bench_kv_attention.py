r"""Attention of one decoded token over a cache of one layer: packed blocks beside float caches.

  python -m experiments.bench_kv_attention --out=experiments/results/kv_attention.json
  python -m experiments.bench_kv_attention --shape=8b --slots=8192 --reps=40

Each row takes turns with the others in every repetition, medians over --reps; --layers caches of
each kind are gone through in one program, as a model does, so that none waits in a processor's
cache unless it would there too. Every timed run follows one of its own kind that is not timed, as
token follows token; and XLA's, whose half a second makes what follows slower, come after all.
Blocks are scattered. GB/s counts the bytes of the cache that are read; "of read" is the share of a
plain sequential read by the same threads. `dense float16` is what an engine without compression
runs; `bfloat16 (XLA)` is jax.numpy over a bfloat16 cache.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import plots
from experiments.config_flags import option
from experiments.experiment import Claim, command
from q4jax.errors import ConfigError
from q4jax_kernels import ffi, probe
from q4jax_kernels.attention import cached_attention
from q4jax_kernels.kv_format import KVFormat
from q4jax_kernels.kv_pages import Pages, write
from q4jax_kernels.paged_attention import Paged, decode_attention

# Query heads, KV heads, head_dim.
SHAPES = {"1b": (32, 8, 64), "8b": (32, 8, 128)}
FORMATS = {
  "int4 g32": KVFormat(4, 32),
  "int4 g64": KVFormat(4, 64),
  "int4 g32 symmetric": KVFormat(4, 32, symmetric=True),
  "int8 g32": KVFormat(8, 32),
  "float16 blocks": KVFormat(16),
}
SINK, RECENT, BLOCK = 4, 64, 32
XLA = "bfloat16 (XLA)"


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  shape: str = option("1b", f"Heads of {' or '.join(SHAPES)}.")
  slots: tuple[int, ...] = option((1024, 4096, 8192), "Tokens in the cache.")
  layers: int = option(16, "Caches that are gone through in turn.")
  reps: int = option(25, "Timed runs of each row.")
  seed: int = option(0, "Of the contents.")


def run(config: Config) -> list[dict[str, Any]]:
  """A record for each number of slots and kind of cache."""
  if config.shape not in SHAPES or any(s < BLOCK or s % BLOCK for s in config.slots):
    raise ConfigError(f"--shape is one of {', '.join(SHAPES)}, --slots multiples of {BLOCK}.")
  if not ffi.available():
    raise ConfigError(
      "this measures the native library, which is not here; see README.md, Install."
    )
  buffer = np.ones(256 << 20, np.uint8)
  return [r for slots in config.slots for r in _measure(config, slots, buffer)]


def _measure(config: Config, slots: int, buffer: np.ndarray) -> list[dict[str, Any]]:
  cases = {name: _packed(config, slots, format) for name, format in FORMATS.items()}
  cases["dense float16"] = _dense(config, slots, jnp.dtype(jnp.float16))
  cases[XLA] = _dense(config, slots, jnp.dtype(jnp.bfloat16))
  seconds: dict[str, list[float]] = {name: [] for name in cases}
  reads = []
  names = [name for name in cases if name != XLA]
  for rep in range(config.reps):
    reads.append(probe.read_bandwidth(buffer, probe.threads()))
    for name in names[rep % len(names) :] + names[: rep % len(names)]:  # none is always the first
      seconds[name].append(_timed(cases[name][0]) / config.layers)
  seconds[XLA] = [_timed(cases[XLA][0]) / config.layers for _ in range(min(5, config.reps))]
  read = statistics.median(reads)
  dense = statistics.median(seconds["dense float16"])
  records = []
  for name, (_, nbytes) in cases.items():
    median = statistics.median(seconds[name])
    record = {"slots": slots, "cache": name, "seconds": median, "nbytes": nbytes}
    record |= {"gb_per_s": nbytes / median / 1e9, "of_read": nbytes / median / read}
    records.append(record | {"speedup": dense / median, "read_gb_per_s": read / 1e9})
  return records


def _timed(call: Callable[[], None]) -> float:
  """Seconds of a call that follows one like it."""
  call()
  begin = time.perf_counter()
  call()
  return time.perf_counter() - begin


def _query(config: Config) -> tuple[jax.Array, jax.Array]:
  n, kv_heads, h = SHAPES[config.shape]
  rng = np.random.default_rng(config.seed)
  q = rng.standard_normal((1, 1, n, h), np.float32)
  return jnp.asarray(q), jnp.asarray(rng.standard_normal((1, 1, kv_heads, h), np.float32))


def _packed(config: Config, slots: int, format: KVFormat) -> tuple[Callable[[], None], int]:
  """The call over all layers, and the bytes of one layer's blocks."""
  _, kv_heads, h = SHAPES[config.shape]
  layers, blocks = config.layers, slots // BLOCK
  rng = np.random.default_rng(config.seed)
  total = layers * blocks + 1
  table = 1 + rng.permutation(layers * blocks).reshape(layers, 1, blocks)
  fill = jax.jit(write, donate_argnums=0)
  sides = []
  for kind in ("key", "value"):
    pages = Pages.zeros(total, kv_heads, h, format, kind=kind, layout="x16", block_size=BLOCK)
    for ids in np.split(np.arange(1, total, dtype=np.int32), layers):
      x = rng.standard_normal((blocks, kv_heads, BLOCK, h), np.float32)
      pages = fill(pages, jnp.asarray(ids), jnp.asarray(x))
    sides.append(pages)
  pos = np.full((total, BLOCK), -1, np.int32)
  pos[table.reshape(layers, -1)] = SINK + np.arange(slots).reshape(blocks, BLOCK)
  ring = jnp.zeros((layers, 1, kv_heads, SINK + RECENT + BLOCK, h), jnp.float16)
  cache = Paged(
    ring,
    ring + 0,
    sides[0],
    sides[1],
    jnp.asarray(pos),
    jnp.asarray(table, jnp.int32),
    jnp.full((layers, 1), blocks, jnp.int32),
    SINK,
    RECENT,
  )
  q, new = _query(config)
  length, spilled, active = (
    jnp.array([SINK + slots + RECENT]),
    jnp.array([slots]),
    jnp.ones(1, bool),
  )

  def step(cache: Paged) -> tuple[jax.Array, Paged]:
    out = q
    for layer in range(layers):
      out, cache, _ = decode_attention(
        out, new, new, cache, length, spilled, active, layer, scores=False
      )
    return out, cache

  nbytes = sum(side.nbytes for side in sides) // total * blocks
  return _repeated(step, cache), nbytes


def _dense(config: Config, slots: int, dtype: jnp.dtype) -> tuple[Callable[[], None], int]:
  _, kv_heads, h = SHAPES[config.shape]
  q, new = _query(config)
  shape = (config.layers, 1, kv_heads, slots + SINK + RECENT + BLOCK, h)
  keys = [jax.random.normal(jax.random.key(config.seed + i), shape, dtype) for i in range(2)]
  start, one = jnp.array([slots + SINK + RECENT]), jnp.ones(1, jnp.int32)

  def step(cache: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    out = q
    for layer in range(config.layers):
      out, cache = cached_attention(out, new, new, cache, start, one, layer)
    return out, cache

  nbytes = 2 * kv_heads * (slots + SINK + RECENT) * h * dtype.itemsize
  return _repeated(step, (keys[0], keys[1])), nbytes


def _repeated(step: Callable, cache: Any) -> Callable[[], None]:
  """Each call runs `step` on what the one before left."""
  run, held = jax.jit(step, donate_argnums=0), [cache]

  def call() -> None:
    out, held[0] = run(held[0])
    jax.block_until_ready(out)

  call()
  return call


def table(records: list[dict[str, Any]]) -> list[list[str]]:
  """Rows for people."""
  rows = [["slots", "cache", "ms a layer", "of dense float16's speed", "GB/s", "of read"]]
  for r in records:
    speed = [f"{1e3 * r['seconds']:.3f}", f"{r['speedup']:.2f}"]
    rows.append(
      [str(r["slots"]), r["cache"], *speed, f"{r['gb_per_s']:.1f}", f"{r['of_read']:.0%}"]
    )
  return rows


def plot(records: list[dict[str, Any]], path: str) -> None:
  """Speed against that of the dense float16 cache, a bar for each kind, a panel for each length."""
  lengths = sorted({r["slots"] for r in records})
  with plots.figure(path, len(lengths), width=4.5) as every:
    for axes, slots in zip(every, lengths, strict=True):
      mine = [r for r in records if r["slots"] == slots]
      axes.barh([r["cache"] for r in mine], [r["speedup"] for r in mine])
      axes.axvline(1, color="grey", lw=0.8)
      axes.set(title=f"{slots} tokens", xlabel="speed, dense float16 = 1")
      axes.invert_yaxis()


CLAIMS: tuple[Claim, ...] = ()
VERSION = 1


def quick() -> list[Config]:
  """One length, four layers."""
  return [Config(slots=(4096,), layers=4, reps=5)]


def full() -> list[Config]:
  """Three lengths, all layers."""
  return [Config()]


if __name__ == "__main__":
  command(__name__)
