"""The Hopper kernel in GPU interpret mode, looking for races, beside test_paged_attention's oracle.

Interpreting is slow, so the reference takes all steps but the last few.
"""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.test_paged_attention import Simulation
from q4jax_kernels.kv_format import KVFormat
from q4jax_kernels.paged_attention import mosaic_gpu, reference


@pytest.fixture
def interpret() -> Any:
  if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip(f"jax {jax.__version__} cannot interpret Mosaic GPU kernels; 0.11.2 can")
  return plgpu.InterpretGPUParams(detect_races=True)


@pytest.mark.parametrize(
  ("key", "value", "heads", "head_dim", "block_size", "splits"),
  [
    (KVFormat(4, 32), KVFormat(4, 32), 4, 64, 32, 1),
    (KVFormat(8, 16), KVFormat(4), 6, 64, 16, 3),
    (KVFormat(4), KVFormat(8, 64), 2, 128, 64, 2),
    (KVFormat(4, 16, symmetric=True), KVFormat(8, symmetric=True), 18, 64, 128, 2),
  ],
)
def test_formats(
  key: KVFormat,
  value: KVFormat,
  heads: int,
  head_dim: int,
  block_size: int,
  splits: int,
  interpret: Any,
  capfd: pytest.CaptureFixture,
) -> None:
  """Blocks that are a part of a tile, or several; rows out of step; masked slots; many tiles."""
  run = Simulation(
    heads=heads,
    head_dim=head_dim,
    block_size=block_size,
    blocks=max(2, 256 // block_size) + 1,
    recent=0,
    key=key,
    value=value,
    attend=reference.decode_attention,
  )
  for i in range(max(2 * block_size, 256) + 6):
    run.step([True, i > 60], check=False, scores=False)
  run.mask(0, {*range(4, 25), 40})
  run.use(functools.partial(mosaic_gpu.decode_attention, splits=splits, interpret=interpret))
  run.step(scores=True)
  run.step([True, False], scores=False)
  assert np.asarray(run.cache.num_blocks[1, 0]) * block_size >= 128
  assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
  ("key", "layout", "head_dim", "block_size", "heads"),
  [
    (KVFormat(32), "rows", 64, 32, 2),
    (KVFormat(4), "x16", 64, 32, 2),
    (KVFormat(4, 8), "rows", 64, 32, 2),
    (KVFormat(4), "rows", 32, 32, 2),
    (KVFormat(4), "rows", 64, 48, 2),
    (KVFormat(4), "rows", 64, 32, 130),
  ],
)
def test_refuses_other_pages(
  key: KVFormat, layout: str, head_dim: int, block_size: int, heads: int
) -> None:
  run = Simulation(
    key=key,
    value=KVFormat(4),
    layout=layout,
    head_dim=head_dim,
    block_size=block_size,
    heads=heads,
    attend=mosaic_gpu.decode_attention,
  )
  assert not mosaic_gpu.supports(run.cache, heads // 2)
  with pytest.raises(NotImplementedError, match=f"layout '{layout}', heads of {head_dim}"):
    run.step()
