"""A GGUF block taken apart into plain codes and factors, and put together again, bit for bit.

In these terms every format of `PARTS` obeys one law, in float32 and in this order,

  w[i] = s[g] * (code[i] - offset) - m[g],    s[g] = scale * scale_code[g],  m[g] = minimum *
                                              minimum_code[g],  g = i // group_size

where a format without sub-scales has s = scale and m = minimum, and one without minimums no m.
(A float16 NaN may come back as another NaN; everything else comes back as it was.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import jax.numpy as jnp

from q4jax_kernels.block_formats import (
  FORMATS,
  Array,
  fields,
  half,
  pack_codes,
  six_bit_pairs,
  unpack_codes,
)


class Parts(NamedTuple):
  """The parts of blocks [...]; `groups` is the number of sub-scales of a block."""

  codes: Array  # uint8[..., block_size], unsigned
  scale: Array  # float32[..., 1]
  scale_code: Array = None  # None or uint8 or int8 [..., groups]
  minimum: Array = None  # None or float32[..., 1]
  minimum_code: Array = None  # None or uint8[..., groups]


@dataclass(frozen=True)
class PartsFormat:
  """How the blocks of one format come apart: `bits` of a code's planes, lowest bits first."""

  bits: tuple[int, ...]
  offset: int
  split: Callable[[Array, ModuleType], Parts]  # uint8[..., block_bytes], numpy or jax.numpy
  join: Callable[[Parts, ModuleType], Array]  # its inverse


def split(blocks: Array, format: str, xp: ModuleType = jnp) -> Parts:
  """uint8[..., block_bytes] -> Parts."""
  return PARTS[format].split(blocks, xp)


def join(parts: Parts, format: str, xp: ModuleType = jnp) -> Array:
  """Parts -> uint8[..., block_bytes]."""
  blocks = PARTS[format].join(parts, xp)
  assert blocks.shape[-1] == FORMATS[format].block_bytes, (format, blocks.shape)
  return blocks


def _split_q4_0(blocks: Array, xp: ModuleType) -> Parts:
  d, codes = fields(blocks, 2, 16)
  return Parts(unpack_codes(codes, 4, 16, xp), half(d, xp))


def _join_q4_0(p: Parts, xp: ModuleType) -> Array:
  return xp.concatenate([_half_bytes(p.scale, xp), pack_codes(p.codes, 4, 16)], axis=-1)


def _split_q4_1(blocks: Array, xp: ModuleType) -> Parts:
  d, m, codes = fields(blocks, 2, 2, 16)
  return Parts(unpack_codes(codes, 4, 16, xp), half(d, xp), minimum=-half(m, xp))


def _join_q4_1(p: Parts, xp: ModuleType) -> Array:
  factors = [_half_bytes(p.scale, xp), _half_bytes(-p.minimum, xp)]
  return xp.concatenate([*factors, pack_codes(p.codes, 4, 16)], axis=-1)


def _split_q8_0(blocks: Array, xp: ModuleType) -> Parts:
  d, codes = fields(blocks, 2, 32)
  return Parts(codes ^ xp.uint8(128), half(d, xp))  # The sign bit flipped: code + 128.


def _join_q8_0(p: Parts, xp: ModuleType) -> Array:
  return xp.concatenate([_half_bytes(p.scale, xp), p.codes ^ xp.uint8(128)], axis=-1)


def _split_q4_k(blocks: Array, xp: ModuleType) -> Parts:
  d, d_min, factors, codes = fields(blocks, 2, 2, 12, 128)
  scale, minimum = six_bit_pairs(factors, xp)
  return Parts(unpack_codes(codes, 4, 32, xp), half(d, xp), scale, half(d_min, xp), minimum)


def _join_q4_k(p: Parts, xp: ModuleType) -> Array:
  return xp.concatenate([_k_factors(p, xp), pack_codes(p.codes, 4, 32)], axis=-1)


def _split_q5_k(blocks: Array, xp: ModuleType) -> Parts:
  d, d_min, factors, high, low = fields(blocks, 2, 2, 12, 32, 128)
  scale, minimum = six_bit_pairs(factors, xp)
  codes = unpack_codes(low, 4, 32, xp) | unpack_codes(high, 1, 32, xp) << 4
  return Parts(codes, half(d, xp), scale, half(d_min, xp), minimum)


def _join_q5_k(p: Parts, xp: ModuleType) -> Array:
  high, low = pack_codes(p.codes >> 4, 1, 32), pack_codes(p.codes & 15, 4, 32)
  return xp.concatenate([_k_factors(p, xp), high, low], axis=-1)


def _split_q6_k(blocks: Array, xp: ModuleType) -> Parts:
  low, high, scale, d = fields(blocks, 128, 64, 16, 2)
  codes = unpack_codes(low, 4, 64, xp) | unpack_codes(high, 2, 32, xp) << 4
  return Parts(codes, half(d, xp), scale.view(xp.int8))


def _join_q6_k(p: Parts, xp: ModuleType) -> Array:
  low, high = pack_codes(p.codes & 15, 4, 64), pack_codes(p.codes >> 4, 2, 32)
  return xp.concatenate([low, high, p.scale_code.view(xp.uint8), _half_bytes(p.scale, xp)], axis=-1)


def _k_factors(p: Parts, xp: ModuleType) -> Array:
  """The 16 bytes before the codes of q4_k and q5_k; see `six_bit_pairs`."""
  s, m = p.scale_code, p.minimum_code
  first, second = (c[..., :4] | c[..., 4:] >> 4 << 6 for c in (s, m))
  third = s[..., 4:] & 15 | (m[..., 4:] & 15) << 4
  halves = [_half_bytes(p.scale, xp), _half_bytes(p.minimum, xp)]
  return xp.concatenate([*halves, first, second, third], axis=-1)


def _half_bytes(x: Array, xp: ModuleType) -> Array:
  """float32[..., 1] that came from a float16, as its little-endian uint8[..., 2]."""
  return x.astype(xp.float16).view(xp.uint8)


PARTS: dict[str, PartsFormat] = {
  "q4_0": PartsFormat((4,), 8, _split_q4_0, _join_q4_0),
  "q4_1": PartsFormat((4,), 0, _split_q4_1, _join_q4_1),
  "q4_k": PartsFormat((4,), 0, _split_q4_k, _join_q4_k),
  "q5_k": PartsFormat((4, 1), 0, _split_q5_k, _join_q5_k),
  "q6_k": PartsFormat((4, 2), 32, _split_q6_k, _join_q6_k),
  "q8_0": PartsFormat((8,), 128, _split_q8_0, _join_q8_0),
}
