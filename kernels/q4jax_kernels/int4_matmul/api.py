"""One door to the int4 matmul: checks once, then picks an implementation or takes the named."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.int4_matmul import cpu, dispatch, reference
from q4jax_kernels.int4_matmul.dispatch import IMPLEMENTATIONS, Weight
from q4jax_kernels.int4_matmul.gradient import product
from q4jax_kernels.q4_array import Q4Array

_X_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def int4_matmul(
  x: jax.Array, ws: Sequence[Weight], implementation: str | None = None
) -> list[jax.Array]:
  """y_i = x @ W_i.T for one or more quantised matrices that share x.

  Differentiable with respect to x, in reverse mode; the weights are frozen. `vmap` over x is one
  product with more rows; over weights, one product after the other.

  Args:
    x: float32, bfloat16 or float16 [..., K].
    ws: matrices [N_i, K], of several types if need be.
    implementation: one of IMPLEMENTATIONS, which then runs or raises; None takes the best for each
      weight and the device, and where that means dequantising by XLA it is said once.

  Returns:
    [..., N_i] in x's dtype, one for each weight.

  Raises:
    ValueError: dtypes or shapes that do not fit, or an unknown implementation.
    NotImplementedError: the named implementation cannot take these weights, or cannot run here.
  """
  _check(x, ws)
  if implementation is None:
    names = [dispatch.best(w) for w in ws]
  else:
    dispatch.check(implementation, ws)
    names = [implementation] * len(ws)
  x_mk = x.reshape(-1, x.shape[-1])
  ys: dict[int, jax.Array] = {}
  for name in dict.fromkeys(names):  # One call for all weights of one implementation.
    at = [i for i, other in enumerate(names) if other == name]
    ys |= zip(at, product(x_mk, [ws[i] for i in at], name), strict=True)
  return [ys[i].reshape(*x.shape[:-1], ys[i].shape[-1]) for i in range(len(ws))]


def _check(x: jax.Array, ws: Sequence[Weight]) -> None:
  if x.dtype not in _X_DTYPES:
    raise ValueError(f"x is {x.dtype}; it must be float32, bfloat16 or float16.")
  if x.ndim == 0:
    raise ValueError("x is a scalar; it must have the inputs as its last axis.")
  for w in ws:
    if isinstance(w, Q4Array):
      w.validated()
    kind = f"{w.format} weight" if isinstance(w, BlockArray) else type(w).__name__
    if w.shape[1] != x.shape[-1]:
      raise ValueError(f"x has {x.shape[-1]} columns where the {kind} has {w.shape[1]}.")


def take_rows(w: Weight | jax.Array, ids: jax.Array) -> jax.Array:
  """Rows of a matrix [N, K] (an embedding table): ids int32[...] -> float32[..., K].

  An id outside the matrix is an error on the CPU and takes the nearest row elsewhere: check ids
  before they reach the device.
  """
  flat = ids.reshape(-1)
  if isinstance(w, BlockArray):
    rows = cpu.take_rows(w, flat) if cpu.supports([w]) else reference.take_rows(w, flat)
  elif isinstance(w, jax.Array):
    rows = jnp.take(w, flat, axis=0, mode="clip").astype(jnp.float32)
  else:
    rows = reference.take_rows(w, flat)
  return rows.reshape(*ids.shape, w.shape[1])


__all__ = ["IMPLEMENTATIONS", "int4_matmul", "take_rows"]
