"""The rotation against SciPy's Hadamard matrices, and that products stay."""

import numpy as np
import pytest
import scipy.linalg

from q4jax.errors import ConfigError
from q4jax.quant import rtn
from q4jax.quant.grid import Grid, fake_quant
from q4jax.quant.rotate import block_of, rotate
from q4jax_kernels import hadamard


@pytest.mark.parametrize(
  "k, block", [(8, 8), (96, 32), (128, 128), (384, 128), (7, 1), (1024, 1024)]
)
def test_is_scipys_on_the_diagonal(k, block):
  assert block_of(k) == block
  one = scipy.linalg.hadamard(block) / np.sqrt(block)
  expected = np.kron(np.eye(k // block), one)
  np.testing.assert_allclose(rotate(np.eye(k, dtype=np.float32)), expected, atol=1e-7)


def test_smaller_blocks_and_other_shapes():
  x = np.random.default_rng(0).standard_normal((2, 3, 96)).astype(np.float32)
  one = np.kron(np.eye(24), scipy.linalg.hadamard(4) / 2)
  np.testing.assert_allclose(rotate(x, 4), x @ one, atol=1e-5)
  np.testing.assert_allclose(rotate(x), np.asarray(hadamard.rotate(x)), atol=1e-5)  # The kernels'.
  np.testing.assert_array_equal(rotate(x, 1), x)
  assert rotate(x[:0]).shape == (0, 3, 96)


def test_products_stay_and_twice_is_nothing():
  rng = np.random.default_rng(0)
  w = rng.standard_normal((700, 1536)).astype(np.float32)  # More than one run of rows.
  x = rng.standard_normal((5, 1536)).astype(np.float32)
  np.testing.assert_allclose(rotate(x) @ rotate(w).T, x @ w.T, atol=2e-3)
  np.testing.assert_allclose(rotate(rotate(w)), w, atol=1e-5)


def test_it_pays_for_channels_with_outliers():
  rng = np.random.default_rng(0)
  w = rng.standard_normal((64, 1024)).astype(np.float32)
  w[:, ::100] *= 20
  grid = Grid(4, "channel", "absmax")

  def error(x):
    return np.square(fake_quant(x, grid, rtn.fit(x, grid)) - x).mean()

  assert error(rotate(w)) < 0.2 * error(w)


@pytest.mark.parametrize("block", [0, 3, 64, -2])
def test_wrong_blocks_are_named(block):
  with pytest.raises(ConfigError, match=rf"block={block} must be a power of two that divides K=96"):
    rotate(np.ones((2, 96), np.float32), block)
