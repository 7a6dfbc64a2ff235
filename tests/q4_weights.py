"""Random Q4Arrays of every kind, and what they mean in NumPy."""

import jax.numpy as jnp
import numpy as np

from q4jax_kernels.q4_array import Q4Array

GROUP_SIZES = (8, 16, 32, 64, 128, 256)
SCALE_DTYPES = ("float16", "bfloat16", "float32")
# (group, symmetric, dtype of the scales): every group both ways, the dtypes in turn.
Q4_KINDS = [
  (group, symmetric, SCALE_DTYPES[(i + symmetric) % 3])
  for i, group in enumerate((*GROUP_SIZES, "row", "tensor"))
  for symmetric in (True, False)
]


def random_q4(
  rng: np.random.Generator,
  n: int,
  k: int,
  group: int | str,
  symmetric: bool,
  dtype: str = "float16",
  scale: float = 0.01,
) -> Q4Array:
  """Random codes; scales and minimums of either sign from N(0, scale^2); NumPy arrays."""
  groups = 1 if isinstance(group, str) else k // group
  shape = (1 if group == "tensor" else n, groups)

  def draw(size: float) -> np.ndarray:
    return rng.normal(0, size, shape).astype(jnp.dtype(dtype))

  packed = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
  return Q4Array(packed, draw(scale), None if symmetric else draw(4 * scale))


def numpy_weights(w: Q4Array) -> np.ndarray:
  """float32[N, K] by plain loops over groups, in the order that the law states."""
  packed = np.asarray(w.packed)
  n, k = packed.shape[0], 2 * packed.shape[1]
  codes = np.empty((n, k), np.float32)
  codes[:, 0::2], codes[:, 1::2] = packed % 16, packed // 16
  groups = w.scale.shape[1]
  size, out = k // groups, np.empty((n, k), np.float32)
  for row in range(n):
    for g in range(groups):
      at, i = slice(g * size, (g + 1) * size), row if w.scale.shape[0] > 1 else 0
      s = np.float32(w.scale[i, g])
      if w.minimum is None:
        out[row, at] = s * (codes[row, at] - np.float32(8))
      else:
        out[row, at] = s * codes[row, at] - np.float32(w.minimum[i, g])
  return out
