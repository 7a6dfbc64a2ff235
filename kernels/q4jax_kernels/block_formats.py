"""The block formats of GGUF: how many bytes hold how many weights, and what the bytes mean.

A row of a quantised matrix is a run of blocks, each `block_bytes` bytes for `block_size` weights.
Every format here is affine in groups of a block,

  w[i] = scale[g] * code[i] - minimum[g],    g = i // group_size

computed in float32 in this order, so that the result is bit-equal to gguf-py's. (`jit` may
contract the product and the difference to one fused multiply-add, which rounds once instead of
twice.) `dequantize(blocks, xp)` takes uint8[..., block_bytes] and gives float32[..., block_size];
`xp` is `jax.numpy` or `numpy`. Nothing but slices, reshapes, bit and float operations is used, so
each law lowers to every backend.

Byte layouts are given in the order of the bytes, as `name type[count]`; f16 is little-endian.
`q4(run)` says how codes of 4 bits (or 2, or 1) lie in bytes: each run of that many bytes gives
first the low codes of all its bytes, in order, then the next higher ones.

Source: the block structs of ggml-common.h (ggml) and the GGUF specification.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

Array = Any  # np.ndarray or jax.Array, as `xp` makes them.

_IQ4_CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockFormat:
  """A block format: `block_bytes` bytes hold `block_size` weights."""

  name: str
  block_size: int
  block_bytes: int
  dequantize: Callable[..., Array]  # (uint8[..., block_bytes], xp=jnp) -> float32[..., block_size]


def q4_0(blocks: Array, xp: ModuleType = jnp) -> Array:
  """Bytes: d f16 | codes q4(16).  w = d * (code - 8)."""
  d, codes = fields(blocks, 2, 16)
  return _affine(_float(unpack_codes(codes, 4, 16, xp), xp) - 8, half(d, xp))


def q4_1(blocks: Array, xp: ModuleType = jnp) -> Array:
  """Bytes: d f16 | m f16 | codes q4(16).  w = d * code + m."""
  d, m, codes = fields(blocks, 2, 2, 16)
  return _affine(_float(unpack_codes(codes, 4, 16, xp), xp), half(d, xp), -half(m, xp))


def q5_0(blocks: Array, xp: ModuleType = jnp) -> Array:
  """Bytes: d f16 | fifth bits q1(1)[4] | low bits q4(16).  w = d * (code - 16)."""
  d, high, low = fields(blocks, 2, 4, 16)
  codes = unpack_codes(low, 4, 16, xp) | unpack_codes(high, 1, 1, xp) << 4
  return _affine(_float(codes, xp) - 16, half(d, xp))


def q5_1(blocks: Array, xp: ModuleType = jnp) -> Array:
  """Bytes: d f16 | m f16 | fifth bits q1(1)[4] | low bits q4(16).  w = d * code + m."""
  d, m, high, low = fields(blocks, 2, 2, 4, 16)
  codes = unpack_codes(low, 4, 16, xp) | unpack_codes(high, 1, 1, xp) << 4
  return _affine(_float(codes, xp), half(d, xp), -half(m, xp))


def q8_0(blocks: Array, xp: ModuleType = jnp) -> Array:
  """Bytes: d f16 | codes i8[32].  w = d * code."""
  d, codes = fields(blocks, 2, 32)
  return _affine(_float(codes.view(xp.int8), xp), half(d, xp))


def q2_k(blocks: Array, xp: ModuleType = jnp) -> Array:
  """Bytes: scale and minimum u8[16] | codes q2(32)[64] | d f16 | d_min f16.

  16 groups of 16: w = (d * scale) * code - d_min * minimum. A group's byte holds the scale in its
  low and the minimum in its high nibble.
  """
  factors, codes, d, d_min = fields(blocks, 16, 64, 2, 2)
  scale = half(d, xp) * _float(factors & 15, xp)
  minimum = half(d_min, xp) * _float(factors >> 4, xp)
  return _affine(_float(unpack_codes(codes, 2, 32, xp), xp), scale, minimum)


def q3_k(blocks: Array, xp: ModuleType = jnp) -> Array:
  """Bytes: third bits q1(32)[32] | low q2(32)[64] | scales: low q4(8)[8], high q2(4)[4] | d f16.

  16 groups of 16: w = (d * (scale - 32)) * (code - 4), scales of 6 bits.
  """
  high, low, scale_low, scale_high, d = fields(blocks, 32, 64, 8, 4, 2)
  scale = (
    _float(unpack_codes(scale_low, 4, 8, xp) | unpack_codes(scale_high, 2, 4, xp) << 4, xp) - 32
  )
  codes = unpack_codes(low, 2, 32, xp) | unpack_codes(high, 1, 32, xp) << 2
  return _affine(_float(codes, xp) - 4, half(d, xp) * scale)


def q4_k(blocks: Array, xp: ModuleType = jnp) -> Array:
  """Bytes: d f16 | d_min f16 | scales and minimums u8[12] | codes q4(32)[128].

  8 groups of 32: w = (d * scale) * code - d_min * minimum. The 6-bit scales and minimums: see
  `six_bit_pairs`.
  """
  d, d_min, factors, codes = fields(blocks, 2, 2, 12, 128)
  scale, minimum = six_bit_pairs(factors, xp)
  return _affine(
    _float(unpack_codes(codes, 4, 32, xp), xp),
    half(d, xp) * _float(scale, xp),
    half(d_min, xp) * _float(minimum, xp),
  )


def q5_k(blocks: Array, xp: ModuleType = jnp) -> Array:
  """Bytes: d f16 | d_min f16 | factors u8[12] | fifth bits q1(32)[32] | low q4(32)[128].

  8 groups of 32, as q4_k with codes of 5 bits.
  """
  d, d_min, factors, high, low = fields(blocks, 2, 2, 12, 32, 128)
  scale, minimum = six_bit_pairs(factors, xp)
  codes = unpack_codes(low, 4, 32, xp) | unpack_codes(high, 1, 32, xp) << 4
  return _affine(
    _float(codes, xp), half(d, xp) * _float(scale, xp), half(d_min, xp) * _float(minimum, xp)
  )


def q6_k(blocks: Array, xp: ModuleType = jnp) -> Array:
  """Bytes: low bits q4(64)[128] | high bits q2(32)[64] | scales i8[16] | d f16.

  16 groups of 16: w = (d * scale) * (code - 32).
  """
  low, high, scale, d = fields(blocks, 128, 64, 16, 2)
  codes = unpack_codes(low, 4, 64, xp) | unpack_codes(high, 2, 32, xp) << 4
  scale = half(d, xp) * _float(scale.view(xp.int8), xp)
  return _affine(_float(codes, xp) - 32, scale)


def iq4_nl(blocks: Array, xp: ModuleType = jnp) -> Array:
  """Bytes: d f16 | indices q4(16).  w = d * codebook[index], 16 fixed integers, denser around 0."""
  d, indices = fields(blocks, 2, 16)
  return _affine(_codebook(unpack_codes(indices, 4, 16, xp), xp), half(d, xp))


def iq4_xs(blocks: Array, xp: ModuleType = jnp) -> Array:
  """Bytes: d f16 | scales: high q2(1)[2], low q4(1)[4] | indices q4(16)[128].

  8 groups of 32: w = (d * (scale - 32)) * codebook[index], scales of 6 bits.
  """
  d, scale_high, scale_low, indices = fields(blocks, 2, 2, 4, 128)
  scale = (
    _float(unpack_codes(scale_low, 4, 1, xp) | unpack_codes(scale_high, 2, 1, xp) << 4, xp) - 32
  )
  return _affine(_codebook(unpack_codes(indices, 4, 16, xp), xp), half(d, xp) * scale)


def fields(blocks: Array, *sizes: int) -> list[Array]:
  """The consecutive fields of a block, of these many bytes."""
  assert blocks.shape[-1] == sum(sizes), (blocks.shape, sizes)
  starts = np.cumsum([0, *sizes]).tolist()
  return [blocks[..., a:b] for a, b in pairwise(starts)]


def unpack_codes(field: Array, bits: int, run: int, xp: ModuleType) -> Array:
  """uint8[..., n] to the uint8[..., n * 8 / bits] codes that lie in it as `q<bits>(run)`."""
  *batch, n = field.shape
  shifts = xp.arange(0, 8, bits, dtype=xp.uint8).reshape((1,) * field.ndim + (-1, 1))
  codes = field.reshape(*batch, n // run, 1, run) >> shifts & (2**bits - 1)
  return codes.reshape(*batch, n * 8 // bits)


def pack_codes(codes: Array, bits: int, run: int) -> Array:
  """The inverse of `unpack_codes`."""
  *batch, n = codes.shape
  slots = codes.reshape(*batch, n * bits // 8 // run, 8 // bits, run)
  packed = slots[..., 0, :]
  for j in range(1, 8 // bits):
    packed = packed | slots[..., j, :] << bits * j
  return packed.reshape(*batch, n * bits // 8)


def six_bit_pairs(factors: Array, xp: ModuleType) -> tuple[Array, Array]:
  """Eight 6-bit scales and minimums, uint8, from the 12 bytes of q4_k and q5_k.

  Bytes 0-3 hold scales 0-3 and bytes 4-7 minimums 0-3 in their low 6 bits; their top 2 bits are the
  top bits of scales 4-7 and of minimums 4-7, whose low 4 bits are the nibbles of bytes 8-11.
  """
  first, second, third = fields(factors, 4, 4, 4)
  scale = xp.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
  minimum = xp.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
  return scale, minimum


def _codebook(indices: Array, xp: ModuleType) -> Array:
  """float32 `_IQ4_CODEBOOK[indices]` as a tree of selects: a gather is slow, or not to be had."""
  values: list[Array] = [np.float32(value) for value in _IQ4_CODEBOOK]
  for bit in (1, 2, 4, 8):
    is_set = indices & bit != 0
    values = [xp.where(is_set, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
  return values[0]


def _affine(codes: Array, scale: Array, minimum: Array | None = None) -> Array:
  """scale[..., G] * codes[..., block_size] - minimum[..., G], one scale per G-th of the block."""
  groups = scale.shape[-1]
  w = codes.reshape(*scale.shape, codes.shape[-1] // groups) * scale[..., None]
  if minimum is not None:
    w = w - minimum[..., None]
  return w.reshape(codes.shape)


def half(field: Array, xp: ModuleType) -> Array:
  """uint8[..., 2], a little-endian float16, as float32[..., 1]."""
  return field.view(xp.float16).astype(xp.float32)


def _float(x: Array, xp: ModuleType) -> Array:
  return x.astype(xp.float32)


FORMATS: dict[str, BlockFormat] = {
  law.__name__: BlockFormat(law.__name__, block_size, block_bytes, law)
  for law, block_size, block_bytes in [
    (q4_0, 32, 18),
    (q4_1, 32, 20),
    (q5_0, 32, 22),
    (q5_1, 32, 24),
    (q8_0, 32, 34),
    (q2_k, 256, 84),
    (q3_k, 256, 110),
    (q4_k, 256, 144),
    (q5_k, 256, 176),
    (q6_k, 256, 210),
    (iq4_nl, 32, 18),
    (iq4_xs, 256, 136),
  ]
}
