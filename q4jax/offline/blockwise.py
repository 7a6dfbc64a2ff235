"""The methods that quantise a block while text flows through it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from q4jax.offline.layerwise import SHARED, LayerRunner
from q4jax.quant import search
from q4jax.quant.awq import ALPHAS, Inputs, quantize_awq
from q4jax.quant.gptq import quantize_gptq
from q4jax.quant.grid import Floats, Grid, GroupArray
from q4jax.quant.observers import Hessian, Moments

_AWQ_ROWS = 1024  # Of each input, that AWQ measures errors on.

# (runner at the block, its parameters, grid) -> all its parameters anew: matrices on the grid,
# vectors in float32.
BlockMethod = Callable[[LayerRunner, Mapping[str, jax.Array], Grid], dict[str, GroupArray | Floats]]


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


def awq(
  runner: LayerRunner, weights: Mapping[str, jax.Array], grid: Grid
) -> dict[str, GroupArray | Floats]:
  """AWQ: the inputs that matter get finer steps, by scales that what writes them takes back.

  q, k, v and gate, up: the norm before them. down: the rows of up. output: the rows of v, where
  each head has a V of its own; with grouped queries it is clipped only, for its inputs share rows.
  """
  config = runner.config
  new = {name: np.asarray(w) for name, w in weights.items()}
  made: dict[str, GroupArray | Floats] = {}
  known = _awq_inputs(runner, weights)

  def scaled(shared: tuple[str, ...], alphas: Sequence[float] = ALPHAS) -> Floats:
    matrices = [new[f"{m}.weight"] for m in shared]
    found = quantize_awq(matrices, known[shared[0]], grid, fit=search.fit, alphas=alphas)
    made.update({f"{m}.weight": a for m, a in zip(shared, found.arrays, strict=True)})
    return found.scale

  own_values = config.num_heads == config.num_kv_heads
  scale = scaled(("attn_output",), ALPHAS if own_values else (0.0,))
  if own_values:
    for name in ("attn_v.weight", "attn_v.bias"):
      if name in new:
        new[name] = (new[name].T / scale).T
  new["attn_norm.weight"] = new["attn_norm.weight"] / scaled(("attn_q", "attn_k", "attn_v"))
  new["ffn_up.weight"] = new["ffn_up.weight"] / scaled(("ffn_down",))[:, None]
  new["ffn_norm.weight"] = new["ffn_norm.weight"] / scaled(("ffn_gate", "ffn_up"))
  return {name: w for name, w in new.items() if w.ndim == 1} | made


def _awq_inputs(runner: LayerRunner, weights: Mapping[str, jax.Array]) -> dict[str, Inputs]:
  """A sample of each input, and the mean size of its channels over all text."""
  samples: dict[str, list[Floats]] = {}
  moments: dict[str, Moments] = {}
  calls = -(-len(runner.hidden) // runner.batch)
  for flow in runner.flows(weights):
    for name, x in flow.inputs.items():
      rows = x.reshape(-1, x.shape[-1])
      every = max(1, len(rows) // max(1, _AWQ_ROWS // calls))
      samples.setdefault(name, []).append(np.asarray(rows[::every]))
      moments[name] = moments.get(name, Moments.init(x.shape[-1])).update(x)
  return {
    name: Inputs(moments[name].mean_abs(), np.concatenate(parts)) for name, parts in samples.items()
  }


def _hessian(
  runner: LayerRunner, weights: Mapping[str, jax.Array], name: str
) -> NDArray[np.float32]:
  """X^T X / rows of what flows into a matrix, float32[K, K]."""
  hessian = None
  for flow in runner.flows(weights):
    x = flow.inputs[name]
    hessian = _watch(hessian or Hessian.init(x.shape[-1]), x)
  assert hessian is not None
  return hessian.mean()


@partial(jax.jit, donate_argnums=0)
def _watch(hessian: Hessian, x: jax.Array) -> Hessian:
  return hessian.update(x)


BLOCK_METHODS: Mapping[str, BlockMethod] = {"gptq": gptq, "awq": awq}
