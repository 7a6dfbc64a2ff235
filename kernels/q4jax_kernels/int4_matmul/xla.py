"""XLA on any device: dequantise to bfloat16 (float32 on a CPU) and use the device's matmul.

The dequantised matrix is a temporary of the size of one weight. This path is what runs where there
is no kernel that avoids it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.q4_array import Q4Array
from q4jax_kernels.row_planar_array import RowPlanarArray

Weight = BlockArray | Q4Array | PlanarArray | RowPlanarArray


def int4_matmul(x: jax.Array, ws: Sequence[Weight]) -> list[jax.Array]:
  """x float[M, K] times each weight's transpose, float32 accumulation: [M, N_i] in x's dtype."""
  return jax.lax.platform_dependent(
    x,
    *ws,
    cpu=lambda x, *ws: [_matmul(x, w, jnp.float32) for w in ws],
    default=lambda x, *ws: [_matmul(x, w, jnp.bfloat16) for w in ws],
  )


def _matmul(x: jax.Array, w: Weight, dtype: jnp.dtype) -> jax.Array:
  weight = w.dequantize().astype(dtype)
  y = jax.lax.dot_general(
    x.astype(dtype), weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
  )
  return y.astype(x.dtype)
