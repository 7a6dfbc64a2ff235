"""The learning rates that nobody has to find: a share of the grid's step."""

import numpy as np
import pytest

from q4jax.formats.checkpoint import floats
from q4jax.formats.memory import MemoryCheckpoint
from q4jax.qat.rates import suited
from q4jax.qat.trainer import TrainConfig, train
from q4jax.qat.variants import Recipe, initial
from q4jax.quant.grid import Grid
from qat.test_trainer import WINDOWS


def scaled(source: MemoryCheckpoint, factor: float) -> MemoryCheckpoint:
  new = MemoryCheckpoint(source.config, source.metadata)
  for name, tensor in source.tensors.items():
    rows = np.float32(factor) * floats(source, name).reshape(tensor.num_rows, -1)
    new.write(tensor, rows.view(np.uint8))
  return new


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rates_go_by_the_step(small: MemoryCheckpoint, bits: int) -> None:
  recipe = Recipe("lsq", Grid(bits, 32, "minimum"), "rtn")
  weights, quantizers = suited(initial(small, recipe))
  step = np.ptp(floats(small, "blk.0.attn_q.weight").reshape(-1, 32), axis=1) / (2**bits - 1)
  share = 0.01 if bits == 2 else 0.006
  assert weights == pytest.approx(share * np.median(step), rel=0.05)
  assert 0.1 * weights < quantizers < 0.3 * weights
  # A power of two scales weights and grids exactly.
  half = suited(initial(scaled(small, 0.25), recipe))
  np.testing.assert_allclose(half, (weights / 4, quantizers / 4), rtol=1e-3)
  lora = suited(initial(small, Recipe("lora", recipe.grid, "rtn")))
  np.testing.assert_allclose(lora, (5 * weights, quantizers), rtol=1e-6)


def test_training_takes_them(small: MemoryCheckpoint) -> None:
  recipe = Recipe("lsq", Grid(3, 32, "minimum"), "rtn")
  student = initial(small, recipe)
  weights, _ = suited(student)

  def losses(config: TrainConfig) -> list[float]:
    found: list[float] = []
    train(student, recipe, {}, WINDOWS, config, on_step=lambda r: found.append(r["loss"]))
    return found

  usual, twice = losses(TrainConfig(3, "ce")), losses(TrainConfig(3, "ce", 2 * weights))
  assert usual[0] == twice[0] and usual[1:] != twice[1:]
