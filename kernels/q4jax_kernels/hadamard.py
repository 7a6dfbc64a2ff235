"""The rotation of heads before they are quantised: it spreads outliers over all dims of a group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def rotate(x: jax.Array) -> jax.Array:
  """x [..., H] times an orthonormal symmetric matrix, its own inverse, in x's dtype.

  Sylvester's Hadamard matrix over sqrt(n) where H is a power of two; else block-diagonal, of blocks
  of the largest power of two that divides H. Queries and keys so rotated have the same products;
  what is mixed of rotated values is rotated back by the same. (QuaRot, arXiv:2404.00456.)
  """
  h = x.shape[-1]
  block = h & -h
  matrix = jnp.asarray(_hadamard(block), jnp.float32)
  parts = x.astype(jnp.float32).reshape(*x.shape[:-1], h // block, block)
  y = jnp.einsum("...gi,ij->...gj", parts, matrix, precision=jax.lax.Precision.HIGHEST)
  return y.reshape(x.shape).astype(x.dtype)


@functools.cache
def _hadamard(n: int) -> np.ndarray:
  matrix = np.ones((1, 1))
  while len(matrix) < n:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  return matrix / np.sqrt(n)
