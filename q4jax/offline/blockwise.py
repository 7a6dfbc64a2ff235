"""The methods that quantise a block while text flows through it."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from q4jax.offline.layerwise import SHARED, LayerRunner
from q4jax.quant import search
from q4jax.quant.gptq import quantize_gptq
from q4jax.quant.grid import Floats, Grid, GroupArray

# (runner at the block, its parameters, grid) -> all its parameters anew: matrices on the grid,
# vectors in float32.
BlockMethod = Callable[
  [LayerRunner, Mapping[str, jax.Array], Grid], dict[str, GroupArray | Floats]
]


def gptq(
  runner: LayerRunner, weights: Mapping[str, jax.Array], grid: Grid
) -> dict[str, GroupArray | Floats]:
  """GPTQ with clip search: matrices that share an input make up for each weight's error in turn.

  Each input is watched after what comes before it in the block has been quantised.
  """
  current = dict(weights)
  new: dict[str, GroupArray | Floats] = {
    name: np.asarray(w) for name, w in weights.items() if w.ndim == 1
  }
  for shared in SHARED:
    hessian = _hessian(runner, current, shared[0])
    for matrix in shared:
      name = f"{matrix}.weight"
      made = quantize_gptq(
        np.asarray(weights[name]), hessian, grid, fit=search.fit, order="grouped"
      )
      new[name] = made.array
      current[name] = jnp.asarray(made.array.dequantize())
  return new


def _hessian(
  runner: LayerRunner, weights: Mapping[str, jax.Array], name: str
) -> NDArray[np.float32]:
  """X^T X of what flows into a matrix, float32[K, K]."""
  total = None
  for flow in runner.flows(weights):
    part = _square(flow.inputs[name])
    total = part if total is None else total + part
  return np.asarray(total)


@jax.jit
def _square(x: jax.Array) -> jax.Array:
  rows = x.reshape(-1, x.shape[-1])
  return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


BLOCK_METHODS: Mapping[str, BlockMethod] = {"gptq": gptq}
