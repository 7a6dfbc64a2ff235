"""The TPU kernel in interpret mode, step by step beside the oracle of test_paged_attention."""

import functools

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.test_paged_attention import Simulation
from q4jax_kernels.kv_format import KVFormat
from q4jax_kernels.paged_attention import pallas_tpu

KERNEL = functools.partial(pallas_tpu.decode_attention, interpret=True)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    (KVFormat(4, 8), KVFormat(4, 32)),
    (KVFormat(8, 16), KVFormat(4)),
    (KVFormat(4), KVFormat(8, 8)),
    (KVFormat(4, 16, symmetric=True), KVFormat(8, symmetric=True)),
  ],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
def test_formats(heads: int, kv_heads: int, key: KVFormat, value: KVFormat) -> None:
  run = Simulation(heads=heads, kv_heads=kv_heads, head_dim=32, key=key, value=value, attend=KERNEL)
  for i in range(66):
    run.step([True, i >= 20], check=i > 55, scores=i % 2 == 0)
    if i == 57:
      run.mask(0, set(range(4, 25)))
  assert (np.asarray(run.cache.num_blocks[1]) == [3, 2]).all()


def test_rows_that_pause() -> None:
  run = Simulation(3, key=KVFormat(4, 8), value=KVFormat(4, 8), attend=KERNEL)
  for i in range(50):
    run.step([True, i % 2 == 0, i < 40], check=i > 40)


def test_as_a_tpu_would(capfd: pytest.CaptureFixture) -> None:
  """With buffers, copies and memory that starts as NaN simulated, races looked for."""
  simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  attend = functools.partial(pallas_tpu.decode_attention, interpret=simulated)
  run = Simulation(key=KVFormat(8), value=KVFormat(4, 8), recent=0, attend=attend)
  for i in range(40):
    run.step(check=i > 36)
  assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(("key", "layout"), [(KVFormat(32), "rows"), (KVFormat(4), "x16")])
def test_refuses_other_pages(key: KVFormat, layout: str) -> None:
  run = Simulation(key=key, value=KVFormat(4), layout=layout, attend=KERNEL)
  assert not pallas_tpu.supports(run.cache)
  with pytest.raises(NotImplementedError, match=f"layout '{layout}'"):
    run.step()
