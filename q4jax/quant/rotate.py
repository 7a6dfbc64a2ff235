"""Hadamard rotation of a matrix's inputs: (W H) (H x) = W x, and outliers are spread over many.

H is symmetric and orthonormal, its own inverse: Sylvester's Hadamard matrix over its root, repeated
along the diagonal where K is not a power of two, in blocks of the largest power of two that divides
K. (QuaRot, arXiv:2404.00456.) What it is for: one scale a channel, activations of few bits, KV; the
scales of small groups adapt to outliers by themselves.
"""

import functools
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from q4jax.errors import ConfigError
from q4jax.quant.grid import Floats
from q4jax.quant.rows import by_rows


def block_of(k: int, block: int | None = None) -> int:
  """The size of the rotation's blocks: `block`, or the largest power of two that divides K.

  Raises:
    ConfigError: a block that is no power of two or does not divide K.
  """
  largest = k & -k
  if block is None:
    return largest
  if block < 1 or block & (block - 1) or largest % block:
    raise ConfigError(f"block={block} must be a power of two that divides K={k}; {largest} is.")
  return block


def rotate(w: NDArray[np.floating], block: int | None = None) -> Floats:
  """w H for float[..., K], float32; applied twice it is w again, up to rounding.

  The same call rotates inputs x [..., K] of the matrix.
  """
  size = block_of(w.shape[-1], block)
  rows = w.reshape(-1, w.shape[-1])
  if not rows.size:
    return w.astype(np.float32)
  # H of a * b is the Kronecker product of those of a and b: two products with small matrices.
  inner = min(size, 64)
  outer = size // inner
  scale = np.float32(1 / np.sqrt(size))

  def chunk(start: int, stop: int) -> Floats:
    x = rows[start:stop].astype(np.float32).reshape(-1, outer, inner) @ _hadamard(inner)
    return np.asarray(scale * (_hadamard(outer) @ x)).reshape(stop - start, -1)

  return by_rows(chunk, rows.shape).reshape(w.shape)


@dataclass(frozen=True, eq=False)
class Rotation:
  """Q = diag(signs) H, orthogonal: QuaRot's randomised Hadamard matrix (section 3 there).

  The random signs are for what all rows have in common, which H alone may gather in one place as
  well as spread.

  Attributes:
    signs: float32[K] of 1 and -1.
  """

  signs: Floats

  @classmethod
  def random(cls, k: int, rng: np.random.Generator) -> Self:
    return cls(rng.choice(np.array([-1, 1], np.float32), k))

  def inputs(self, w: NDArray[np.floating]) -> Floats:
    """w Q for float[..., K], float32: a matrix for inputs x Q, or such inputs."""
    return rotate(w * self.signs)

  def outputs(self, w: NDArray[np.floating]) -> Floats:
    """Q^T w for float[..., K, N], float32: a matrix whose outputs y become y Q."""
    return self.inputs(w.swapaxes(-1, -2)).swapaxes(-1, -2)


@functools.cache
def _hadamard(n: int) -> Floats:
  """Sylvester's, of 1 and -1."""
  matrix = np.ones((1, 1), np.float32)
  while len(matrix) < n:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  return matrix
