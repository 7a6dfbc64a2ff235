"""The Hopper kernel in GPU interpret mode, looking for races, beside test_attention's oracle."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.flash import ROUNDING, check, check_nan, draw
from kernels.test_attention import LAYER, Case
from q4jax_kernels.attention import kernel, mosaic_gpu, reference

KINDS = ((64, "bf16"), (128, "bf16"), (64, "f16"), (128, "f16"))
# Slots that were never written hold NaN, which is multiplied before it is masked.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")


def interpreted() -> Callable[..., jax.Array]:
  if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip(f"jax {jax.__version__} cannot interpret Mosaic GPU kernels; 0.11.2 can")
  interpret = plgpu.InterpretGPUParams(detect_races=True)
  return functools.partial(mosaic_gpu.attend, interpret=interpret)


def attention() -> Callable[..., Any]:
  return jax.jit(functools.partial(kernel.cached_attention, interpreted(), layer=LAYER))


@settings(max_examples=3, phases=[Phase.explicit, Phase.reuse, Phase.generate], deadline=None)
@given(data=st.data())
def test_any_range(data: st.DataObject) -> None:
  check(draw(data, KINDS, mosaic_gpu.SLOTS), attention())


@pytest.mark.parametrize(
  ("starts", "lengths", "heads", "kv_heads"),
  [
    ([125, 126, 127, 128], [3, 3, 3, 3], 4, 2),  # around the ends of tiles
    ([65], [70], 4, 2),  # the last token of a tile of queries is the first of a tile of slots
    ([300, 3, 0], [90, 50, 0], 3, 1),  # more tiles than stages, a thread block without tokens
  ],
)
def test_tiles(
  starts: list[int], lengths: list[int], heads: int, kv_heads: int, capfd: pytest.CaptureFixture
) -> None:
  shape = {"t": max(lengths) + 2, "s": 512, "heads": heads, "kv_heads": kv_heads, "head_dim": 64}
  check(Case(starts, lengths, cache="bf16", **shape), attention())
  assert "RACE" not in capfd.readouterr().out


def test_nan_in_a_query_stays_in_its_head() -> None:
  check_nan(attention(), slots=256)


def test_causal_attention() -> None:
  """The last queries of slots that are no multiple of a tile."""
  rng = np.random.default_rng(21)
  q = jnp.array(rng.normal(size=(2, 40, 4, 64)), jnp.bfloat16)
  k, v = jnp.array(rng.normal(size=(2, 2, 150, 2, 64)), jnp.bfloat16)
  found = jax.jit(functools.partial(kernel.causal_attention, interpreted()))(q, k, v)
  expected = reference.causal_attention(q, k, v)
  assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
  np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
  ("head_dim", "cache", "slots"), [(256, "bf16", 128), (64, "f32", 128), (64, "bf16", 192)]
)
def test_refuses_other_caches(head_dim: int, cache: str, slots: int) -> None:
  case = Case([0], [2], t=2, s=slots, head_dim=head_dim, cache=cache)
  call = functools.partial(kernel.cached_attention, mosaic_gpu.attend, layer=LAYER)
  with pytest.raises(NotImplementedError, match=f"heads of {head_dim}, {slots} slots"):
    call(*case.arguments)
