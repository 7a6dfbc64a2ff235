"""How the CPU's kernels find codes of 5 and 6 bits: in words of an order of their own.

The file splits such a code: 4 bits in one word, 1 or 2 in another, so that unpacking shifts and
masks twice. Here most codes lie whole in the low bits of a byte, and what remains of the bytes
holds the others: for four words of Q6_K's codes 11 instructions instead of 17, for eight of Q5_K's
23 instead of 36 (docs/adr/0014).

A *line* is word w of the sixteen rows of a tile (64 bytes). A byte of a line comes from the bytes
at the same place of others, so that all below is byte by byte.

q6_k: 48 lines, in threes (h, a, b) as `PIECES` (block_array.py) has them: four codes
        c0 = a & 15 | (h & 3) << 4          c2 = a >> 4 | (h >> 4 & 3) << 4
        c1 = b & 15 | (h >> 2 & 3) << 4     c3 = b >> 4 | (h >> 6) << 4
      become the three lines
        c0 | (c3 >> 4) << 6     c1 | (c3 >> 2 & 3) << 6     c2 | (c3 & 3) << 6
q5_k: 40 lines, 8 of the codes' fifth bits (bit g for group g), then 32 of their low four (groups
      2n and 2n + 1 share 8, low and high nibbles). The eight codes c0 .. c7 of a group become five
      lines, group after group:
        c0 | (c5 & 7) << 5      c1 | (c6 & 7) << 5      c2 | (c7 & 7) << 5
        c3 | (c5 >> 3) << 5 | (c7 >> 3 & 1) << 7        c4 | (c6 >> 3) << 5 | (c7 >> 4) << 7
"""

from typing import Any

from q4jax_kernels.q4_array import namespace

# format -> (byte of a block at which its codes begin, in the order of PIECES; bits of a code).
CODES = {"q5_k": (16, 5), "q6_k": (18, 6)}


def pack(lines: Any, format: str) -> Any:
  """The file's words of the codes -> the kernels'.

  Args:
    lines: uint8[..., L, 64], NumPy's or JAX's, with L = 48 (q6_k) or 40 (q5_k).

  Returns:
    The same shape.
  """
  return _pack_q6(lines) if format == "q6_k" else _pack_q5(lines)


def unpack(lines: Any, format: str) -> Any:
  """The inverse of `pack`."""
  return _unpack_q6(lines) if format == "q6_k" else _unpack_q5(lines)


def _pack_q6(lines: Any) -> Any:
  xp = namespace(lines)
  threes = lines.reshape(*lines.shape[:-2], 16, 3, 64)
  h, a, b = (threes[..., i, :] for i in range(3))
  words = [
    a & 15 | (h & 3) << 4 | h & 0xC0,
    b & 15 | (h >> 2 & 3) << 4 | b & 0xC0,
    a >> 4 | h & 0x30 | (b & 0x30) << 2,
  ]
  return xp.stack(words, -2).reshape(lines.shape)


def _unpack_q6(lines: Any) -> Any:
  xp = namespace(lines)
  threes = lines.reshape(*lines.shape[:-2], 16, 3, 64)
  x, y, z = (threes[..., i, :] for i in range(3))
  words = [
    x >> 4 & 3 | (y >> 4 & 3) << 2 | z & 0x30 | x & 0xC0,
    x & 15 | (z & 15) << 4,
    y & 15 | (z >> 6) << 4 | y & 0xC0,
  ]
  return xp.stack(words, -2).reshape(lines.shape)


def _pack_q5(lines: Any) -> Any:
  xp = namespace(lines)
  fifth, low = lines[..., :8, :], lines[..., 8:, :].reshape(*lines.shape[:-2], 4, 1, 8, 64)
  low = xp.concatenate([low & 15, low >> 4], -3).reshape(*lines.shape[:-2], 8, 8, 64)
  codes = low | xp.stack([(fifth >> group & 1) << 4 for group in range(8)], -3)
  c = [codes[..., i, :] for i in range(8)]
  words = [
    c[0] | (c[5] & 7) << 5,
    c[1] | (c[6] & 7) << 5,
    c[2] | (c[7] & 7) << 5,
    c[3] | (c[5] >> 3) << 5 | (c[7] >> 3 & 1) << 7,
    c[4] | (c[6] >> 3) << 5 | (c[7] >> 4) << 7,
  ]
  return xp.stack(words, -2).reshape(lines.shape)


def _unpack_q5(lines: Any) -> Any:
  xp = namespace(lines)
  groups = lines.reshape(*lines.shape[:-2], 8, 5, 64)
  w = [groups[..., i, :] for i in range(5)]
  codes = [word & 31 for word in w]
  codes += [w[0] >> 5 | (w[3] >> 5 & 3) << 3, w[1] >> 5 | (w[4] >> 5 & 3) << 3]
  codes += [w[2] >> 5 | (w[3] >> 7) << 3 | (w[4] >> 7) << 4]
  all_codes = xp.stack(codes, -2)  # [..., 8 groups, 8 lines, 64]
  fifth = sum(all_codes[..., g, :, :] >> 4 << g for g in range(8))
  low = all_codes.reshape(*lines.shape[:-2], 4, 2, 8, 64) & 15
  low = (low[..., 0, :, :] | low[..., 1, :, :] << 4).reshape(*lines.shape[:-2], 32, 64)
  return xp.concatenate([fifth, low], -2)
