"""The specification: dequantise, multiply in float32. What every implementation is held to."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from q4jax_kernels.block_array import BlockArray, block_shape, dequantize_blocks
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.q4_array import Q4Array
from q4jax_kernels.row_planar_array import RowPlanarArray

Weight = BlockArray | Q4Array | PlanarArray | RowPlanarArray


def int4_matmul(x: jax.Array, ws: Sequence[Weight]) -> list[jax.Array]:
  """x float[M, K] times each weight's transpose, in float32 throughout: [M, N_i] in x's dtype."""
  x32 = x.astype(jnp.float32)
  return [
    jnp.dot(x32, w.dequantize().T, precision=jax.lax.Precision.HIGHEST).astype(x.dtype) for w in ws
  ]


def take_rows(w: Weight, ids: jax.Array) -> jax.Array:
  """Rows `ids` int32[T] of the matrix as float32[T, K]; only those rows are dequantised.

  An id outside the matrix takes the nearest row.
  """
  if isinstance(w, RowPlanarArray):
    return w.take(ids).dequantize()
  if isinstance(w, PlanarArray):
    return jax.tree.map(lambda part: jnp.take(part, ids, axis=1, mode="clip"), w).dequantize()
  if isinstance(w, Q4Array):
    shared = w.scale.shape[0] == 1

    def take(part: jax.Array) -> jax.Array:
      return part if shared else jnp.take(part, ids, axis=0, mode="clip")

    minimum = None if w.minimum is None else take(w.minimum)
    packed = jnp.take(w.packed, ids, axis=0, mode="clip")
    return Q4Array(packed, take(w.scale), minimum).dequantize()
  block_size, block_bytes = block_shape(w.format)
  blocks = jnp.take(w.rows().data, ids, axis=0, mode="clip")
  blocks = blocks.reshape(ids.shape[0], w.shape[1] // block_size, block_bytes)
  return dequantize_blocks(blocks, w.format).reshape(ids.shape[0], w.shape[1])
