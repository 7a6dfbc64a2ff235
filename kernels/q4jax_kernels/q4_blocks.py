"""A Q4Array as blocks, which the native CPU kernels read, and back: both exact.

Blocks repeat a scale where its group is longer than theirs: a row's scale is in every block.
"""

import math

import numpy as np

from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.block_formats import Array
from q4jax_kernels.q4_array import Q4Array, namespace, pack_pairs
from q4jax_kernels.q4_formats import Q4_FORMATS, Q4Format


def to_blocks(w: Q4Array, wide: bool = False) -> BlockArray:
  """In layout rows. Not under jit: whether float16 holds the scales is a question of their values.

  Args:
    wide: float32 scales even where float16 would hold them.

  Raises:
    NotImplementedError: K is not a multiple of 32, or the group not of 8.
  """
  form = _format(w.validated(), wide)
  xp, (n, k) = namespace(w.packed), w.shape
  groups = k // form.group

  def spread(factor: Array) -> Array:
    every = xp.repeat(factor, groups // factor.shape[1], axis=1)
    return xp.broadcast_to(every, (n, groups)).reshape(n, k // form.block_size, -1)

  minimum = None if w.minimum is None else spread(w.minimum)
  codes = w.codes().reshape(n, -1, form.block_size)
  data = form.join(codes, spread(w.scale), minimum, xp).reshape(n, -1)
  return BlockArray(data, form.name, n)


def from_blocks(w: BlockArray, like: Q4Array | None = None) -> Q4Array:
  """The Q4Array of group-wise blocks, with the blocks' groups; or with the scales' shape and dtype
  of `like` (whose leaves may be ShapeDtypeStructs), the array that was made to blocks.
  """
  if w.format not in Q4_FORMATS:
    raise ValueError(f"{w.format} blocks do not hold a Q4Array; {', '.join(Q4_FORMATS)} do.")
  form, (n, k) = Q4_FORMATS[w.format], w.shape
  blocks = w.rows().data.reshape(n, -1, form.block_bytes)
  codes, scale, minimum = form.split(blocks, namespace(w.data))

  def gather(factor: Array) -> Array:
    factor = factor.reshape(n, k // form.group)
    if like is None:
      return factor
    rows, groups = like.scale.shape
    return factor[:rows, :: factor.shape[1] // groups].astype(like.scale.dtype)

  packed = pack_pairs(codes.reshape(n, k))
  return Q4Array(packed, gather(scale), None if minimum is None else gather(minimum))


def longest_group(k: int, group: int) -> int:
  """The longest group of a block that divides both an array's group and the block: 8..256.

  Raises:
    NotImplementedError: K is not a multiple of 32, or the group not of 8.
  """
  if k % 32 or group % 8:
    raise NotImplementedError(
      f"blocks need K a multiple of 32 and groups of a multiple of 8; this matrix has K={k} and "
      f"group_size={group}."
    )
  in_block = math.gcd(group, 256)
  return in_block if in_block >= 64 and k % 256 == 0 else math.gcd(group, 32)


def _format(w: Q4Array, wide: bool) -> Q4Format:
  group = longest_group(w.shape[1], w.group_size)
  factors = [w.scale] if w.minimum is None else [w.scale, w.minimum]
  wide = wide or not all(_float16_holds(np.asarray(f)) for f in factors)
  return Q4Format(group, w.minimum is None, wide)


def _float16_holds(x: np.ndarray) -> bool:
  if x.dtype == np.float16:
    return True
  x32 = x.astype(np.float32)
  with np.errstate(over="ignore"):
    narrow = x32.astype(np.float16).astype(np.float32)
  return bool(np.array_equal(narrow.view(np.uint32), x32.view(np.uint32)))
