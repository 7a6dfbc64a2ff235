"""The rows that the Hopper kernel reads: the same bits as the planar array's, there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import random_blocks
from q4_weights import Q4_KINDS, random_q4
from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.int4_matmul import int4_matmul, take_rows
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.row_planar_array import RowPlanarArray

FORMATS = ("q4_0", "q4_1", "q4_k", "q5_k", "q6_k", "q8_0")


def assert_same(a: PlanarArray, b: PlanarArray) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(left, right)


def from_blocks(format: str, n: int, k: int) -> tuple[np.ndarray, PlanarArray]:
  rows = random_blocks.random_rows(np.random.default_rng(0), format, n, k)
  return rows, PlanarArray.from_blocks(BlockArray(jnp.asarray(rows), format, n))


@pytest.mark.parametrize("format", FORMATS)
def test_blocks_come_back(format: str) -> None:
  rows, planar = from_blocks(format, 5, 512)
  w = RowPlanarArray.from_planar(planar)
  assert w.shape == (5, 512) and w.group_size == planar.group_size
  assert_same(w.to_planar(), planar)
  np.testing.assert_array_equal(w.dequantize(), random_blocks.dequantize(rows, format))


@pytest.mark.parametrize(("group", "symmetric", "dtype"), Q4_KINDS)
def test_q4_comes_back(group: int | str, symmetric: bool, dtype: str) -> None:
  planar = PlanarArray.from_q4(random_q4(np.random.default_rng(1), 3, 512, group, symmetric, dtype))
  w = RowPlanarArray.from_planar(planar)
  assert w.scale.dtype == jnp.dtype(dtype)
  assert_same(w.to_planar(), planar)


@pytest.mark.parametrize("format", FORMATS)
def test_codes_are_signed(format: str) -> None:
  """Against the planar codes, by the law that the module states."""
  _, planar = from_blocks(format, 3, 512)
  w, codes = RowPlanarArray.from_planar(planar), np.asarray(planar.codes()).T.astype(int)
  half = 2 ** (w.bits[0] - 1)
  low = np.asarray(w.planes[0].astype(jnp.int8)).astype(int)
  np.testing.assert_array_equal(low, codes % (2 * half) - half)
  for plane, bits in zip(w.planes[1:], w.bits[1:], strict=True):
    flipped = np.asarray(plane).astype(np.uint8) ^ 0x80
    for column in range(0, 512, 37):
      chunk, at = divmod(column, 256)
      byte, slot = at % (32 * bits), at // (32 * bits)
      found = flipped[:, chunk * 32 * bits + byte] >> bits * slot & (1 << bits) - 1
      np.testing.assert_array_equal(found, codes[:, column] >> 4)


@pytest.mark.parametrize(("format", "most"), [("q4_0", 4.5), ("q4_k", 4.625), ("q6_k", 6.5625)])
def test_bytes(format: str, most: float) -> None:
  _, planar = from_blocks(format, 4, 512)
  assert RowPlanarArray.from_planar(planar).nbytes * 8 == most * 4 * 512


@pytest.mark.parametrize("format", FORMATS)
def test_door(format: str) -> None:
  """Where the Hopper kernel cannot run, XLA takes these rows too; embeddings are looked up."""
  rows, planar = from_blocks(format, 64, 256)
  w, weights = RowPlanarArray.from_planar(planar), random_blocks.dequantize(rows, format)
  x = np.random.default_rng(2).normal(0, 1, (3, 256)).astype(np.float32)
  exact, size = x @ weights.T.astype(np.float64), np.abs(x) @ np.abs(weights.T)
  for name in (None, "xla", "reference"):
    [y] = int4_matmul(jnp.asarray(x), [w], name)
    np.testing.assert_array_less(np.abs(y - exact), 2e-6 * size + 1e-30)
  ids = np.array([5, 0, 63, 5])
  np.testing.assert_array_equal(take_rows(w, jnp.asarray(ids)), weights[ids])


def test_refuses_half_chunks() -> None:
  planes = (jnp.zeros((64, 2), jnp.uint8), jnp.zeros((32, 2), jnp.uint8))
  scale = jnp.ones((8, 2))
  planar = PlanarArray(planes, scale, None, None, None, (4, 2), 32, "q6_k")
  with pytest.raises(NotImplementedError, match="K = 128"):
    RowPlanarArray.from_planar(planar)
