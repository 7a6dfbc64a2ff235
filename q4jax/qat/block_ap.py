"""Block-AP of EfficientQAT (arXiv:2407.11062): each block learns its float output, then rests.

A block reads what the quantised blocks before it make, and is to write what the float block makes
of the float ones' output; weights and grids learn by the squared error. Memory: a block's
parameters with their Adam moments, and twice the hidden states of all sequences.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from q4jax.config import LlamaConfig
from q4jax.errors import MissingDependencyError, TrainingError
from q4jax.formats.checkpoint import Checkpoint, floats
from q4jax.model.layers import Matmul
from q4jax.model.llama import Block
from q4jax.model.rope import cos_sin
from q4jax.offline.layerwise import LayerRunner
from q4jax.qat import fake_quant as fq
from q4jax.qat.export import group_array
from q4jax.qat.rates import with_rates
from q4jax.qat.student import Student, with_rounding
from q4jax.quant.grid import Grid


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """How each block is trained: steps of `batch` sequences, and AdamW's learning rates; None for
  `rates.suited`.
  """

  steps: int = 100
  batch: int = 4
  weight_rate: float | None = None
  quantizer_rate: float | None = None
  seed: int = 0


def train_blocks(
  student: Student,
  source: Checkpoint,
  tokens: NDArray[np.int32],
  config: BlockConfig,
  progress: Callable[[int, int], None] | None = None,
) -> Student:
  """The student with all blocks trained, its codes fixed for good: only its grid can learn now.

  Args:
    student: as `variants.initial` made it.
    source: the float model.
    tokens: int32[B, T] to run through it.
    config: how.
    progress: called with steps done and in all.

  Raises:
    TrainingError: a block's loss is not finite.
  """
  config = with_rates(config, student)
  teacher, follower = LayerRunner(source, tokens), LayerRunner(source, tokens)
  layers, grid = source.config.num_layers, student.rounding.grid
  new = with_rounding(student, fixed_codes=False)
  scaled = source.config.rope_factors
  factors = jnp.asarray(floats(source, "rope_freqs.weight")) if scaled else None
  for layer in range(layers):
    prefix = f"blk.{layer}."
    params = {
      kind: {n[len(prefix) :]: v.get_value() for n, v in items.items() if n.startswith(prefix)}
      for kind, items in (
        ("weights", student.weights), ("scales", student.scales), ("minimums", student.minimums),
      )
    }  # fmt: skip
    inputs = np.array(follower.hidden)
    teacher.advance(teacher.read_block())

    def report(step: int, layer: int = layer) -> None:
      if progress is not None:
        progress(layer * config.steps + step, layers * config.steps)

    model = source.config, grid, config
    params = _train(model, params, (inputs, teacher.hidden, factors), layer, report)
    for kind, items in (
      ("weights", new.weights),
      ("scales", new.scales),
      ("minimums", new.minimums),
    ):
      for name, value in params[kind].items():
        items[prefix + name].set_value(value)
    follower.advance(_rounded(params, grid))
  fixed = with_rounding(new, fixed_codes=True)
  for name in fixed.scales:
    codes = group_array(new, name).codes
    fixed.weights[name].set_value(jnp.asarray(codes, jnp.float32))
  return fixed


_Model = tuple[LlamaConfig, Grid, BlockConfig]


def _train(
  model: _Model,
  params: Any,
  data: tuple[NDArray[np.float32], NDArray[np.float32], jax.Array | None],
  layer: int,
  report: Callable[[int], None],
) -> Any:
  """One block's parameters, trained on (inputs, targets, factors of RoPE)."""
  how, (inputs, targets, factors) = model[2], data
  state = _optimizer(how).init(params)
  for step in range(how.steps):
    rng = np.random.default_rng((how.seed, layer, step))
    rows = rng.choice(len(inputs), min(how.batch, len(inputs)), replace=False)
    x, y = jnp.asarray(inputs[rows]), jnp.asarray(targets[rows])
    params, state, loss = _step(model, params, state, x, y, factors)
    if not np.isfinite(float(loss)):
      raise TrainingError(
        f"block {layer}: the loss is {float(loss)} at step {step + 1}; take smaller rates."
      )
    report(step + 1)
  return params


@partial(jax.jit, static_argnums=0)
def _step(
  model: _Model, params: Any, state: Any, x: jax.Array, y: jax.Array, factors: jax.Array | None
) -> tuple[Any, Any, jax.Array]:
  config, grid, how = model

  def objective(params: Any) -> jax.Array:
    weights = _rounded(params, grid)
    block = Block(config, lambda name, _: weights[name.removeprefix("blk.0.")], 0, Matmul())
    cos, sin = cos_sin(jnp.arange(x.shape[1], dtype=jnp.int32).reshape(1, -1), config, factors)
    return jnp.square(block(x, cos, sin)[0] - y).mean()

  loss, grads = jax.value_and_grad(objective)(params)
  updates, state = _optimizer(how).update(grads, state, params)
  return jax.tree.map(jnp.add, params, updates), state, loss


def _rounded(params: Any, grid: Grid) -> dict[str, jax.Array]:
  scales, minimums = params["scales"], params["minimums"]
  return {
    name: fq.fake_quant(w, scales[name], minimums.get(name), grid) if name in scales else w
    for name, w in params["weights"].items()
  }


def _optimizer(how: BlockConfig) -> Any:
  try:
    import optax
  except ImportError:
    raise MissingDependencyError("training needs optax: pip install 'q4jax[train]'.") from None

  def adam(rate: float) -> Any:
    schedule = optax.cosine_decay_schedule(rate, how.steps, 0.05)
    return optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.0)

  def labels(tree: Any) -> Any:
    return {kind: jax.tree.map(lambda _: kind, part) for kind, part in tree.items()}  # noqa: B023

  assert how.weight_rate is not None and how.quantizer_rate is not None
  grids = adam(how.quantizer_rate)
  rates = {"weights": adam(how.weight_rate), "scales": grids, "minimums": grids}
  return optax.multi_transform(rates, labels)
