"""What the TPU kernel does with one chunk of K: unpack codes, multiply, scale.

Codes become bfloat16 without a conversion: a code of b bits, laid into the top of the mantissa of
2^b, makes the number 2^b + code. A 32-bit word of eight codes does two at a time, four times: codes
i and i + 4, which a bitcast puts into neighbouring rows. So the natural order of a chunk's rows is
k = 4t + i at row (i, t), and the columns of x are put in that order instead.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from q4jax_kernels.planar_array import PlanarArray

CHUNK = 256  # inputs: a super-block, so that the smallest plane of it still fills a tile
_SUPER_BLOCK = 256
_SUM_ROWS = 128  # rows of x, copies included, that a matrix unit takes while it loads weights


@dataclasses.dataclass(frozen=True)
class Law:
  """What is known of a weight [N, K] before its values.

  Attributes:
    k: inputs.
    bits: of each plane.
    offset: w = scale * (code - offset) - minimum.
    chunk: inputs unpacked at once.
    group: inputs of a chunk that share a scale.
    num_scales: S, the rows of `scale`.
  """

  k: int
  bits: tuple[int, ...]
  offset: int
  chunk: int
  group: int
  num_scales: int

  @classmethod
  def of(cls, w: PlanarArray) -> "Law":
    k = w.shape[1]
    whole = w.group_size == k
    chunk = 128 if w.group_size == 128 and len(w.bits) == 1 and not whole else CHUNK
    group = chunk if whole else w.group_size
    return cls(k, tuple(w.bits), w.offset, chunk, group, w.scale.shape[0])

  @property
  def groups(self) -> int:
    """Of a chunk."""
    return self.chunk // self.group

  def on_sums(self, block_m: int) -> bool:
    """Whether block_m rows have their sums scaled, or else the weights."""
    return self.groups == 1 or block_m * self.groups <= _SUM_ROWS


def reorder(x: jax.Array, law: Law) -> jax.Array:
  """x [M, K] with the columns of each chunk in the order of its unpacked rows."""
  return x.reshape(x.shape[0], -1, law.chunk // 4, 4).swapaxes(2, 3).reshape(x.shape)


def scales(scale_ref: Any, code_ref: Any, law: Law, step: jax.Array, out_ref: Any) -> None:
  """Writes the scales (or minimums) of a tile's groups, two levels multiplied, chunk by chunk.

  Args:
    scale_ref: [groups or super-blocks, n] float32; [1, n] where one scale serves all of K.
    code_ref: [groups, n], the second level, or None.
    law: the weight's.
    step: which tile along K.
    out_ref: [chunks, groups of a chunk, n] float32.
  """
  chunks, groups, n = out_ref.shape
  scale = scale_ref[...]
  if law.num_scales > 1:
    # Past the end of K lies anything. x is zero there, but NaN times zero is not.
    row = jax.lax.broadcasted_iota(jnp.int32, scale.shape, 0) + step * scale.shape[0]
    scale = jnp.where(row < law.num_scales, scale, 0)
  if code_ref is not None:
    code = code_ref[...].astype(jnp.int32).astype(jnp.float32)[: chunks * groups]
    scale = jnp.repeat(scale, _SUPER_BLOCK // law.group, axis=0)[: chunks * groups] * code
  elif law.num_scales == 1:
    scale = jnp.broadcast_to(scale, (chunks * groups, n))
  out_ref[...] = scale[: chunks * groups].reshape(out_ref.shape)


def unpack(planes: Sequence[Any], law: Law, c: jax.Array) -> tuple[jax.Array, int]:
  """Chunk c of the tiles (refs): bfloat16[chunk, block_n] of code + bias, and the bias."""
  words = []
  for plane, bits in zip(planes, law.bits, strict=True):
    rows = law.chunk * bits // 8
    words.append(_words(plane[pl.ds(pl.multiple_of(c * rows, rows), rows), :], bits))
  if law.bits == (8,):  # too wide for the mantissa, narrow enough for the format
    floats = [(words[0] >> 8 * i & 255).astype(jnp.float32) for i in range(4)]
    return jnp.concatenate([code.astype(jnp.bfloat16) for code in floats]), 0
  total = sum(law.bits)
  codes = []
  for i in range(4):
    pair: Any = (127 + total << 7) * 0x10001  # 2^total, twice
    below = 0
    for word, bits in zip(words, law.bits, strict=True):
      at = 7 - total + below  # in the 7 bits of a mantissa
      pair |= _shift(word, at - bits * i) & ((1 << bits) - 1 << at) * 0x10001
      below += bits
    codes.append(pltpu.bitcast(pair, jnp.bfloat16))
  return jnp.concatenate(codes), 1 << total


def _words(plane: jax.Array, bits: int) -> jax.Array:
  """uint8[chunk * bits / 8, n] as int32[chunk / 8, n], eight codes a word (four, of 8 bits).

  Codes 0..3 lie upwards from bit 0, codes 4..7 from bit 16.
  """
  if bits >= 4:
    return pltpu.bitcast(plane, jnp.int32)
  together = plane if bits == 1 else pltpu.bitcast(plane, jnp.uint16)
  word = together.astype(jnp.int32)
  return word | word << 16 - 4 * bits


def _shift(word: jax.Array, left: int) -> jax.Array:
  return word << left if left > 0 else word >> -left


def scaled_sums(
  x: jax.Array, codes: jax.Array, bias: int, scale: jax.Array, minimum: jax.Array | None
) -> jax.Array:
  """x [m, chunk] times the codes as they are, one sum a group; then scaled: float32[m, n]."""
  m, groups = x.shape[0], scale.shape[0]
  x32 = x.astype(jnp.float32)
  if groups > 1:
    x32 = _one_group_each(x32, groups)
    x = x32.astype(jnp.bfloat16)
  x_sum = jnp.sum(x32, axis=1, keepdims=True)
  y = (_dot(x, codes) - bias * x_sum) * _each_row(scale, m)
  if minimum is not None:
    y -= x_sum * _each_row(minimum, m)
  return y if groups == 1 else jnp.sum(y.reshape(groups, m, -1), axis=0)


def _one_group_each(x: jax.Array, groups: int) -> jax.Array:
  """x [m, chunk] once per group, zero outside of it: [groups * m, chunk]."""
  copies = x if x.shape[0] == 1 else x.reshape(1, *x.shape)
  shape = (groups, *copies.shape[1:])
  copy = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  column = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
  # Columns are in the order (i, t).
  quarter = x.shape[1] // 4
  group = jax.lax.div(jax.lax.rem(column, quarter), quarter // groups)
  return jnp.where(group == copy, jnp.broadcast_to(copies, shape), 0).reshape(-1, x.shape[1])


def _each_row(scale: jax.Array, m: int) -> jax.Array:
  """scale [groups, n], each row m times: [groups * m, n]; one group's stays [1, n]."""
  return scale if scale.shape[0] == 1 else jnp.repeat(scale, m, axis=0)


def scaled_weights(
  x: jax.Array, codes: jax.Array, bias: int, scale: jax.Array, minimum: jax.Array | None
) -> jax.Array:
  """x [m, chunk] times the weights, which are rounded to bfloat16: float32[m, n]."""
  run = codes.shape[0] // 4 // scale.shape[0]
  scale = jnp.repeat(scale, run, axis=0)
  minimum = None if minimum is None else jnp.repeat(minimum, run, axis=0)
  weights = []
  for quarter in jnp.split(codes, 4):
    weight = (quarter.astype(jnp.float32) - bias) * scale
    weights.append((weight if minimum is None else weight - minimum).astype(jnp.bfloat16))
  return _dot(x, jnp.concatenate(weights))


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
  return jnp.dot(x, w, preferred_element_type=jnp.float32)
