"""The Hopper kernel in GPU interpret mode, step by step beside test_paged_attention's oracle."""

import functools
from typing import Any

import numpy as np
import pytest
import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.test_paged_attention import Simulation
from q4jax_kernels.kv_format import KVFormat
from q4jax_kernels.paged_attention import decode_attention, mosaic_gpu


@pytest.fixture
def interpret() -> Any:
  if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip(f"jax {jax.__version__} cannot interpret Mosaic GPU kernels; 0.11.2 can")
  return plgpu.InterpretGPUParams(detect_races=True)


@pytest.mark.parametrize(
  ("key", "value", "head_dim", "block_size", "splits"),
  [
    (KVFormat(4, 32), KVFormat(4, 32), 64, 32, 1),
    (KVFormat(8, 16), KVFormat(4), 64, 16, 3),
    (KVFormat(4), KVFormat(8, 64), 128, 64, 2),
    (KVFormat(4, 16, symmetric=True), KVFormat(8, symmetric=True), 64, 128, 2),
  ],
)
def test_formats(
  key: KVFormat,
  value: KVFormat,
  head_dim: int,
  block_size: int,
  splits: int,
  interpret: Any,
  capfd: pytest.CaptureFixture,
) -> None:
  """Blocks that fill a tile by parts, or several; rows out of step, masked slots, a full table."""
  kernel = functools.partial(mosaic_gpu.decode_attention, splits=splits, interpret=interpret)
  run = Simulation(
    heads=6, kv_heads=2, head_dim=head_dim, key=key, value=value, recent=0, attend=decode_attention
  , block_size=block_size, blocks=max(3, 256 // block_size))
  reference = run.attend
  paged = Simulation(block_size=16, attend=kernel)
  del paged
  last = 2 * block_size + 6 if block_size >= 64 else 5 * 32
  for i in range(last - 3):
    run.step([True, i % 8 != 1], check=False, scores=False)
    if i == last - 8:
      run.mask(0, set(range(4, 25)))
  assert reference is run.attend
  run.use(kernel)
  for i in range(3):
    run.step([True, i < 2], scores=i != 1)
  assert run.cache.num_blocks[1, 0] >= 2
  assert "RACE" not in capfd.readouterr().out
