"""PlanarArray: bytes by hand, every source's weights bit for bit, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import random_blocks
from q4_weights import Q4_KINDS, numpy_weights, random_q4
from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.block_parts import PARTS
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.q4_array import Q4Array


def same_bits(found: jax.Array, expected: np.ndarray) -> None:
  assert found.dtype == expected.dtype and found.shape == expected.shape
  assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def test_planes_by_hand() -> None:
  """Two outputs of four inputs: byte (r, n) holds codes 2r (low nibble) and 2r + 1 of output n."""
  w = Q4Array(
    np.array([[0x21, 0x43], [0x65, 0x87]], np.uint8), np.array([[2.0], [1.0]], np.float32)
  )
  planar = PlanarArray.from_q4(w)
  assert planar.planes[0].tolist() == [[0x21, 0x65], [0x43, 0x87]]
  assert (planar.scale.tolist(), planar.offset) == ([[2.0, 1.0]], 8)
  assert planar.dequantize().tolist() == [[-14, -12, -10, -8], [-3, -2, -1, 0]]


def test_upper_planes_by_hand() -> None:
  """q6_k: weight 0 has code 0b01_0011, weight 1 has 0b10_0001; the high bits lie four a byte."""
  block = np.zeros((1, 210), np.uint8)
  block[0, 0:2] = [0b0011, 0b0001]  # low nibbles of weights 0 and 1
  block[0, 128:130] = [0b01, 0b10]  # high bits of weights 0 and 1
  block[0, 192] = 254  # the scale of group 0: -2
  block[0, 208:210] = [0x00, 0x38]  # d = 0.5
  planar = PlanarArray.from_blocks(BlockArray(block, "q6_k", 1))
  low, high = planar.planes
  assert (low.shape, high.shape) == ((128, 1), (64, 1))
  assert (int(low[0, 0]), int(high[0, 0])) == (0x13, 0b1001)
  assert (planar.scale.tolist(), int(planar.scale_code[0, 0])) == ([[0.5]], -2)
  assert planar.dequantize()[0, :2].tolist() == [-(0b010011 - 32), -(0b100001 - 32)]


@pytest.mark.parametrize("format", PARTS)
def test_blocks_there_and_back(format: str) -> None:
  rows = random_blocks.random_rows(np.random.default_rng(2), format, 7, 768)
  planar = PlanarArray.from_blocks(BlockArray(rows, format, 7))
  assert planar.shape == (7, 768) and planar.num_rows == 7
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(planar))
  same_bits(planar.dequantize(), random_blocks.dequantize(rows, format))
  back = planar.to_blocks()
  assert (back.format, back.layout, back.num_rows) == (format, "rows", 7)
  same_bits(back.data, rows)


@pytest.mark.parametrize("format", PARTS)
def test_blocks_on_a_device(format: str) -> None:
  """JAX gives the same planes, and under jit the same weights but for fused roundings."""
  rows = random_blocks.random_rows(np.random.default_rng(2), format, 7, 768)
  blocks = BlockArray(jnp.asarray(rows), format, 7)
  planar, w, back = jax.jit(
    lambda b: (p := PlanarArray.from_blocks(b), p.dequantize(), p.to_blocks())
  )(blocks)
  host = PlanarArray.from_blocks(BlockArray(rows, format, 7))
  for found, expected in zip(jax.tree.leaves(planar), jax.tree.leaves(host), strict=True):
    same_bits(found, expected)
  np.testing.assert_allclose(w, host.dequantize(), rtol=1e-6, atol=1e-5)
  same_bits(back.data, rows)


@pytest.mark.parametrize("format, group, bits", [
  ("q4_0", 32, 4 + 32 / 32),
  ("q4_1", 32, 4 + 64 / 32),
  ("q4_k", 32, 4 + 2 * 32 / 256 + 2 * 8 / 32),
  ("q5_k", 32, 5 + 2 * 32 / 256 + 2 * 8 / 32),
  ("q6_k", 16, 6 + 32 / 256 + 8 / 16),
  ("q8_0", 32, 8 + 32 / 32),
])  # fmt: skip
def test_sizes(format: str, group: int, bits: float) -> None:
  rows = random_blocks.random_rows(np.random.default_rng(2), format, 3, 512)
  planar = PlanarArray.from_blocks(BlockArray(rows, format, 3))
  assert (planar.group_size, planar.bits_per_weight) == (group, bits)


@pytest.mark.parametrize("group, symmetric, dtype", Q4_KINDS)
def test_q4_there_and_back(group: int | str, symmetric: bool, dtype: str) -> None:
  w = random_q4(np.random.default_rng(3), 5, 512, group, symmetric, dtype)
  planar = PlanarArray.from_q4(w)
  assert (planar.shape, planar.group_size) == (w.shape, w.group_size)
  same_bits(planar.dequantize(), numpy_weights(w))
  back = planar.to_q4().validated()
  assert back.scale.shape == w.scale.shape
  for found, expected in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
    same_bits(found, np.asarray(expected))


@pytest.mark.parametrize("format", PARTS)
def test_the_product_of_split_x_is_the_product(format: str) -> None:
  """The identity of the module's docstring, in float64: what every kernel computes."""
  rng = np.random.default_rng(4)
  rows = random_blocks.random_rows(rng, format, 5, 512)
  w = PlanarArray.from_blocks(BlockArray(rows, format, 5))
  x = rng.normal(size=(3, 512))
  s, m = (None if f is None else np.asarray(f, np.float64) for f in w.factors())
  y, below = np.zeros((3, 5)), 0
  for plane, bits in zip(w.planes, w.bits, strict=True):
    per_byte = 8 // bits
    scale = np.repeat(s, w.group_size // per_byte, axis=0)
    for j in range(per_byte):
      codes = plane >> bits * j & (2**bits - 1)
      y += 2**below * (x[:, j::per_byte] @ (scale * codes))
    below += bits
  y -= x.reshape(3, w.num_groups, -1).sum(-1) @ (w.offset * s + (0 if m is None else m))
  np.testing.assert_allclose(y, x @ random_blocks.dequantize(rows, format).T, rtol=1e-5, atol=1e-6)


def test_refusals() -> None:
  rows = random_blocks.random_rows(np.random.default_rng(5), "q3_k", 2, 256)
  with pytest.raises(NotImplementedError, match="q3_k has no planar form; q4_0"):
    PlanarArray.from_blocks(BlockArray(jnp.asarray(rows), "q3_k", 2))
  rows = random_blocks.random_rows(np.random.default_rng(5), "q4_0", 2, 256)
  planar = PlanarArray.from_blocks(BlockArray(jnp.asarray(rows), "q4_0", 2))
  with pytest.raises(ValueError, match="from q4_0 blocks"):
    planar.to_q4()
  q4 = random_q4(np.random.default_rng(5), 2, 64, 32, True)
  with pytest.raises(ValueError, match="from a Q4Array"):
    PlanarArray.from_q4(q4).to_blocks()
