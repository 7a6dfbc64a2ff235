"""From a float model to a student that has learnt, by any variant."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from q4jax.formats.checkpoint import Checkpoint
from q4jax.qat.block_ap import BlockConfig, train_blocks
from q4jax.qat.data import Windows
from q4jax.qat.student import Observed, Student, finished, observe
from q4jax.qat.trainer import TrainConfig, train
from q4jax.qat.variants import Recipe, float_weights, initial

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Hooks:
  """What a run tells while it goes: bars of both parts, and each step's metrics."""

  blocks: Progress | None = None
  steps: Progress | None = None
  metrics: Callable[[dict[str, float]], None] | None = None


def learn(
  source: Checkpoint,
  recipe: Recipe,
  config: TrainConfig,
  windows: Windows,
  calibration: NDArray[np.int32],
  blocks: BlockConfig | None = None,
  folder: Path | None = None,
  *,
  resume: bool = False,
  hooks: Hooks | None = None,
) -> Student:
  """The student of a float model, `finished`.

  Args:
    source: in float.
    recipe, config, windows: what, how and on which text it learns end to end.
    calibration: int32[B, T] for what looks at text before: GPTQ, observed ranges, Block-AP.
    blocks: how Block-AP trains; its defaults if None.
    folder, resume: see `trainer.train`. What comes before the first step end to end (the search of
      a grid, GPTQ, Block-AP) is done again on resuming; it gives the same.
    hooks: see there.

  Raises:
    Q4JaxError: as `variants.initial`, `block_ap.train_blocks` and `trainer.train`.
  """
  hooks = hooks or Hooks()
  student = initial(source, recipe, calibration, seed=windows.seed)
  if recipe.activations == "observed":
    graph, state = nnx.split(student)
    watch = jax.jit(lambda s, t: observe(nnx.merge(graph, s), t))
    ranges = watch(state, calibration[: windows.batch])
    student.observed = nnx.Dict({name: Observed(x) for name, x in ranges.items()})
  if recipe.variant == "block_ap":
    student = train_blocks(student, source, calibration, blocks or BlockConfig(), hooks.blocks)
  teacher = float_weights(source) if config.loss != "ce" else {}
  student = train(
    student, recipe, teacher, windows, config, folder,
    resume=resume, progress=hooks.steps, on_step=hooks.metrics,
  )  # fmt: skip
  return finished(student)
