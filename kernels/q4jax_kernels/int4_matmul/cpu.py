"""The native CPU kernels (csrc/matmul_kernel.h): weights stream once, in their blocks.

Activations of quantised weights are rounded to int8 in blocks of 256 (k-quants) or 32 weights with
a float32 scale each, as llama.cpp does; accumulation is int32 within a group and float32 across.
Float weights are multiplied in float32.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from q4jax_kernels import ffi
from q4jax_kernels.block_array import FORMAT_IDS, BlockArray


def supports(ws: Sequence[BlockArray]) -> bool:
  """Whether the library is there and every weight is in the layout it reads."""
  return all(w.layout == "x16" for w in ws) and ffi.available()


def int4_matmul(x: jax.Array, ws: Sequence[BlockArray], isa: str = "best") -> list[jax.Array]:
  """x float32[M, K] times each weight's transpose: float32[M, N_i], one call for all weights."""
  call = jax.ffi.ffi_call(
    "q4jax_matmul", [jax.ShapeDtypeStruct((x.shape[0], w.num_rows), jnp.float32) for w in ws]
  )
  ys = call(
    x.astype(jnp.float32),
    *(w.data for w in ws),
    formats=np.array([FORMAT_IDS[w.format] for w in ws], np.int64),
    isa=np.int64(ffi.ISA_IDS[isa]),
  )
  return [y.astype(x.dtype) for y in ys]


def take_rows(w: BlockArray, ids: jax.Array, isa: str = "best") -> jax.Array:
  """Rows `ids` int32[T] as float32[T, K]."""
  call = jax.ffi.ffi_call(
    "q4jax_take_rows", jax.ShapeDtypeStruct((ids.shape[0], w.shape[1]), jnp.float32)
  )
  return call(
    ids,
    w.data,
    format=np.int64(FORMAT_IDS[w.format]),
    num_rows=np.int64(w.num_rows),
    isa=np.int64(ffi.ISA_IDS[isa]),
  )
