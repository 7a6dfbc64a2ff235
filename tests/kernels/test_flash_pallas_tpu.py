"""The TPU kernel in interpret mode, beside test_attention's sums in float64."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels.flash import ROUNDING, check, check_nan, draw
from kernels.test_attention import LAYER, Case
from q4jax_kernels.attention import kernel, pallas_tpu, reference

KINDS = ((64, "bf16"), (128, "bf16"), (128, "f32"), (64, "f16"))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
  """So that small shapes take several tiles and blocks."""
  monkeypatch.setattr(pallas_tpu, "_ROWS", 64)
  monkeypatch.setattr(pallas_tpu, "_SLOTS", 128)
  pallas_tpu.attend.clear_cache()


def attention(interpret: Any = True) -> Callable[..., Any]:
  attend = functools.partial(pallas_tpu.attend, interpret=interpret)
  return jax.jit(functools.partial(kernel.cached_attention, attend, layer=LAYER))


@settings(max_examples=4, phases=[Phase.explicit, Phase.reuse, Phase.generate], deadline=None)
@given(data=st.data())
def test_any_range(data: st.DataObject) -> None:
  check(draw(data, KINDS), attention())


@pytest.mark.parametrize(("head_dim", "cache"), [(64, "bf16"), (128, "f32")])
def test_as_a_tpu_would(head_dim: int, cache: str, capfd: pytest.CaptureFixture) -> None:
  """With buffers, copies and memory that starts as NaN simulated, races looked for."""
  simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  case = Case([100, 3, 0], [33, 20, 0], t=40, s=140, head_dim=head_dim, cache=cache)
  check(case, attention(simulated))
  assert "RACE DETECTED" not in capfd.readouterr().out


def test_nan_in_a_query_stays_in_its_head() -> None:
  check_nan(attention(), slots=160)


def test_ends_of_blocks() -> None:
  """First tokens of a tile in the last slots of a block of 128 or in the first of the next; and
  last ones: a tile has 32.
  """
  starts = [97, 126, 127, 128]
  check(Case(starts, [40] * 4, t=40, s=170, head_dim=64, cache="bf16"), attention())


def test_other_ranges_are_not_compiled_again() -> None:
  call = attention()
  for start, length in ((0, 1), (100, 7), (3, 0)):
    case = Case([start], [length], t=7, s=200, head_dim=64, cache="bf16")
    case.check(*call(*case.arguments), rtol=0, atol=ROUNDING)
  assert call._cache_size() == 1


@pytest.mark.parametrize(("head_dim", "cache"), [(80, "bf16"), (16, "f32")])
def test_refuses_other_caches(head_dim: int, cache: str) -> None:
  case = Case([0], [2], t=2, s=16, head_dim=head_dim, cache=cache)
  with pytest.raises(NotImplementedError, match=f"heads of {head_dim}"):
    attention()(*case.arguments)


@pytest.mark.parametrize(("heads", "kv_heads", "t"), [(4, 2, 40), (3, 3, 7)])
def test_causal_attention_and_its_gradient(heads: int, kv_heads: int, t: int) -> None:
  rng = np.random.default_rng(21)
  q = jnp.array(rng.normal(size=(2, t, heads, 64)), jnp.bfloat16)
  k, v = jnp.array(rng.normal(size=(2, 2, 150, kv_heads, 64)), jnp.bfloat16)
  attend = functools.partial(pallas_tpu.attend, interpret=True)

  def both(attention: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
    out, back = jax.vjp(attention, q, k, v)
    return out, *back(jnp.ones_like(out))

  found = jax.jit(lambda: both(functools.partial(kernel.causal_attention, attend)))()
  expected = jax.jit(lambda: both(reference.causal_attention))()
  for a, b in zip(found, expected, strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0, atol=ROUNDING)
