"""The words of 5- and 6-bit codes against gguf-py's dequantisers, and back."""

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize

from q4jax_kernels import code_words
from q4jax_kernels.block_array import BlockArray, interleave_tile, separate_tile

LINES = {"q5_k": 40, "q6_k": 48}


def lines(format: str) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (3, 2, LINES[format], 64), dtype=np.uint8)


@pytest.mark.parametrize("format", LINES)
def test_unpack_undoes_pack(format: str) -> None:
  plain = lines(format)
  packed = code_words.pack(plain, format)
  assert packed.dtype == np.uint8 and packed.shape == plain.shape
  assert not np.array_equal(packed, plain)
  assert np.array_equal(code_words.unpack(packed, format), plain)
  assert np.array_equal(code_words.pack(code_words.unpack(plain, format), format), plain)
  for function in (code_words.pack, code_words.unpack):
    found = function(jnp.asarray(plain), format)
    assert found.dtype == jnp.uint8 and np.array_equal(found, function(plain, format))


def test_q5_k_codes() -> None:
  """Of d = 1, dmin = 0 and scales of 1 the weights are the codes, which five words hold so."""
  rng = np.random.default_rng(1)
  rows = rng.integers(0, 256, (16, 176), dtype=np.uint8)
  rows[:, :4] = np.array([1, 0], np.float16).view(np.uint8)
  rows[:, 4:8], rows[:, 8:12], rows[:, 12:16] = 1, 0, 1
  codes = dequantize(rows, GGMLQuantizationType.Q5_K).astype(int).reshape(16, 8, 8, 4)
  assert codes.max() == 31 and codes.min() == 0
  tile = np.empty(16 * 176, np.uint8)
  interleave_tile(rows, "q5_k", tile)
  words = tile[16 * 16 :].reshape(8, 5, 16, 4).transpose(2, 0, 1, 3).astype(int)  # row, group, ...
  w = [words[:, :, i] for i in range(5)]
  found = [word & 31 for word in w]
  found += [w[0] >> 5 | (w[3] & 0x60) >> 2, w[1] >> 5 | (w[4] & 0x60) >> 2]
  found += [w[2] >> 5 | (w[3] & 0x80) >> 4 | (w[4] & 0x80) >> 3]
  assert np.array_equal(np.stack(found, 2), codes)


@pytest.mark.parametrize("format", LINES)
def test_an_old_tile(format: str) -> None:
  """Codes as the file has them, in tiles: what .qbin files once had."""
  rows = np.random.default_rng(2).integers(
    0, 256, (16, 2 * {"q5_k": 176, "q6_k": 210}[format]), dtype=np.uint8
  )
  tile = np.empty(rows.size, np.uint8)
  interleave_tile(rows, format, tile)
  begin = 16 * code_words.CODES[format][0]
  old = tile.reshape(2, -1).copy()
  old[:, begin:] = code_words.unpack(old[:, begin:].reshape(2, -1, 64), format).reshape(2, -1)
  found = np.empty_like(rows)
  separate_tile(old.reshape(-1), format, found, packed=False)
  assert np.array_equal(found, rows)
  assert np.array_equal(BlockArray(jnp.asarray(tile[None]), format, 16, "x16").rows().data, rows)
