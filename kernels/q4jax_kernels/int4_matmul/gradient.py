"""The product with frozen weights, and its gradient with respect to x.

  y_i = x @ W_i.T        dx = sum over i of dy_i @ W_i

Weights have no gradient: their codes are integers, and whoever trains scales does so elsewhere.
The gradient is that of the exact product: an implementation's rounding of x counts as the identity.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.int4_matmul import cpu, dispatch
from q4jax_kernels.int4_matmul.dispatch import Weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, ws: Sequence[Weight], name: str) -> list[jax.Array]:
  """x float[M, K] times each weight's transpose by implementation `name`: [M, N_i] as x."""
  return dispatch.run(name, x, ws)


def _forward(
  x: jax.Array, ws: Sequence[Weight], name: str
) -> tuple[list[jax.Array], Sequence[Weight]]:
  return product(x, ws, name), ws


def _backward(name: str, ws: Sequence[Weight], dys: list[jax.Array]) -> tuple[jax.Array, None]:
  parts = [_transposed(dy, w) for dy, w in zip(dys, ws, strict=True)]
  dx = functools.reduce(jnp.add, parts)
  return dx.astype(dys[0].dtype), None  # None: nothing flows into a frozen weight.


def _transposed(dy: jax.Array, w: Weight) -> jax.Array:
  """dy float[M, N] @ W -> float32[M, K]; W is dequantised once."""
  if isinstance(w, BlockArray) and cpu.supports([w]):
    weight = cpu.take_rows(w, jnp.arange(w.num_rows, dtype=jnp.int32))
  else:
    weight = w.dequantize()
  return jnp.dot(dy.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)


product.defvjp(_forward, _backward)
