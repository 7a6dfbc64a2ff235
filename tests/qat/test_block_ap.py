"""Block-AP: each block learns its float output, and then its codes rest while scales learn."""

import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.errors import TrainingError
from q4jax.formats.memory import MemoryCheckpoint
from q4jax.qat import export
from q4jax.qat.block_ap import BlockConfig, train_blocks
from q4jax.qat.data import Windows
from q4jax.qat.run import Hooks, learn
from q4jax.qat.trainer import TrainConfig
from q4jax.qat.variants import Recipe, float_weights, initial
from q4jax.quant.grid import Grid

RECIPE = Recipe("block_ap", Grid(3, 32, "minimum"), "mse")


def test_blocks_come_nearer_to_the_float_model(small: MemoryCheckpoint, tokens: np.ndarray) -> None:
  before = initial(small, RECIPE)
  after = train_blocks(before, small, tokens, BlockConfig(30, 8, 2e-3, 1e-3))
  plain = initial(small, Recipe("ptq", RECIPE.grid, "mse"))
  for name, w in float_weights(small).items():
    plain.weights[name].set_value(jnp.asarray(w))
  plain.scales = type(plain.scales)({})
  want = plain(tokens)

  def error(student) -> float:
    return float(jnp.square(student(tokens) - want).mean())

  assert error(after) < 0.9 * error(before)
  with pytest.raises(TrainingError, match="block 0: the loss is nan at step"):
    train_blocks(before, small, tokens, BlockConfig(4, 8, 1e38, 1e38))


def test_codes_rest_while_scales_learn(small: MemoryCheckpoint, tokens: np.ndarray) -> None:
  row = tokens.reshape(-1)
  windows, how = Windows(row, row[:1], 16, 4, 0), BlockConfig(3, 4)
  ticks: list[int] = []

  def made(steps: int):
    config = TrainConfig(steps, quantizer_rate=1e-3)
    hooks = Hooks(blocks=lambda done, _: ticks.append(done))
    return learn(small, RECIPE, config, windows, tokens, how, hooks=hooks)

  one, more = made(1), made(4)
  assert ticks == [1, 2, 3, 4, 5, 6] * 2
  for name in one.scales:
    a, b = export.group_array(one, name), export.group_array(more, name)
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.minimum, b.minimum)
    assert (a.scale != b.scale).any()
