"""The native CPU kernels (csrc/matmul_kernel.h): weights stream once, in their blocks.

Activations are rounded as llama.cpp rounds them. For quantised weights to int8, in blocks of 256
(k-quants) with a float32 scale each or of 32 with a float16 one; for float16 weights to float16.
What float16 has no normal number for stays float32. Accumulation is int32 within a group and
float32 across.
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
