"""The rotation of heads against SciPy's Hadamard matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from q4jax_kernels.hadamard import rotate

# head_dim, and the block its matrix is made of: the largest power of two that divides it.
HEADS = [(8, 8), (64, 64), (128, 128), (256, 256), (96, 32), (80, 16), (48, 16), (7, 1)]


def matrix(h: int) -> np.ndarray:
  """What `rotate` multiplies by, column by column."""
  return np.asarray(rotate(jnp.eye(h)), np.float64)


@pytest.mark.parametrize(("h", "block"), HEADS)
def test_is_scipys_on_the_diagonal(h: int, block: int) -> None:
  one = scipy.linalg.hadamard(block) / np.sqrt(block)
  np.testing.assert_allclose(matrix(h), np.kron(np.eye(h // block), one), atol=1e-7)


@pytest.mark.parametrize("h", [h for h, _ in HEADS])
def test_orthonormal_symmetric_and_its_own_inverse(h: int) -> None:
  m = matrix(h)
  np.testing.assert_allclose(m @ m.T, np.eye(h), atol=1e-6)
  np.testing.assert_array_equal(m, m.T)
  x = np.random.default_rng(h).normal(size=(2, 3, h)).astype(np.float32)
  np.testing.assert_allclose(rotate(rotate(jnp.array(x))), x, atol=2e-6)


@pytest.mark.parametrize("h", [8, 96, 128])
def test_products_of_queries_and_keys_stay(h: int) -> None:
  q, k = np.random.default_rng(0).normal(size=(2, 5, h)).astype(np.float32)
  rotated = np.asarray(rotate(jnp.array(q))) @ np.asarray(rotate(jnp.array(k))).T
  np.testing.assert_allclose(rotated, q @ k.T, atol=2e-5)


def test_spreads_an_outlier_over_the_head() -> None:
  x = jnp.zeros(64).at[5].set(8.0)
  np.testing.assert_allclose(jnp.abs(rotate(x)), 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_keeps_the_dtype_and_rounds_once(dtype: jnp.dtype) -> None:
  x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 64)), dtype)
  once = jax.jit(rotate)(x)
  assert once.dtype == dtype
  exact = np.asarray(x, np.float64) @ scipy.linalg.hadamard(64) / 8
  np.testing.assert_allclose(np.asarray(once, np.float64), exact, atol=jnp.finfo(dtype).eps * 4)
