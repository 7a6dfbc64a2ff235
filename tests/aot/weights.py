"""Weights without values: what a compiler needs to know of them."""

import jax
import jax.numpy as jnp

from q4jax_kernels.block_array import BlockArray, block_shape
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.q4_array import Q4Array


def blocks(format: str, k: int, n: int) -> PlanarArray:
  """A weight of a GGUF format, without values."""
  size, nbytes = block_shape(format)
  rows = jax.ShapeDtypeStruct((n, k // size * nbytes), jnp.uint8)
  return jax.eval_shape(lambda rows: PlanarArray.from_blocks(BlockArray(rows, format, n)), rows)


def q4(group_size: int | None, symmetric: bool, k: int, n: int) -> PlanarArray:
  """A 4-bit weight without values; one scale for all of K where group_size is None."""
  scale = jax.ShapeDtypeStruct((n, k // group_size if group_size else 1), jnp.float16)
  packed = jax.ShapeDtypeStruct((n, k // 2), jnp.uint8)
  w = Q4Array(packed, scale, None if symmetric else scale)
  return jax.eval_shape(PlanarArray.from_q4, w)
