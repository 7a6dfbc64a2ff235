"""The canonical 4-bit matrix: codes packed two a byte, one scale (and minimum) a group of inputs.

  w[n, k] = scale[n, g] * code[n, k] - minimum[n, g],    g = k // group_size
  w[n, k] = scale[n, g] * (code[n, k] - 8)               symmetric: minimum is None

computed in float32 in this order. Codes are 0..15; byte b of a row holds code 2b in its low nibble
and code 2b + 1 in its high one. `group_size` is K for one scale a row ([N, 1]); a scale of shape
[1, 1] serves the whole matrix.
"""

import dataclasses
from types import ModuleType
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

SYMMETRIC_OFFSET = 8
_FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q4Array:
  """A float matrix [N, K]. Build with `Q4Array(...).validated()` where the parts come from outside.

  The constructor itself checks nothing: JAX builds pytrees of placeholders with it.
  Of NumPy or JAX arrays, and so are its results.
  """

  packed: jax.Array  # uint8[N, K / 2]
  scale: jax.Array  # float16, bfloat16 or float32 [N, G], or [1, 1]
  minimum: jax.Array | None = None  # as scale

  @property
  def shape(self) -> tuple[int, int]:
    """(N, K)."""
    return self.packed.shape[0], 2 * self.packed.shape[1]

  @property
  def group_size(self) -> int:
    """Inputs that share a scale; K where one scale serves a row or the matrix."""
    return self.shape[1] // self.scale.shape[1]

  @property
  def per_tensor(self) -> bool:
    """Whether one scale serves the whole matrix."""
    return self.scale.shape == (1, 1)

  @property
  def nbytes(self) -> int:
    parts = [self.packed, self.scale] + ([] if self.minimum is None else [self.minimum])
    return sum(part.size * part.dtype.itemsize for part in parts)

  @property
  def bits_per_weight(self) -> float:
    """Bits a weight takes, scales and all."""
    n, k = self.shape
    return 8 * self.nbytes / (n * k)

  def validated(self) -> Self:
    """This array, if its parts fit together; ValueError naming what does not."""
    packed, scale, minimum = self.packed, self.scale, self.minimum
    if packed.dtype != jnp.uint8 or packed.ndim != 2:
      raise ValueError(
        f"packed is {packed.dtype}{list(packed.shape)}; it must be uint8[N, K / 2], two codes a "
        "byte, even inputs in the low nibble."
      )
    if scale.dtype not in _FLOATS:
      raise ValueError(f"scale is {scale.dtype}; it must be float16, bfloat16 or float32.")
    n, k = self.shape
    if scale.ndim != 2 or scale.shape[0] not in (n, 1) or (not self.per_tensor and len(scale) != n):
      raise ValueError(
        f"scale has shape {list(scale.shape)}; a matrix of shape {[n, k]} needs [{n}, groups] or "
        "[1, 1]."
      )
    groups = scale.shape[1]
    if groups == 0 or k % groups or k // groups % 2:
      raise ValueError(
        f"K={k} does not divide into the {groups} groups that scale has: K must be an even "
        "multiple of the number of groups."
      )
    if minimum is not None and (minimum.shape, minimum.dtype) != (scale.shape, scale.dtype):
      raise ValueError(
        f"minimum is {minimum.dtype}{list(minimum.shape)} where scale is "
        f"{scale.dtype}{list(scale.shape)}; they must match."
      )
    return self

  def codes(self) -> jax.Array:
    """uint8[N, K], 0..15."""
    pairs = namespace(self.packed).stack([self.packed & 15, self.packed >> 4], axis=-1)
    return pairs.reshape(self.shape)

  def dequantize(self) -> jax.Array:
    """float32[N, K]."""
    groups = self.codes().reshape(self.shape[0], self.scale.shape[1], self.group_size)
    codes, scale = groups.astype(np.float32), self.scale.astype(np.float32)[..., None]
    if self.minimum is None:
      return (scale * (codes - np.float32(SYMMETRIC_OFFSET))).reshape(self.shape)
    return (scale * codes - self.minimum.astype(np.float32)[..., None]).reshape(self.shape)

  @classmethod
  def round_to_nearest(
    cls,
    w: jax.Array,
    group_size: int,
    *,
    symmetric: bool = False,
    scale_dtype: jnp.dtype = jnp.float16,
  ) -> Self:
    """The nearest codes on each group's min-max grid: the plainest quantiser.

    Args:
      w: float[N, K].
      group_size: even, divides K; K for one scale a row.
      symmetric: codes around 8 with scale max|w| / 7, instead of 0..15 from the group's minimum.
    """
    n, k = w.shape
    if group_size < 2 or group_size % 2 or k % group_size:
      raise ValueError(f"group_size={group_size} must be even and divide K={k}.")
    groups = w.astype(jnp.float32).reshape(n, k // group_size, group_size)
    if symmetric:
      largest = jnp.abs(groups).max(-1)
      scale, minimum = (largest / 7).astype(scale_dtype), None
      shift = jnp.float32(SYMMETRIC_OFFSET)
    else:
      low, high = jnp.minimum(groups.min(-1), 0), jnp.maximum(groups.max(-1), 0)
      scale, minimum = ((high - low) / 15).astype(scale_dtype), (-low).astype(scale_dtype)
      shift = 0
      groups = groups + minimum.astype(jnp.float32)[..., None]
    step = scale.astype(jnp.float32)[..., None]
    codes = jnp.round(groups / jnp.where(step > 0, step, 1)) + shift
    codes = jnp.clip(codes, 0, 15).astype(jnp.uint8).reshape(n, k)
    return cls(pack_pairs(codes), scale, minimum).validated()


def pack_pairs(codes: jax.Array) -> jax.Array:
  """uint8[..., K] codes 0..15 -> uint8[..., K / 2], even k in the low nibble."""
  return codes[..., 0::2] | codes[..., 1::2] << 4


def namespace(x: jax.Array) -> ModuleType:
  """`numpy` for a NumPy array, which stays on the host, otherwise `jax.numpy`."""
  return np if isinstance(x, np.ndarray) else jnp
