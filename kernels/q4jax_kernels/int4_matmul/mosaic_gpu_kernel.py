"""The Hopper kernel's body: a warp-specialised pipeline over K. See mosaic_gpu.py for the plan.

In the lane semantics of Mosaic GPU, where layouts are ours to name: int4 is read 32 bits a thread
(WGMMA_UPCAST_4X) and two warp shuffles a word bring it to the layout of `wgmma`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from q4jax_kernels.row_planar_array import CHUNK, RowPlanarArray

WARPGROUP_ROWS = 64  # rows of W in a `wgmma`
_SLICE = 64  # columns of W unpacked for one product, at most
_BATCH_REGISTERS = 48  # of a thread, for products in flight: more, and ptxas serialises them

_LAYOUT, _TRANSPOSED = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED
_EACH_ROW, _EACH_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
# How to read codes of so many bits for that layout.
_READ = {4: plgpu.Layout.WGMMA_UPCAST_4X, 8: plgpu.Layout.WGMMA_UPCAST_2X}


@dataclasses.dataclass(frozen=True)
class Config:
  """How the work is cut.

  Attributes:
    block_m: rows of x a thread block takes: 8, 16, 32, 64, 128 or 256.
    warpgroups: compute warpgroups, each with 64 outputs.
    block_k: inputs of a pipeline step.
    splits: parts of K that different thread blocks sum.
    stages: steps whose tiles are in flight.
    on_sums: whether sums are scaled rather than weights.
  """

  block_m: int
  warpgroups: int
  block_k: int
  splits: int
  stages: int
  on_sums: bool

  @property
  def block_n(self) -> int:
    """Outputs of a thread block."""
    return WARPGROUP_ROWS * self.warpgroups


class _Tiles(NamedTuple):
  """Operands: arrays, or their block specs, or the refs of one step's tiles."""

  x: Any  # [block_m, block_k] bfloat16
  planes: tuple[Any, ...]  # [block_n, block_k] int4 or int8; [block_n, 32 * bits] int8
  scale: Any = None  # [rows, block_n], as all factors; None where all of K is one group
  scale_code: Any = None
  minimum: Any = None
  minimum_code: Any = None
  x_sum: Any = None  # [groups, block_m] float32: x summed over each group


def signed_bias(w: RowPlanarArray, column: int) -> int:
  """What to add to the kernel's signed code of input `column` to get code - offset."""
  bias = 1 << w.bits[0] - 1
  for bits in w.bits[1:]:  # the last codes of a chunk have the bytes' flipped bit
    if column % CHUNK >= CHUNK - CHUNK * bits // 8:
      bias += 1 << sum(w.bits) - 1
  return bias - w.offset


def call(x: jax.Array, w: RowPlanarArray, config: Config, interpret: Any) -> jax.Array:
  """x bfloat16[M, K], M a multiple of block_m -> y.T of each split, float32[splits, N, M].

  Where all of K is one group this is that of the signed codes, without scales.
  """
  (m, k), n = x.shape, w.num_rows
  steps = k // config.block_k // config.splits
  operands = _Tiles(x, w.planes)
  if w.num_groups > 1:
    operands = _Tiles(x, w.planes, w.scale, w.scale_code, w.minimum, w.minimum_code)
    if config.on_sums and (w.minimum is not None or signed_bias(w, 0) or len(w.bits) > 1):
      x_sum = x.reshape(m, w.num_groups, w.group_size).sum(axis=-1, dtype=jnp.float32).T
      operands = operands._replace(x_sum=x_sum)
  leaves, tree = jax.tree.flatten(operands)
  body = _Body(w, config)
  shape = WARPGROUP_ROWS, config.block_m

  def kernel(*refs: Any) -> None:
    inputs, y_gmem, copies = refs[: len(leaves)], refs[len(leaves)], refs[len(leaves) + 1 :]
    block, column, split = (lax.axis_index(name) for name in ("n", "m", "split"))

    def step(_: Any, *args: Any) -> Any:
      *tiles, carry = args
      return body.step(jax.tree.unflatten(tree, tiles), carry, *copies)

    def compute(pipeline: Callable[[Any], Any]) -> None:
      row = (block * config.warpgroups + lax.axis_index("warpgroup")) * WARPGROUP_ROWS
      y = y_gmem.at[split, pl.ds(column * shape[1], shape[1]), pl.ds(row, shape[0])].T

      def accumulate(acc: Any) -> None:
        pipeline(acc)
        y[...] = plgpu.layout_cast(acc[...], _TRANSPOSED)

      if body.scales_sums:
        zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _LAYOUT)
        y[...] = plgpu.layout_cast(pipeline(zero), _TRANSPOSED)
      else:
        pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

    plgpu.emit_pipeline_warp_specialized(
      step,
      grid=(steps,),
      memory_registers=40,
      in_specs=jax.tree.leaves(_specs(operands, w, config, block, column, split * steps)),
      wg_axis="warpgroup",
      num_compute_wgs=config.warpgroups,
      max_concurrent_steps=config.stages,
      compute_context=compute,
    )(*inputs)

  scratch, options = [], {}
  if interpret is not None:  # which multiplies from shared memory only
    scratch = [plgpu.SMEM((config.warpgroups, WARPGROUP_ROWS, body.width), jnp.bfloat16)]
    options = {"interpret": interpret}
  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((config.splits, m, n), jnp.float32),
    scratch_types=scratch,
    grid=(n // config.block_n, m // config.block_m, config.splits),
    grid_names=("n", "m", "split"),
    num_threads=config.warpgroups + 1,
    thread_name="warpgroup",
    **options,
  )(*leaves)


def _specs(
  operands: _Tiles, w: RowPlanarArray, config: Config, block: Any, column: Any, first: Any
) -> _Tiles:
  """The tiles of a pipeline whose step 0 is the matrix's step `first`."""
  k, block_k = w.shape[1], config.block_k

  def plane(a: jax.Array, bits: int) -> plgpu.BlockSpec:
    width = block_k * a.shape[1] // k
    tile, at = (config.block_n, width), lambda i: (block, first + i)
    return plgpu.BlockSpec(tile, at, transforms=_swizzled(width, bits))

  def factor(a: jax.Array | None, columns: int, column: Any) -> plgpu.BlockSpec | None:
    if a is None:
      return None
    span = k // a.shape[0]  # inputs that a row of it serves
    if span <= block_k:
      return plgpu.BlockSpec((block_k // span, columns), lambda i: (first + i, column))
    return plgpu.BlockSpec((1, columns), lambda i: (lax.div((first + i) * block_k, span), column))

  low, *upper = operands.planes
  x_at, x_swizzle = lambda i: (column, first + i), _swizzled(_Body(w, config).width, 16)
  return _Tiles(
    plgpu.BlockSpec((config.block_m, block_k), x_at, transforms=x_swizzle),
    (plane(low, w.bits[0]), *(plane(a, 8) for a in upper)),
    factor(operands.scale, config.block_n, block),
    factor(operands.scale_code, config.block_n, block),
    factor(operands.minimum, config.block_n, block),
    factor(operands.minimum_code, config.block_n, block),
    factor(operands.x_sum, config.block_m, column),
  )


def _swizzled(width: int, bits: int) -> tuple[Any, ...]:
  """Shared memory for rows of which `width` values of `bits` are read together."""
  row_bytes = min(128, width * bits // 8)
  return plgpu.TilingTransform((8, row_bytes * 8 // bits)), plgpu.SwizzleTransform(row_bytes)


class _Body:
  """What a compute warpgroup does with a step's tiles."""

  def __init__(self, w: RowPlanarArray, config: Config) -> None:
    self._config, self._bits = config, w.bits
    self._scaled = w.num_groups > 1
    self._group = w.group_size if self._scaled else config.block_k
    self._biases = [signed_bias(w, c) for c in range(0, min(CHUNK, config.block_k), self._group)]
    self.scales_sums = config.on_sums and self._scaled
    self.width = min(self._group, _SLICE)  # of a product

  def step(self, tiles: _Tiles, carry: Any, copy: Any = None) -> Any:
    """One step's products. `carry` is y.T so far: an array, or an accumulator."""
    carry = self._products(tiles, carry, copy)
    # The next copies into these tiles go by another path to memory (the async proxy), which must
    # not overtake the reads above; interpret mode reports the race there is without this fence.
    plgpu.commit_smem()
    return carry

  def _products(self, tiles: _Tiles, carry: Any, copy: Any) -> Any:
    rows = pl.ds(lax.axis_index("warpgroup") * WARPGROUP_ROWS, WARPGROUP_ROWS)
    weights = _Weights(tiles, rows, self._bits)
    groups = range(self._config.block_k // self._group)
    if self.scales_sums:
      # A thread holds 1/128 of each [64, block_m] float32 and [64, group_size] bfloat16.
      registers = self._config.block_m // 2 + self._group // 4
      batch = max(1, _BATCH_REGISTERS // registers)
      for at in range(0, len(groups), batch):
        carry = self._add_sums(tiles, weights, groups[at : at + batch], carry, copy)
      return carry
    for group in groups:
      factors = self._factors(tiles, rows, group) if self._scaled else None
      self._multiply(carry, tiles.x, weights, group, factors, copy)
    plgpu.wgmma_wait(0)
    return carry

  def _add_sums(
    self, tiles: _Tiles, weights: "_Weights", groups: range, total: jax.Array, copy: Any
  ) -> jax.Array:
    """total float32[64, block_m] and the scaled sums of these groups, whose products overlap."""

    def sums(accs: list[Any]) -> list[jax.Array]:
      for group, acc in zip(groups, accs, strict=True):
        self._multiply(acc, tiles.x, weights, group, None, copy)
      return [acc[...] for acc in accs]

    acc = plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, self._config.block_m), jnp.float32)
    for group, part in zip(groups, pl.run_scoped(sums, [acc] * len(groups)), strict=True):
      scale, shift = self._factors(tiles, weights.rows, group)
      total += part * lax.broadcast_in_dim(scale, part.shape, [0])
      if tiles.x_sum is not None and shift is not None:
        x_sum = plgpu.layout_cast(tiles.x_sum[group], _EACH_COLUMN)
        total -= lax.broadcast_in_dim(shift, part.shape, [0]) * lax.broadcast_in_dim(
          x_sum, part.shape, [1]
        )
    return total

  def _multiply(
    self, acc: Any, x: Any, weights: "_Weights", group: int, factors: Any, copy: Any
  ) -> None:
    """acc += W @ x.T over a group, its codes scaled first where `factors` are given."""
    for start in range(group * self._group, (group + 1) * self._group, self.width):
      columns = slice(start, start + self.width)
      w = weights.codes(columns)
      if factors is not None:
        scale, shift = factors
        w = w.astype(jnp.float32) * lax.broadcast_in_dim(scale, w.shape, [0])
        if shift is not None:
          w -= lax.broadcast_in_dim(shift, w.shape, [0])
        w = w.astype(jnp.bfloat16)
      if copy is not None:
        w = _copied(w, copy)
      plgpu.wgmma(acc, w, x.at[:, pl.ds(start, self.width)].T)

  def _factors(self, tiles: _Tiles, rows: Any, group: int) -> tuple[jax.Array, jax.Array | None]:
    """s and t = m - s * bias of a group, float32[64]; t None where it is zero."""
    groups = self._config.block_k // self._group

    def factor(part: Any, code: Any) -> jax.Array:
      value = _row(part, group * part.shape[0] // groups, rows)
      return value if code is None else value * _row(code, group, rows)

    scale = factor(tiles.scale, tiles.scale_code)
    bias = self._biases[group % len(self._biases)]
    shift = None if bias == 0 else scale * -float(bias)
    if tiles.minimum is not None:
      minimum = factor(tiles.minimum, tiles.minimum_code)
      shift = minimum if shift is None else minimum + shift
    return scale, shift


class _Weights:
  """A warpgroup's 64 rows of a tile of W, unpacked a slice at a time."""

  def __init__(self, tiles: _Tiles, rows: Any, bits: tuple[int, ...]) -> None:
    self.rows, self._bits = rows, bits
    read = [_READ[bits[0]]] + [_READ[8]] * (len(bits) - 1)
    self._planes = [
      plgpu.layout_cast(plgpu.layout_cast(plane[rows, :], layout), _LAYOUT)
      for plane, layout in zip(tiles.planes, read, strict=True)
    ]

  def codes(self, columns: slice) -> jax.Array:
    """Signed codes of some columns, exactly: bfloat16[64, columns]."""
    low, *upper = self._planes
    codes = low[:, columns].astype(jnp.bfloat16)
    for plane, bits in zip(upper, self._bits[1:], strict=True):
      slot, start = divmod(columns.start, plane.shape[1])
      mask = (1 << bits) - 1 << bits * slot
      masked = plane[:, start : start + codes.shape[1]] & jnp.int8(mask - 256 * (mask > 127))
      codes += masked.astype(jnp.bfloat16) * jnp.bfloat16(2.0 ** (4 - bits * slot))
    return codes


def _row(ref: Any, row: int, columns: Any) -> jax.Array:
  """float32[64] of a factor's tile, an entry for each row of W."""
  return plgpu.layout_cast(ref[row, columns], _EACH_ROW).astype(jnp.float32)


def _copied(w: jax.Array, copy: Any) -> Any:
  """w [64, width] in the warpgroup's part of shared memory."""
  mine = copy.at[lax.axis_index("warpgroup")]
  mine[...] = w
  plgpu.commit_smem()
  return mine
