"""A Q4Array as blocks: bytes by hand, every kind there and back, in both layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4_weights import Q4_KINDS, numpy_weights, random_q4
from q4jax_kernels.block_array import FORMAT_IDS, BlockArray
from q4jax_kernels.int4_matmul import take_rows
from q4jax_kernels.q4_array import Q4Array, pack_pairs
from q4jax_kernels.q4_blocks import from_blocks, to_blocks
from q4jax_kernels.q4_formats import Q4_FORMATS


def assert_same(found: Q4Array, expected: Q4Array) -> None:
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_names_and_order_are_the_kernels() -> None:
  assert list(Q4_FORMATS)[:5] == ["q4s8_f16", "q4s8_f32", "q4a8_f16", "q4a8_f32", "q4s16_f16"]
  assert FORMAT_IDS["q4s8_f16"] == 15 and FORMAT_IDS["q4a256_f32"] == 38


def test_bytes_by_hand() -> None:
  """Groups of 16: two scales, two minimums, then byte i has weight i low and weight i + 16 high."""
  codes = np.zeros((1, 32), np.uint8)
  codes[0, [0, 1, 16, 31]] = [1, 2, 3, 15]
  w = Q4Array(pack_pairs(codes), np.float16([[1.0, 2.0]]), np.float16([[0.5, -1.0]]))
  blocks = to_blocks(w)
  assert blocks.format == "q4a16_f16"
  data = blocks.data[0]
  assert data[:8].view(np.float16).tolist() == [1.0, 2.0, 0.5, -1.0]
  assert data[8:].tolist() == [0x31, 0x02, *[0] * 13, 0xF0]


def test_bytes_of_a_long_group_by_hand() -> None:
  """Groups of 128 in a block of 256: weight i low and weight i + 32 high in runs of 32 bytes."""
  codes = np.zeros((1, 256), np.uint8)
  codes[0, [0, 32, 64, 255]] = [1, 2, 3, 4]
  blocks = to_blocks(Q4Array(pack_pairs(codes), np.float32([[1.5, 1e-30]])))
  assert blocks.format == "q4s128_f32"
  data = blocks.data[0]
  assert data[:8].view(np.float32).tolist() == [1.5, np.float32(1e-30)]
  assert (data[8], data[8 + 32], data[8 + 127]) == (0x21, 0x03, 0x40)


@pytest.mark.parametrize("group, symmetric, dtype", Q4_KINDS)
def test_there_and_back(group: int | str, symmetric: bool, dtype: str) -> None:
  w = random_q4(np.random.default_rng(0), 37, 512, group, symmetric, dtype)
  blocks = to_blocks(w)
  assert blocks.shape == w.shape
  tiles = blocks.tiles()
  assert (tiles.layout, tiles.shape) == ("x16", w.shape)
  for source in (blocks, BlockArray(np.asarray(tiles.data), tiles.format, 37, "x16")):
    assert_same(from_blocks(source, like=w), w)
  expected = numpy_weights(w)
  plain = from_blocks(blocks)
  assert np.asarray(plain.dequantize()).tobytes() == expected.tobytes()
  ids = np.array([36, 0, 5], np.int32)
  taken = take_rows(tiles, jnp.asarray(ids))  # Native where the library is.
  np.testing.assert_allclose(taken, expected[ids], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  "k, group, format",
  [
    (512, 32, "q4s32_f16"),
    (96, 24, "q4s8_f16"),  # 24 is three groups of 8
    (96, 48, "q4s16_f16"),
    (768, 192, "q4s64_f16"),
    (160, 160, "q4s32_f16"),  # one group a row, K not of 256
    (512, 512, "q4s256_f16"),
    (128, 128, "q4s32_f16"),
  ],
)
def test_the_longest_group_that_fits(k: int, group: int, format: str) -> None:
  rng = np.random.default_rng(1)
  packed = rng.integers(0, 256, (3, k // 2), dtype=np.uint8)
  w = Q4Array(packed, rng.normal(size=(3, k // group)).astype(np.float16))
  blocks = to_blocks(w)
  assert blocks.format == format
  assert from_blocks(blocks).dequantize().tobytes() == numpy_weights(w).tobytes()
  assert_same(from_blocks(blocks, like=w), w)


def test_float16_only_where_it_holds_the_scales() -> None:
  packed = np.zeros((1, 16), np.uint8)
  for scale, ends in ((0.25, "f16"), (-0.0, "f16"), (1e-30, "f32"), (7e4, "f32"), (0.1, "f32")):
    w = Q4Array(packed, np.float32([[scale]]))
    assert to_blocks(w).format == f"q4s32_{ends}", scale
    assert_same(from_blocks(to_blocks(w), like=w), w)
  w = Q4Array(packed, np.float32([[0.25]]), np.float32([[0.1]]))
  assert to_blocks(w).format == "q4a32_f32"


def test_refusals() -> None:
  with pytest.raises(NotImplementedError, match="K=40 and group_size=8"):
    to_blocks(random_q4(np.random.default_rng(0), 2, 40, 8, True))
  packed = np.zeros((2, 32), np.uint8)
  with pytest.raises(NotImplementedError, match="K=64 and group_size=4"):
    to_blocks(Q4Array(packed, np.ones((2, 16), np.float16)))
  with pytest.raises(ValueError, match="q4_0 blocks do not hold a Q4Array"):
    from_blocks(BlockArray(np.zeros((2, 18), np.uint8), "q4_0", 2))
