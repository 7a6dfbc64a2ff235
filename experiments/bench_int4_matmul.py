r"""How fast the int4 matmul is on this machine's CPU, as shares of what the same minute allows.

  python -m experiments.bench_int4_matmul --out=experiments/results/int4_matmul.json
  python -m experiments.bench_int4_matmul --shapes=llama1b.gate --m=1,8,512 --formats=q4_k --reps=20

About 15 minutes with the default flags on two cores. Each row is one product x[M, K] W[N, K]^T:

  ms         median over --reps runs; the implementations take turns, so that a slow second hits all
  GB/s       bytes of the weights read (packed ones, as in the file), per second
  of read    that, divided by a plain sequential read's, probed beside the same runs
  GOPS       2 M N K per second
  of peak    that, divided by the best int8 dot product rate of all threads, probed likewise

Every implementation runs inside one jitted loop over copies of the weight, --rotate_mib of them in
all (at most 256 copies, 16 of XLA's; one where it alone is larger): more than the caches hold, as a
decoded token finds no weight in a cache either. `xla` dequantises to float32 in the program; `f32`
and `bf16` are XLA's own products with float weights, and read 3 to 7 times the bytes of 4-bit ones.
`scalar` is the loop that everyone writes first, one thread, on weights of float scales in groups of
32, and only for small shapes. `ggml` is llama.cpp's kernel for weights that are not repacked, where
--ggml names a build's folder of libggml-cpu.so. The row gemm32 is the 32 x 32 x 32 product of the
reference table, from the caches.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import plots
from experiments.config_flags import option
from experiments.experiment import Claim, command
from experiments.ggml_peer import GgmlMatmul
from q4jax.errors import ConfigError
from q4jax_kernels import ffi, probe
from q4jax_kernels.block_array import ROWS, BlockArray, block_shape
from q4jax_kernels.int4_matmul import int4_matmul

# (N, K): outputs, inputs.
SHAPES = {
  "gemm32": (32, 32),
  "llama1b.q": (2048, 2048),
  "llama1b.kv": (512, 2048),
  "llama1b.gate": (8192, 2048),
  "llama1b.down": (2048, 8192),
  "llama8b.q": (4096, 4096),
  "llama8b.kv": (1024, 4096),
  "llama8b.gate": (14336, 4096),
  "llama8b.down": (4096, 14336),
}
_SCALAR_GROUP = 32
# Multiplications that the scalar loop may do: about a second.
_SCALAR_LIMIT = 1 << 29

# A program holds each copy's product: it must compile in seconds. XLA's paths write the weight out
# as floats or read it as such, so fewer of them fill the caches.
_MOST_COPIES, _MOST_XLA_COPIES = 256, 16
_LONG_S = 0.2
# Bytes of products that a graph of ggml's may hold: it keeps them all.
_GGML_PRODUCTS = 1 << 29


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  shapes: tuple[str, ...] = option(tuple(SHAPES), f"Of {', '.join(SHAPES)}.")
  m: tuple[int, ...] = option((1, 2, 4, 8, 16, 32, 128, 512, 2048), "Rows of x.")
  formats: tuple[str, ...] = option(("q4_k", "q6_k", "q8_0", "q4_0"), "GGUF formats.")
  implementations: tuple[str, ...] = option(
    ("cpu", "xla", "f32", "bf16", "scalar"), "Those of int4_matmul, f32, bf16, and scalar."
  )
  ggml: str = option("", "Folder of llama.cpp's libggml-base.so and libggml-cpu.so; none without.")
  reps: int = option(9, "Timed runs of each row.")
  rotate_mib: int = option(256, "Bytes of the copies of a weight.")
  seconds: float = option(0.02, "About the least time of a run; it repeats the product.")


@dataclasses.dataclass(frozen=True)
class Case:
  """One row to be: `call()` does `count` products and waits for them."""

  implementation: str
  format: str
  nbytes: int
  count: int
  call: Callable[[], Any]


def run(config: Config) -> list[dict[str, Any]]:
  """A record for each shape, M, format and implementation that takes them."""
  if unknown := set(config.shapes) - set(SHAPES):
    raise ConfigError(f"--shapes: {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}.")
  if not ffi.available():
    raise ConfigError(
      "this measures the native library, which is not here; see README.md, Install."
    )
  records = []
  buffer = np.ones(max(config.rotate_mib, 64) << 20, np.uint8)
  for shape in config.shapes:
    for m in (32,) if shape == "gemm32" else config.m:
      cases = _cases(config, shape, m)
      records += _measure(cases, shape, m, config.reps, buffer)
      print(f"{shape} M={m}", file=sys.stderr, flush=True)
      del cases
  return records


def _measure(
  cases: list[Case], shape: str, m: int, reps: int, buffer: np.ndarray
) -> list[dict[str, Any]]:
  threads = probe.threads()
  n, k = SHAPES[shape]
  seconds: list[list[float]] = [[] for _ in cases]
  reads, peaks = [], []
  for _ in range(reps):
    # The first of two runs of a kind is not counted: it follows one of another kind, whose threads
    # may still be spinning (OpenMP's of ggml do, for milliseconds). Long runs outlast that.
    reads.append([probe.read_bandwidth(buffer, threads) for _ in range(3)][-1])
    peaks.append([probe.int8_peak(threads, 0.01) for _ in range(2)][-1])
    for case, taken in zip(cases, seconds, strict=True):
      for _ in range(2):
        begin = time.perf_counter()
        case.call()
        whole = time.perf_counter() - begin
        if whole > _LONG_S:
          break
      taken.append(whole / case.count)
  read, peak = statistics.median(reads), statistics.median(peaks)
  records = []
  for case, taken in zip(cases, seconds, strict=True):
    median = statistics.median(taken)
    record = {"shape": shape, "m": m, "n": n, "k": k, "format": case.format}
    record |= {"implementation": case.implementation, "seconds": median, "nbytes": case.nbytes}
    record |= {"gb_per_s": case.nbytes / median / 1e9, "of_read": case.nbytes / median / read}
    rate = 2 * m * n * k / median
    record |= {"gops": rate / 1e9, "of_peak": rate / peak, "threads": threads}
    records.append(record | {"read_gb_per_s": read / 1e9, "peak_gops": peak / 1e9})
  return records


def _cases(config: Config, shape: str, m: int) -> list[Case]:
  n, k = SHAPES[shape]
  rng = np.random.default_rng(0)
  x = rng.standard_normal((m, k), np.float32)
  budget = 0 if shape == "gemm32" else config.rotate_mib << 20
  cases: list[Case] = []
  make: Callable[[int], Any]
  for name in config.implementations:
    if name == "scalar":
      if m * n * k <= _SCALAR_LIMIT:
        cases.append(_scalar(x, n, rng, config.seconds))
    elif name in ("f32", "bf16"):
      dtype = jnp.dtype({"f32": jnp.float32, "bf16": jnp.bfloat16}[name])
      make = _float_weights(n, k, dtype)
      cases.append(_looped(name, name, x, make, n * k * dtype.itemsize, budget, config.seconds))
    else:
      for format in config.formats:
        if k % block_shape(format)[0] == 0:
          make, nbytes = _quantised(name, format, n, k)
          cases.append(_looped(name, format, x, make, nbytes, budget, config.seconds))
  if config.ggml:
    formats = [f for f in config.formats if k % block_shape(f)[0] == 0]
    cases += [_ggml(config, format, x, n, budget) for format in formats]
  return cases


def _ggml(config: Config, format: str, x: np.ndarray, n: int, budget: int) -> Case:
  """As `_looped`, with fewer copies where the products would fill the memory."""
  (m, k), (block, block_bytes) = x.shape, block_shape(format)
  width = k // block * block_bytes
  # Its graph is computed once a call, so that copies share the call's cost, in a cache or not.
  most = budget // (n * width) if budget else _MOST_COPIES
  most = max(1, min(_MOST_COPIES, most, _GGML_PRODUCTS // (4 * m * n)))
  rng = np.random.default_rng(0)
  weights = [rng.integers(0, 256, (n, width), np.uint8) for _ in range(most)]
  peer = GgmlMatmul(Path(config.ggml), format, weights, x, probe.threads())
  peer()
  return Case("ggml", format, n * width, most, peer)


def _quantised(name: str, format: str, n: int, k: int) -> tuple[Callable[[int], BlockArray], int]:
  block, block_bytes = block_shape(format)
  native = name.startswith("cpu")
  rows = -(-n // ROWS) if native else n
  width = k // block * block_bytes * (ROWS if native else 1)

  def make(seed: int) -> BlockArray:
    # Random bits, scales and all: no instruction of the kernels takes longer for some values, as no
    # float16 is subnormal as a float32.
    data = np.random.default_rng(seed).integers(0, 256, (rows, width), np.uint8)
    return BlockArray(jnp.asarray(data), format, n, "x16" if native else "rows")

  return make, rows * width


def _float_weights(n: int, k: int, dtype: jnp.dtype) -> Callable[[int], jax.Array]:
  def make(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (n, k), dtype)

  return make


def _looped(
  name: str,
  format: str,
  x: np.ndarray,
  make: Callable[[int], Any],
  nbytes: int,
  budget: int,
  seconds: float,
) -> Case:
  """Products with each of the copies in turn, all in one program."""
  most = _MOST_COPIES if name.startswith("cpu") else _MOST_XLA_COPIES
  weights = [make(seed) for seed in range(max(1, min(most, budget // nbytes)))]

  def product(x: jax.Array, w: Any) -> jax.Array:
    if isinstance(w, BlockArray):
      return int4_matmul(x, [w], implementation=name)[0]
    return jax.lax.dot_general(
      x.astype(w.dtype), w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )

  @jax.jit
  def loop(x: jax.Array, weights: list[Any], rounds: jax.Array) -> jax.Array:
    def one(_: jax.Array, x: jax.Array) -> jax.Array:
      for w in weights:
        # The next product waits for this one, and XLA cannot tell that x stays what it is.
        y = product(x, w)
        x = x.at[0, 0].add(jnp.where(jnp.isnan(y[0, 0]), 1e-30, 0.0))
      return x

    return jax.lax.fori_loop(0, rounds, one, x)

  on_device = jnp.asarray(x)

  def call(rounds: int) -> None:
    jax.block_until_ready(loop(on_device, weights, jnp.int32(rounds)))

  call(1)  # It compiles.
  rounds = _rounds(call, seconds)
  return Case(name, format, nbytes, rounds * len(weights), lambda: call(rounds))


def _rounds(call: Callable[[int], None], seconds: float) -> int:
  """How often to repeat what `call(rounds)` does for it to take `seconds`.

  It grows from one: a short product's first run is mostly the cost of the call around it.
  """
  rounds = 1
  while True:
    begin = time.perf_counter()
    call(rounds)
    taken = time.perf_counter() - begin
    if taken >= seconds / 2:
      return max(1, round(rounds * seconds / taken))
    rounds *= min(10, max(2, int(seconds / max(taken, 1e-6))))


def _scalar(x: np.ndarray, n: int, rng: np.random.Generator, seconds: float) -> Case:
  k = x.shape[1]
  packed = rng.integers(0, 256, (n, k // 2), np.uint8)
  scale = rng.random((n, k // _SCALAR_GROUP), np.float32)
  arguments = (x, packed, scale, 7.5 * scale)

  def call(count: int) -> None:
    for _ in range(count):
      probe.scalar_matmul(*arguments)

  count = _rounds(call, seconds)
  nbytes = packed.nbytes + 2 * scale.nbytes
  return Case("scalar", f"g{_SCALAR_GROUP}", nbytes, count, lambda: call(count))


def table(records: list[dict[str, Any]]) -> list[list[str]]:
  """Rows for people."""
  rows = [["shape", "M", "format", "implementation", "ms", "GB/s", "of read", "GOPS", "of peak"]]
  for r in records:
    left = [r["shape"], str(r["m"]), r["format"], r["implementation"], f"{1e3 * r['seconds']:.4f}"]
    share = f"{r['of_read']:.0%}" if r["shape"] != "gemm32" else "-"
    rows.append([*left, f"{r['gb_per_s']:.1f}", share, f"{r['gops']:.1f}", f"{r['of_peak']:.1%}"])
  return rows


# A line's style says what computes, its colour what is computed with.
_STYLES = {"cpu": "o-", "ggml": "s:", "xla": "v--", "f32": "x-", "bf16": "x-", "scalar": "x-"}


def plot(records: list[dict[str, Any]], path: str) -> None:
  """Achieved GOPS against M, a panel for each shape of a model, with the int8 peak."""
  shapes = list(dict.fromkeys(r["shape"] for r in records if r["shape"] != "gemm32"))
  formats = list(dict.fromkeys(r["format"] for r in records))
  with plots.figure(path, max(1, len(shapes)), width=5) as every:
    for axes, shape in zip(every, shapes, strict=False):
      mine = [r for r in records if r["shape"] == shape]
      for line in dict.fromkeys((r["implementation"], r["format"]) for r in mine):
        points = [r for r in mine if (r["implementation"], r["format"]) == line]
        style = {"label": " ".join(dict.fromkeys(line)), "color": f"C{formats.index(line[1])}"}
        x, y = ([r[name] for r in points] for name in ("m", "gops"))
        axes.loglog(x, y, _STYLES.get(line[0], "o--"), markersize=4, **style)
      peak = statistics.median(r["peak_gops"] for r in mine)
      axes.axhline(peak, color="black", linestyle="--", label="int8 peak")
      axes.set(title=f"{shape} {mine[0]['n']} x {mine[0]['k']}", xlabel="M", ylabel="GOPS")
    if shapes:
      every[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1))


def _gemm32(records: list[dict[str, Any]], implementation: str) -> float | None:
  """Milliseconds of the 32 x 32 x 32 product."""
  mine = [r for r in records if (r["shape"], r["implementation"]) == ("gemm32", implementation)]
  return 1e3 * min(r["seconds"] for r in mine) if mine else None


def _speedup(records: list[dict[str, Any]]) -> float | None:
  loop, simd = (_gemm32(records, name) for name in ("scalar", "cpu"))
  return None if loop is None or simd is None else loop / simd


_HOW = "32 x 32 x 32, weights in the caches"
CLAIMS = (
  Claim("int4 GEMM 32x32, a loop", 1.82, "ms", f"{_HOW}, one thread",
        lambda records: _gemm32(records, "scalar"),
        "33 thousand products in 1.82 ms are 18 a microsecond: a loop of compiled C++ is faster"),
  Claim("int4 GEMM 32x32, SIMD", 0.29, "ms", f"{_HOW}, in a jitted loop",
        lambda records: _gemm32(records, "cpu")),
  Claim("int4 GEMM 32x32, SIMD over a loop", 6.3, "x", "the two above", _speedup),
)  # fmt: skip
VERSION = 2


def quick() -> list[Config]:
  """The product of the reference table, and one matrix of a 1B model."""
  return [
    Config(
      shapes=("gemm32", "llama1b.gate"), m=(1, 8, 512), formats=("q4_k", "q4_0"), reps=3,
      implementations=("cpu", "xla", "f32", "scalar"),
    )
  ]  # fmt: skip


def full() -> list[Config]:
  """Everything."""
  return [Config()]


if __name__ == "__main__":
  command(__name__)
