"""A matrix kept as its file stores it: quantised blocks along each row, every bit of them.

The formats are GGUF's (block_formats.py) and our own group-wise ones (q4_formats.py).

Layouts of `data` (both uint8, both exact):
  rows  [N, row_bytes]             row after row, as in a GGUF file.
  x16   [ceil(N / 16), 16 * row_bytes]  sixteen rows side by side: within a block, each piece is cut
        into words and word w of the 16 rows is contiguous, so one vector load serves 16 outputs.
        The pieces are the block's fields, in the order in which the kernels read them (PIECES);
        codes of 5 and 6 bits are packed anew (code_words.py). Rows past N are zero. This is what
        the CPU kernels read.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from q4jax_kernels import code_words, ffi
from q4jax_kernels.block_formats import FORMATS
from q4jax_kernels.q4_array import namespace
from q4jax_kernels.q4_formats import Q4_FORMATS

ROWS = 16  # rows side by side in the x16 layout

# (bytes, word bytes) of each field of a block, in the file's order. Fields that hold a weight's
# bits have words of 4: the dot-product instructions take 4 weights at a time.
FIELDS: dict[str, tuple[tuple[int, int], ...]] = {
  "f32": ((4, 4),),
  "f16": ((2, 2),),
  "bf16": ((2, 2),),
  "q4_0": ((2, 2), (16, 4)),
  "q4_1": ((2, 2), (2, 2), (16, 4)),
  "q5_0": ((2, 2), (4, 4), (16, 4)),
  "q5_1": ((2, 2), (2, 2), (4, 4), (16, 4)),
  "q8_0": ((2, 2), (32, 4)),
  "q2_k": ((16, 1), (64, 4), (2, 2), (2, 2)),
  "q3_k": ((32, 4), (64, 4), (12, 1), (2, 2)),
  "q4_k": ((2, 2), (2, 2), (12, 1), (128, 4)),
  "q5_k": ((2, 2), (2, 2), (12, 1), (32, 4), (128, 4)),
  "q6_k": ((128, 4), (64, 4), (16, 1), (2, 2)),
  "iq4_nl": ((2, 2), (16, 4)),
  "iq4_xs": ((2, 2), (2, 2), (4, 1), (128, 4)),
  **{name: form.fields for name, form in Q4_FORMATS.items()},
}


def _pieces(format: str) -> tuple[tuple[int, int, int], ...]:
  """(offset, bytes, word bytes) of the pieces of a block, in the order of the x16 layout."""
  if format == "q6_k":
    # First d and the scales; then, for each half, each 16 of its 32 bytes and each word of these,
    # the upper bits and the two words of lower bits that belong to the same weights.
    codes = [
      (offset + 16 * part + 4 * word, 4, 4)
      for half in (0, 1)
      for part in (0, 1)
      for word in range(4)
      for offset in (128 + 32 * half, 64 * half, 64 * half + 32)
    ]
    return ((208, 2, 2), (192, 16, 1), *codes)
  offsets = np.cumsum([0] + [size for size, _ in FIELDS[format]]).tolist()
  return tuple((at, size, word) for at, (size, word) in zip(offsets, FIELDS[format], strict=False))


PIECES = {format: _pieces(format) for format in FIELDS}
# The kernels' numbering (csrc/kernels.h, enum Format).
FORMAT_IDS = {name: i for i, name in enumerate(FIELDS)}
_LAWS = FORMATS | Q4_FORMATS


def block_shape(format: str) -> tuple[int, int]:
  """(weights, bytes) of one block; a float format has blocks of one weight."""
  if format in _LAWS:
    return _LAWS[format].block_size, _LAWS[format].block_bytes
  return 1, FIELDS[format][0][0]


def dequantize_blocks(blocks: jax.Array, format: str) -> jax.Array:
  """uint8[..., block_bytes] -> float32[..., block_size], bit-exact to the format's definition.

  Of NumPy or JAX arrays, and so is the result.
  """
  xp = namespace(blocks)
  if format in _LAWS:
    return _LAWS[format].dequantize(blocks, xp)
  dtype = {"f32": jnp.float32, "f16": jnp.float16, "bf16": jnp.bfloat16}[format]
  return blocks.view(dtype).astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockArray:
  """A float matrix [N, K] held as blocks of `format`. `num_rows` is N without the tile padding."""

  data: jax.Array
  format: str = dataclasses.field(metadata={"static": True})
  num_rows: int = dataclasses.field(metadata={"static": True})
  layout: str = dataclasses.field(default="rows", metadata={"static": True})

  @property
  def shape(self) -> tuple[int, int]:
    """(N, K)."""
    block_size, block_bytes = block_shape(self.format)
    row_bytes = self.data.shape[-1] // (ROWS if self.layout == "x16" else 1)
    return self.num_rows, row_bytes // block_bytes * block_size

  @property
  def nbytes(self) -> int:
    return self.data.size

  @property
  def bits_per_weight(self) -> float:
    """Bits a weight takes, scales and all (tile padding excluded)."""
    block_size, block_bytes = block_shape(self.format)
    return 8 * block_bytes / block_size

  def rows(self) -> "BlockArray":
    """The same matrix in the `rows` layout."""
    if self.layout == "rows":
      return self
    tiles, width = self.data.shape
    _, block_bytes = block_shape(self.format)
    blocks = _unpacked(self.data.reshape(tiles, -1, ROWS * block_bytes), self.format)
    parts, at = {}, 0
    for offset, size, word in PIECES[self.format]:
      part = blocks[..., at : at + ROWS * size].reshape(tiles, -1, size // word, ROWS, word)
      parts[offset] = part.transpose(0, 3, 1, 2, 4).reshape(tiles, ROWS, -1, size)
      at += ROWS * size
    in_order = [parts[offset] for offset in sorted(parts)]
    plain = jnp.concatenate(in_order, axis=-1).reshape(tiles * ROWS, width // ROWS)
    return BlockArray(plain[: self.num_rows], self.format, self.num_rows, "rows")

  def tiles(self) -> "BlockArray":
    """The same matrix in the `x16` layout, made on the host: at load, not under jit."""
    if self.layout == "x16":
      return self
    rows = np.asarray(self.data)
    out = np.empty((-(-self.num_rows // ROWS), ROWS * rows.shape[1]), np.uint8)
    for tile, part in enumerate(out):
      interleave_tile(rows[tile * ROWS : (tile + 1) * ROWS], self.format, part)
    return BlockArray(jnp.asarray(out), self.format, self.num_rows, "x16")

  def dequantize(self) -> jax.Array:
    """float32[N, K]."""
    rows = self.rows()
    _, block_bytes = block_shape(self.format)
    blocks = rows.data.reshape(self.num_rows, -1, block_bytes)
    return dequantize_blocks(blocks, self.format).reshape(self.shape)


def _unpacked(blocks: Any, format: str) -> Any:
  """Tiles' blocks, uint8[..., 16 * block_bytes], with code_words.py's words as the file's."""
  if format not in code_words.CODES:
    return blocks
  begin = ROWS * code_words.CODES[format][0]
  lines = blocks[..., begin:].reshape(*blocks.shape[:-1], -1, 4 * ROWS)
  words = code_words.unpack(lines, format).reshape(*blocks.shape[:-1], -1)
  return namespace(blocks).concatenate([blocks[..., :begin], words], -1)


def interleave_tile(rows: np.ndarray, format: str, out: np.ndarray) -> None:
  """Writes up to 16 rows (uint8[n, row_bytes]) as one x16 tile into out (uint8[16 * row_bytes])."""
  if rows.shape[0] < ROWS or not rows.flags.c_contiguous:
    padded = np.zeros((ROWS, rows.shape[1]), np.uint8)
    padded[: rows.shape[0]] = rows
    rows = padded
  codes = code_words.CODES.get(format, (0, 0))
  if ffi.to_tiles(rows, out, PIECES[format], codes):
    return
  _, block_bytes = block_shape(format)
  blocks = rows.reshape(ROWS, -1, block_bytes)
  view, at = out.reshape(-1, ROWS * block_bytes), 0
  for offset, size, word in PIECES[format]:
    part = blocks[:, :, offset : offset + size].reshape(ROWS, -1, size // word, word)
    view[:, ROWS * at : ROWS * (at + size)] = part.transpose(1, 2, 0, 3).reshape(len(view), -1)
    at += size
  if format in code_words.CODES:
    begin = ROWS * codes[0]
    lines = view[:, begin:].reshape(len(view), -1, 4 * ROWS)
    view[:, begin:] = code_words.pack(lines, format).reshape(len(view), -1)


def separate_tile(tile: np.ndarray, format: str, out: np.ndarray, packed: bool = True) -> None:
  """The inverse of `interleave_tile`: an x16 tile into its 16 rows, out (uint8[16, row_bytes]).

  Args:
    packed: False for a tile whose codes lie as the file has them, as an old .qbin's.
  """
  codes = code_words.CODES.get(format, (0, 0)) if packed else (0, 0)
  if tile.flags.c_contiguous and ffi.to_tiles(tile, out, PIECES[format], codes, reverse=True):
    return
  _, block_bytes = block_shape(format)
  blocks, at = out.reshape(ROWS, -1, block_bytes), 0
  view = tile.reshape(-1, ROWS * block_bytes)
  if packed:
    view = _unpacked(view, format)
  for offset, size, word in PIECES[format]:
    part = view[:, ROWS * at : ROWS * (at + size)].reshape(len(view), size // word, ROWS, word)
    blocks[:, :, offset : offset + size] = part.transpose(2, 0, 1, 3).reshape(ROWS, -1, size)
    at += size
