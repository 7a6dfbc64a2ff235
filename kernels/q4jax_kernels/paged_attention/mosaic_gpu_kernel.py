"""The Hopper kernel's body: an online softmax over tiles of 64 slots. See mosaic_gpu.py.

Copies (TMA) of two tiles are in flight. A tile's codes are unpacked to bfloat16 in shared memory,
exactly, and multiplied there by `wgmma`; scales never meet them. For slot t and group g, with scale
s, minimum m and codes n,

  logit_t = sum_g s_tg (q_g . n_tg) - m_tg sum(q_g)     out_g = sum_t (p_t s_tg) n_tg - p_t m_tg

What meets the codes, q and p * s, goes in as two bfloat16 that add up to it, to 16 bits. A product
has 64 rows, of which the query heads of a KV head fill a few; the others hold anything, and as rows
do not mix they are left alone.

With heads of 128, ptxas spills 300 bytes of a thread's 255 registers, addresses for the most part:
what to mend first, where this can be measured.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from q4jax_kernels.kv_format import KVFormat
from q4jax_kernels.paged_attention.join import NONE

ROWS = 64  # of a `wgmma`
SLOTS = 64  # of a tile
_PIECES = 2  # bfloat16 that a float32 goes in as
_STAGES = 2  # tiles in flight

_LAYOUT, _READ = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_UPCAST_2X
_EACH_ROW, _EACH_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Side(NamedTuple):
  """Keys or values: arrays, or refs, or a tile's buffers."""

  codes: Any  # uint8[NB, K, bs, H * bits / 8]; a tile's are [SLOTS, H * bits / 8]
  scale: Any  # float16[B * K, G, slots], zero where a slot is not seen; [G, SLOTS]
  minimum: Any  # as scale; None if symmetric


class Inputs(NamedTuple):
  """Operands: arrays, or their refs."""

  table: Any  # int32[B, P]
  tiles: Any  # int32[B]: tiles that a row's blocks fill
  q: Any  # bfloat16[B * K, 2, rows, H]
  q_sum: Any  # float32[B * K, G, ROWS]
  mask: Any  # float32[B, slots], to be added to the logits
  keys: Side
  values: Side


class _Scratch(NamedTuple):
  """Shared memory."""

  q: Any  # [2, ROWS, H] bfloat16
  q_sum: Any  # [G, ROWS]
  mask: Any  # [_STAGES, SLOTS]
  keys: Side  # [_STAGES, ...]
  values: Side
  key_codes: Any  # [SLOTS, H] bfloat16
  value_codes: Any
  p: Any  # [2, ROWS, SLOTS] bfloat16
  out: Any  # [ROWS, H]
  row: Any  # [2, ROWS]
  logits: Any  # [ROWS, SLOTS], or None
  q_came: Any  # barriers
  tile_came: Any


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the work is cut, and the figures of its operands."""

  splits: int  # thread blocks that share the tiles of a (sequence, KV head)
  rows: int  # query heads of a KV head, padded to a multiple of 8
  kv_heads: int
  head_dim: int
  block_size: int
  key: KVFormat
  value: KVFormat

  def group(self, format: KVFormat) -> int:
    return format.group_size or self.head_dim

  def width(self, format: KVFormat) -> int:
    """Columns of codes multiplied at a time: of one group, and of one nibble."""
    return min(64, self.group(format) & -self.group(format), self.head_dim * format.bits // 8)


def call(inputs: Inputs, plan: Plan, scores: bool, interpret: Any) -> list[jax.Array]:
  """The pages' part of the softmax, a thread block's each.

  Returns:
    sum of p * value float32[B * K, splits, rows, H], largest logit and sum of p [B * K, splits,
    ROWS], where p is exp(logit - largest); and with scores the logits [B * K, rows, slots], of
    tiles that hold no block anything.
  """
  leaves, tree = jax.tree.flatten(inputs)
  count, slots = inputs.q.shape[0], inputs.mask.shape[1]
  shapes = [(count, plan.splits, plan.rows, plan.head_dim)] + [(count, plan.splits, ROWS)] * 2
  if scores:
    shapes.append((count, plan.rows, slots))
  scratch, scratch_tree = jax.tree.flatten(_scratch(inputs, plan, scores))

  def kernel(*refs: Any) -> None:
    operands = jax.tree.unflatten(tree, refs[: len(leaves)])
    results = refs[len(leaves) : len(leaves) + len(shapes)]
    buffers = jax.tree.unflatten(scratch_tree, refs[len(leaves) + len(shapes) :])
    _Body(plan, operands, buffers).run(*results)

  options = {} if interpret is None else {"interpret": interpret}
  return plgpu.kernel(
    kernel,
    out_type=[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes],
    scratch_types=scratch,
    grid=(plan.splits, count),
    grid_names=("split", "row"),
    **options,
  )(*leaves)


def _scratch(inputs: Inputs, plan: Plan, scores: bool) -> _Scratch:
  h, keys, values = plan.head_dim, plan.width(plan.key), plan.width(plan.value)

  def tile(side: Side) -> Side:
    width = side.codes.shape[-1]
    scales = (
      None if a is None else plgpu.SMEM((_STAGES, a.shape[1], SLOTS), a.dtype) for a in side[1:]
    )
    codes = plgpu.SMEM((_STAGES, SLOTS, width), jnp.uint8, transforms=_swizzled(width))
    return Side(codes, *scales)

  def floats(width: int, *shape: int) -> Any:
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=_swizzled(2 * width, 2))

  key_tile, value_tile = tile(inputs.keys), tile(inputs.values)
  copies = 2 * max(1, SLOTS // plan.block_size) + 1
  copies += sum(a is not None for side in (key_tile, value_tile) for a in side[1:])
  return _Scratch(
    floats(keys, _PIECES, ROWS, h),
    plgpu.SMEM(inputs.q_sum.shape[1:], jnp.float32),
    plgpu.SMEM((_STAGES, SLOTS), jnp.float32),
    key_tile,
    value_tile,
    floats(keys, SLOTS, h),
    floats(values, SLOTS, h),
    floats(values, _PIECES, ROWS, SLOTS),
    plgpu.SMEM((ROWS, h), jnp.float32),
    plgpu.SMEM((2, ROWS), jnp.float32),
    plgpu.SMEM((ROWS, SLOTS), jnp.float32) if scores else None,
    plgpu.Barrier(num_arrivals=_PIECES + 1),
    plgpu.Barrier(num_arrivals=copies, num_barriers=_STAGES),
  )


def _swizzled(row_bytes: int, item_bytes: int = 1) -> tuple[Any, ...]:
  """Shared memory for rows of which so many bytes are read together."""
  row_bytes = min(128, row_bytes)
  return plgpu.TilingTransform((8, row_bytes // item_bytes)), plgpu.SwizzleTransform(row_bytes)


class _Body:
  """What a thread block does."""

  def __init__(self, plan: Plan, inputs: Inputs, scratch: _Scratch) -> None:
    self._plan, self._in, self._smem = plan, inputs, scratch
    self._row = lax.axis_index("row")
    self._sequence = lax.div(self._row, jnp.int32(plan.kv_heads))
    self._kv = lax.rem(self._row, jnp.int32(plan.kv_heads))

  def run(self, out: Any, top: Any, total: Any, logits: Any = None) -> None:
    plan, smem, split = self._plan, self._smem, lax.axis_index("split")
    tiles = self._in.tiles[self._sequence]
    share = lax.div(tiles + (plan.splits - 1), jnp.int32(plan.splits))
    first = split * share
    last = jnp.minimum(first + share, tiles)
    for i in range(_PIECES):
      to = smem.q.at[i, pl.ds(0, plan.rows)]
      plgpu.copy_gmem_to_smem(self._in.q.at[self._row, i], to, smem.q_came)
    plgpu.copy_gmem_to_smem(self._in.q_sum.at[self._row], smem.q_sum, smem.q_came)
    for stage in range(_STAGES):
      pl.when(first + stage < last)(partial(self._fetch, first + stage, stage))
    plgpu.barrier_wait(smem.q_came)

    def step(tile: Any, carry: Any) -> Any:
      stage = lax.rem(tile - first, jnp.int32(_STAGES))
      plgpu.barrier_wait(smem.tile_came.at[stage])
      carry = self._step(tile, stage, carry, logits)
      # The next copies go by another path to memory (the async proxy), which must not overtake
      # the reads above.
      plgpu.commit_smem()
      pl.when(tile + _STAGES < last)(partial(self._fetch, tile + _STAGES, stage))
      return carry

    width = plan.width(plan.value)
    zero = [_full((ROWS, width), 0.0, _LAYOUT) for _ in range(plan.head_dim // width)]
    start = zero, _full((ROWS,), NONE, _EACH_ROW), _full((ROWS,), 0.0, _EACH_ROW)
    sums, most, p_sum = lax.fori_loop(first, last, step, start)
    for i, part in enumerate(sums):
      smem.out[:, pl.ds(i * width, width)] = part
    smem.row[0], smem.row[1] = most, p_sum
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.out.at[pl.ds(0, plan.rows)], out.at[self._row, split])
    plgpu.copy_smem_to_gmem(smem.row.at[0], top.at[self._row, split])
    plgpu.copy_smem_to_gmem(smem.row.at[1], total.at[self._row, split])
    plgpu.wait_smem_to_gmem(0)

  def _fetch(self, tile: Any, stage: Any) -> None:
    """Starts the copies of a tile."""
    smem, came = self._smem, self._smem.tile_came.at[stage]
    slots, bs = pl.ds(tile * SLOTS, SLOTS), self._plan.block_size
    plgpu.copy_gmem_to_smem(self._in.mask.at[self._sequence, slots], smem.mask.at[stage], came)
    for side, to in ((self._in.keys, smem.keys), (self._in.values, smem.values)):
      for scale, scale_to in zip(side[1:], to[1:], strict=True):
        if scale is not None:
          plgpu.copy_gmem_to_smem(scale.at[self._row, :, slots], scale_to.at[stage], came)
    rows = min(SLOTS, bs)
    for i in range(SLOTS // rows):
      slot = tile * SLOTS + i * rows
      block = self._in.table[self._sequence, lax.div(slot, jnp.int32(bs))]
      inside = pl.ds(pl.multiple_of(lax.rem(slot, jnp.int32(bs)), rows), rows)
      for side, to in ((self._in.keys, smem.keys), (self._in.values, smem.values)):
        codes_to = to.codes.at[stage, pl.ds(i * rows, rows)]
        plgpu.copy_gmem_to_smem(side.codes.at[block, self._kv, inside], codes_to, came)

  def _step(self, tile: Any, stage: Any, carry: Any, logits_out: Any) -> Any:
    """One tile's part of the sums (of p * value, by columns), largest logits and sums of p."""
    smem, (sums, before, total) = self._smem, carry
    _unpack(smem.keys.codes.at[stage], self._plan.key, smem.key_codes)
    plgpu.commit_smem()
    logits = self._logits(stage)
    if logits_out is not None:
      plgpu.wait_smem_to_gmem(0)  # of the tile before
      smem.logits[...] = logits
      plgpu.commit_smem()
      to = logits_out.at[self._row, :, pl.ds(tile * SLOTS, SLOTS)]
      plgpu.copy_smem_to_gmem(smem.logits.at[pl.ds(0, self._plan.rows)], to)
    top = jnp.maximum(before, logits.max(axis=1))
    # Where nothing is seen yet, p is still 0.
    p = jnp.exp(logits - _down(jnp.maximum(top, NONE / 2)))
    fade = jnp.exp(before - top)
    _unpack(smem.values.codes.at[stage], self._plan.value, smem.value_codes)
    return self._weighted(stage, p, fade, sums), top, total * fade + p.sum(axis=1)

  def _logits(self, stage: Any) -> jax.Array:
    """float32[ROWS, SLOTS]."""
    smem, group = self._smem, self._plan.group(self._plan.key)
    width = self._plan.width(self._plan.key)
    mask = plgpu.layout_cast(smem.mask[stage], _EACH_COLUMN)
    logits = _across(mask)
    for g in range(self._plan.head_dim // group):

      def dots(acc: Any, g: int = g) -> jax.Array:
        for start in range(g * group, (g + 1) * group, width):
          columns = pl.ds(start, width)
          for i in range(_PIECES):
            plgpu.wgmma(acc, smem.q.at[i, :, columns], smem.key_codes.at[:, columns].T)
        return acc[...]

      acc = plgpu.WGMMAAccumulatorRef((ROWS, SLOTS), jnp.float32)
      scale, minimum = _scales(smem.keys, stage, g, self._plan.key)
      q_sum = plgpu.layout_cast(smem.q_sum[g], _EACH_ROW)
      logits += pl.run_scoped(dots, acc) * _across(scale) - _down(q_sum) * _across(minimum)
    return logits

  def _weighted(self, stage: Any, p: jax.Array, fade: jax.Array, sums: list) -> list[jax.Array]:
    """The sums with p float32[ROWS, SLOTS] times the values, by `width` columns each."""
    smem, group = self._smem, self._plan.group(self._plan.value)
    width, after = self._plan.width(self._plan.value), []
    for g in range(self._plan.head_dim // group):
      scale, minimum = _scales(smem.values, stage, g, self._plan.value)
      weight = p * _across(scale)
      high = weight.astype(jnp.bfloat16)
      smem.p[0] = high
      smem.p[1] = (weight - high.astype(jnp.float32)).astype(jnp.bfloat16)
      plgpu.commit_smem()
      less = (p * _across(minimum)).sum(axis=1)
      for start in range(g * group, (g + 1) * group, width):

        def product(acc: Any, start: int = start) -> jax.Array:
          for first in range(0, SLOTS, width):
            slots = pl.ds(first, width)
            for i in range(_PIECES):
              codes = smem.value_codes.at[slots, pl.ds(start, width)]
              plgpu.wgmma(acc, smem.p.at[i, :, slots], codes)
          return acc[...]

        acc = plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32)
        shape = (ROWS, width)
        before = sums[start // width] * lax.broadcast_in_dim(fade, shape, [0])
        part = pl.run_scoped(product, acc) - lax.broadcast_in_dim(less, shape, [0])
        after.append(before + part)
    return after


def _unpack(packed: Any, format: KVFormat, to: Any) -> None:
  """uint8[SLOTS, H * bits / 8] -> codes bfloat16[SLOTS, H], exactly.

  There are no shifts of 8 bits, and only signed ones become floats: so the high nibble is 16 times
  too large, and the top bit flipped, which takes half the range off.
  """
  x = plgpu.layout_cast(plgpu.layout_cast(packed[...], _READ), _LAYOUT)
  width = packed.shape[-1]

  def signed(x: jax.Array) -> jax.Array:
    return x.astype(jnp.int8).astype(jnp.bfloat16)

  if format.bits == 8:
    to[...] = signed(x ^ jnp.uint8(128)) + jnp.bfloat16(128)
    return
  to[:, pl.ds(0, width)] = signed(x & jnp.uint8(15))
  high = signed((x & jnp.uint8(240)) ^ jnp.uint8(128))
  to[:, pl.ds(width, width)] = high * jnp.bfloat16(1 / 16) + jnp.bfloat16(8)


def _scales(side: Side, stage: Any, group: int, format: KVFormat) -> tuple[jax.Array, jax.Array]:
  """Scale and minimum of each slot, float32[SLOTS]."""

  def load(ref: Any) -> jax.Array:
    return plgpu.layout_cast(ref[stage, group], _EACH_COLUMN).astype(jnp.float32)

  scale = load(side.scale)
  minimum = scale * float(format.offset) if side.minimum is None else load(side.minimum)
  return scale, minimum


def _full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _across(columns: jax.Array) -> jax.Array:
  """A value of each slot, for every row."""
  return lax.broadcast_in_dim(columns, (ROWS, SLOTS), [1])


def _down(rows: jax.Array) -> jax.Array:
  """A value of each row, for every slot."""
  return lax.broadcast_in_dim(rows, (ROWS, SLOTS), [0])
