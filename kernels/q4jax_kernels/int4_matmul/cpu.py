"""The native CPU kernels (csrc/matmul_kernel.h): weights stream once, in their blocks.

Activations are rounded as llama.cpp rounds them. For quantised weights to int8, in blocks of 256
(k-quants) with a float32 scale each or of 32 with a float16 one; for float16 weights to float16.
What float16 has no normal number for stays float32. Accumulation is int32 within a group and
float32 across. `exact` takes activations as they are and sums in float32, several times slower.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from q4jax_kernels import ffi
from q4jax_kernels.block_array import FORMAT_IDS, BlockArray


def supports(ws: Sequence[object]) -> bool:
  """Whether the library is there and every weight is in the layout it reads."""
  return all(isinstance(w, BlockArray) and w.layout == "x16" for w in ws) and ffi.available()


def int4_matmul(
  x: jax.Array, ws: Sequence[BlockArray], isa: str = "best", exact: bool = False
) -> list[jax.Array]:
  """x float[M, K] times each weight's transpose: [M, N_i] in x's dtype, all in one call."""
  return _batchable(isa, exact)(x, list(ws))


@functools.cache
def _batchable(isa: str, exact: bool) -> Callable[[jax.Array, list[BlockArray]], list[jax.Array]]:
  """The call with its rule for vmap: a batch of x is more rows; batched weights go one by one."""

  @jax.custom_batching.custom_vmap
  def matmul(x: jax.Array, ws: list[BlockArray]) -> list[jax.Array]:
    return _call(x, ws, isa, exact)

  @matmul.def_vmap
  def rule(
    size: int, batched: list, x: jax.Array, ws: list[BlockArray]
  ) -> tuple[list[jax.Array], list[bool]]:
    everywhere = [True] * len(ws)
    x_is_batched, ws_are_batched = batched[0], jax.tree.leaves(batched[1])
    if not any(ws_are_batched):
      ys = matmul(x.reshape(-1, x.shape[-1]), ws)
      return [y.reshape(size, -1, y.shape[-1]) for y in ys], everywhere
    flat, tree = jax.tree.flatten(ws)

    def one(i: jax.Array) -> list[jax.Array]:
      parts = [a[i] if b else a for a, b in zip(flat, ws_are_batched, strict=True)]
      return matmul(x[i] if x_is_batched else x, jax.tree.unflatten(tree, parts))

    return jax.lax.map(one, jnp.arange(size)), everywhere

  return matmul


def _call(x: jax.Array, ws: list[BlockArray], isa: str, exact: bool) -> list[jax.Array]:
  call = jax.ffi.ffi_call(
    "q4jax_matmul", [jax.ShapeDtypeStruct((x.shape[0], w.num_rows), jnp.float32) for w in ws]
  )
  ys = call(
    x.astype(jnp.float32),
    *(w.data for w in ws),
    formats=np.array([FORMAT_IDS[w.format] for w in ws], np.int64),
    exact=exact,
    isa=np.int64(ffi.ISA_IDS[isa]),
  )
  return [y.astype(x.dtype) for y in ys]


def take_rows(w: BlockArray, ids: jax.Array, isa: str = "best") -> jax.Array:
  """Rows `ids` int32[T] as float32[T, K]."""
  call = jax.ffi.ffi_call(
    "q4jax_take_rows",
    jax.ShapeDtypeStruct((ids.shape[0], w.shape[1]), jnp.float32),
    vmap_method="sequential",
  )
  return call(
    ids,
    w.data,
    format=np.int64(FORMAT_IDS[w.format]),
    num_rows=np.int64(w.num_rows),
    isa=np.int64(ffi.ISA_IDS[isa]),
  )
