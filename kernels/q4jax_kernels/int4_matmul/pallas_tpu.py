"""The TPU kernel (Pallas, Mosaic): packed planes stream from HBM and are unpacked in VMEM.

The grid runs over tiles of the result and, innermost, over K; Pallas double-buffers the tiles. A
tile is taken in chunks of K, of 256 inputs (or one group of 128), in one of two ways:

  sums     codes are multiplied as they are, exactly, and each group's sum is scaled. x is repeated
           once per group of the chunk, each copy zero outside its group, so that one product gives
           all the groups' sums. For few rows, where a matrix unit idles while weights arrive, and
           where a group fills the chunk.
  weights  w = scale * (code - offset) - minimum in float32, rounded to bfloat16. For the rest.

x is rounded to bfloat16; products accumulate in float32. A NaN or infinity in a row of x makes the
whole row of the result NaN or infinite.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from q4jax_kernels.int4_matmul.pallas_tpu_chunk import (
  CHUNK,
  Law,
  reorder,
  scaled_sums,
  scaled_weights,
  scales,
  unpack,
)
from q4jax_kernels.planar_array import PlanarArray

BITS = ((4,), (4, 1), (4, 2), (8,))
GROUP_SIZES = (8, 16, 32, 64, 128, 256)  # besides one group for all of K
_LANES = 128
_SUBLANES = {4: 8, 1: 32}  # rows of a tile of the memory, by the bytes of a value
_VMEM_BUDGET = 24 << 20  # for tiles; v5e and later have 128 MiB
_VMEM_LIMIT = 32 << 20  # with what the compiler adds


@dataclasses.dataclass(frozen=True)
class Config:
  """The tile of one grid step: block_m rows, block_n outputs, block_k inputs."""

  block_m: int
  block_n: int
  block_k: int

  @classmethod
  def choose(cls, m: int, w: PlanarArray, itemsize: int) -> "Config":
    """Tiles for x [m, K], the weight and a result of `itemsize` bytes, within the VMEM budget.

    A tile of K is 2048: eight super-blocks of a k-quant, a whole tile of their scales. With 1024
    outputs, a step for few rows brings 1 MiB of 4-bit weights, which hides its overhead and leaves
    little to wait for at the start. Many rows are as many as can be, since each pass unpacks anew.
    """
    n, k = w.shape
    block_m, block_k = min(_padded_rows(m), 512), min(_round_up(k, CHUNK), 2048)
    config = cls(block_m, min(_round_up(n, _LANES), 1024), block_k)
    while config.vmem_bytes(w, itemsize) > _VMEM_BUDGET:
      if config.block_n == _LANES:
        raise NotImplementedError(f"{config} takes more than {_VMEM_BUDGET} bytes of VMEM.")
      config = dataclasses.replace(config, block_n=_round_up(config.block_n // 2, _LANES))
    return config

  def vmem_bytes(self, w: PlanarArray, itemsize: int) -> int:
    """Bytes of all tiles, two of each that is streamed, and of a chunk's weights and sums."""
    law, parts = Law.of(w), _parts(w)
    m, n = max(self.block_m, 8), self.block_n
    weights = sum(_tile_rows(a, law.k, self.block_k) * a.dtype.itemsize for a in _arrays(parts))
    streamed = n * weights + 2 * m * self.block_k + m * n * itemsize
    groups = (1 if w.minimum is None else 2) * self.block_k // law.group
    sums = m * law.groups if law.on_sums(self.block_m) else m
    return 2 * streamed + 4 * n * (m + groups + sums + law.chunk)


class _Parts(NamedTuple):
  """What a PlanarArray holds: arrays, or their block specs, or a kernel's refs."""

  planes: tuple[Any, ...]  # [block_k * bits / 8, block_n] uint8
  scale: Any  # [block_k / group_size (two levels: 256), block_n] float32; [1, block_n]: all of K
  scale_code: Any  # [block_k / group_size, block_n] uint8 or int8, or None
  minimum: Any  # as scale, or None
  minimum_code: Any  # as scale_code, or None


def supports(w: PlanarArray) -> bool:
  """Whether the kernel takes these planes and groups."""
  return tuple(w.bits) in BITS and (w.group_size in GROUP_SIZES or w.group_size == w.shape[1])


def int4_matmul(
  x: jax.Array,
  ws: Sequence[PlanarArray],
  config: Config | None = None,
  interpret: Any = False,
) -> list[jax.Array]:
  """x float[M, K], rounded to bfloat16, times each weight's transpose: [M, N_i] in x's dtype.

  Args:
    x: float[M, K].
    ws: matrices [N_i, K].
    config: the tiles; by default what `Config.choose` says of each weight.
    interpret: as of `pl.pallas_call`: True or `pltpu.InterpretParams` runs on any device.

  Raises:
    NotImplementedError: a weight that `supports` refuses, or tiles that do not fit.
  """
  m = x.shape[0]
  if m == 0:
    return [jnp.zeros((0, w.shape[0]), x.dtype) for w in ws]
  padded = jnp.pad(x.astype(jnp.bfloat16), ((0, _padded_rows(m) - m), (0, 0)))
  return [_matmul(padded, w, x.dtype, config, interpret)[:m] for w in ws]


def _matmul(
  x: jax.Array, w: PlanarArray, dtype: jnp.dtype, config: Config | None, interpret: Any
) -> jax.Array:
  if not supports(w):
    raise NotImplementedError(
      f"The TPU kernel takes planes of {BITS} bits in groups of {GROUP_SIZES} or K; got planes of "
      f"{w.bits} bits in groups of {w.group_size} with K = {w.shape[1]}."
    )
  (m, k), n, law, parts = x.shape, w.shape[0], Law.of(w), _parts(w)
  config = config or Config.choose(m, w, dtype.itemsize)
  _check(config, m, parts, law)
  block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
  x = reorder(jnp.pad(x, ((0, 0), (0, -k % block_k))), law)
  grid = (pl.cdiv(m, block_m), pl.cdiv(n, block_n), x.shape[1] // block_k)

  def tile(a: jax.Array) -> pl.BlockSpec:
    # What holds for all of K is the same tile at every step.
    at: Callable = (lambda i, j, l: (0, j)) if a.shape[0] == 1 else (lambda i, j, l: (l, j))
    return pl.BlockSpec((_tile_rows(a, k, block_k), block_n), at)

  groups = pltpu.VMEM((block_k // law.chunk, law.groups, block_n), jnp.float32)
  weight_bytes = sum(a.size * a.dtype.itemsize for a in _arrays(parts))
  call = pl.pallas_call(
    partial(_kernel, law=law),
    out_shape=jax.ShapeDtypeStruct((m, n), dtype),
    grid=grid,
    in_specs=[
      pl.BlockSpec((block_m, block_k), lambda i, j, l: (i, l)),
      jax.tree.map(tile, parts),
    ],
    out_specs=pl.BlockSpec((block_m, block_n), lambda i, j, l: (i, j)),
    scratch_shapes=[
      pltpu.VMEM((block_m, block_n), jnp.float32),
      groups,
      None if w.minimum is None else groups,
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * n * k,
      bytes_accessed=weight_bytes * grid[0] + 2 * m * k * grid[1] + m * n * dtype.itemsize,
      transcendentals=0,
    ),
    interpret=interpret,
    name="int4_matmul",
  )
  return call(x, parts)


def _check(config: Config, m: int, parts: _Parts, law: Law) -> None:
  """Raises NotImplementedError where a tile would not lie on the memory's own tiles."""
  bm, bn, bk = config.block_m, config.block_n, config.block_k
  whole = bk % CHUNK == 0 and bn % _LANES == 0 and (bm % 16 == 0 or bm == m)
  if bk < law.k:
    rows = [(bk * a.shape[0] / law.k, a) for a in _arrays(parts) if a.shape[0] > 1]
    whole &= all(n % _SUBLANES[a.dtype.itemsize] == 0 for n, a in rows)
  if not whole:
    raise NotImplementedError(
      f"{config} cuts a tile of the memory: block_m must be a multiple of 16, or M = {m}; block_n "
      f"of {_LANES}; block_k of {CHUNK}, of 8 scales and of 32 scale codes."
    )


def _kernel(
  x_ref: Any,  # [block_m, block_k] bfloat16, each chunk's columns reordered
  w: _Parts,  # of refs
  y_ref: Any,  # [block_m, block_n]
  sum_ref: Any,  # [block_m, block_n] float32
  scale_ref: Any,  # [chunks, groups of a chunk, block_n] float32
  minimum_ref: Any,  # as scale_ref, or None
  *,
  law: Law,
) -> None:
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _() -> None:
    sum_ref[...] = jnp.zeros_like(sum_ref)

  scales(w.scale, w.scale_code, law, step, scale_ref)
  if minimum_ref is not None:
    scales(w.minimum, w.minimum_code, law, step, minimum_ref)
  product = scaled_sums if law.on_sums(x_ref.shape[0]) else scaled_weights

  @pl.loop(0, x_ref.shape[1] // law.chunk)
  def _(c: jax.Array) -> None:
    x = x_ref[:, pl.ds(pl.multiple_of(c * law.chunk, law.chunk), law.chunk)]
    minimum = None if minimum_ref is None else minimum_ref[c]
    codes, bias = unpack(w.planes, law, c)
    sum_ref[...] += product(x, codes, bias + law.offset, scale_ref[c], minimum)

  @pl.when(step == pl.num_programs(2) - 1)
  def _() -> None:
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _parts(w: PlanarArray) -> _Parts:
  return _Parts(tuple(w.planes), w.scale, w.scale_code, w.minimum, w.minimum_code)


def _arrays(parts: _Parts) -> list[jax.Array]:
  return jax.tree.leaves(parts)


def _tile_rows(a: jax.Array, k: int, block_k: int) -> int:
  """Rows of a part of a weight of k inputs that belong to block_k of them, in whole tiles."""
  if a.shape[0] == 1:
    return 1
  return _round_up(block_k * a.shape[0] // k, _SUBLANES[a.dtype.itemsize])


def _padded_rows(m: int) -> int:
  """M, or the whole tiles that hold it: of float32 for up to 8 rows, of bfloat16 for more."""
  return m if m == 1 else _round_up(m, 8 if m <= 8 else 16)


def _round_up(x: int, to: int) -> int:
  return -(-x // to) * to
