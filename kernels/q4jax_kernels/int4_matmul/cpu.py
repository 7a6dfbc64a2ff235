"""The native CPU kernels (csrc/matmul_kernel.h): weights stream once, in their blocks.

Activations of quantised weights are rounded to int8 in blocks of 256 (k-quants) or 32 weights with
a float32 scale each, as llama.cpp does; accumulation is int32 within a group and float32 across.
Float weights are multiplied in float32.
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


def int4_matmul(x: jax.Array, ws: Sequence[BlockArray], isa: str = "best") -> list[jax.Array]:
  """x float[M, K] times each weight's transpose: [M, N_i] in x's dtype, all in one call."""
  return _batchable(isa)(x, list(ws))


@functools.cache
def _batchable(isa: str) -> Callable[[jax.Array, list[BlockArray]], list[jax.Array]]:
  """The call with its rule for vmap: a batch of x is more rows; batched weights go one by one."""

  @jax.custom_batching.custom_vmap
  def matmul(x: jax.Array, ws: list[BlockArray]) -> list[jax.Array]:
    return _call(x, ws, isa)

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


def _call(x: jax.Array, ws: list[BlockArray], isa: str) -> list[jax.Array]:
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
