"""The rounding itself: its law, its gradient, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from q4jax.model.calib import fake_quant


def parameters(*values: float) -> jax.Array:
  return jnp.array(values, jnp.float32).reshape(4, 1)


def test_by_hand() -> None:
  x = jnp.array([-3.0, -0.3, 0.0, 0.24, 0.26, 1.0, 100.0])
  # Steps of 0.5, codes 0..15, 0 has the code 4: from -2 to 5.5.
  out = fake_quant(x, parameters(0.5, 4, 0, 15))
  assert out.tolist() == [-2.0, -0.5, 0.0, 0.0, 0.5, 1.0, 5.5]


@given(st.floats(1e-3, 1e3), st.integers(-128, 127), st.integers(0, 2**31))
def test_error_is_half_a_step_within_the_range(scale: float, zero: int, seed: int) -> None:
  scale = float(np.float32(scale))
  low, high = scale * (-128 - zero), scale * (127 - zero)
  x = np.random.default_rng(seed).uniform(low, high, 64).astype(np.float32)
  p = parameters(scale, zero, -128, 127)
  out = np.asarray(fake_quant(jnp.asarray(x), p))
  assert (np.abs(out.astype(np.float64) - x) <= scale * 0.5001).all()
  np.testing.assert_array_equal(np.asarray(fake_quant(jnp.asarray(out), p)), out)


def test_neutral_is_the_same_bits() -> None:
  x = jnp.array([0.1, -0.0, jnp.inf, -jnp.inf, jnp.nan, 3e38, 1e-45], jnp.float32)
  out = jax.jit(fake_quant)(x, parameters(0, 0, 0, 0))
  assert np.asarray(out).tobytes() == np.asarray(x).tobytes()
  # By itself a NaN stays one: to round it to 0 would hide a broken model.
  assert jnp.isnan(fake_quant(x, parameters(1, 0, -8, 7))[4])


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_gradient_passes_x_in_range_and_never_the_parameters(scale: float) -> None:
  x, p = jnp.array([-10.0, -1.0, 0.3, 3.4, 10.0]), parameters(scale, 1, -8, 7)
  dx, dp = jax.grad(lambda x, p: (fake_quant(x, p) * jnp.arange(1.0, 6)).sum(), (0, 1))(x, p)
  # Codes -8..7 with zero point 1: from -4.5 to 3.
  inside = [0, 2, 3, 0, 0] if scale else [1, 2, 3, 4, 5]
  assert dx.tolist() == inside
  assert dp.tolist() == [[0.0]] * 4
  _, tangent = jax.jvp(lambda p: fake_quant(x, p), (p,), (jnp.ones_like(p),))
  assert tangent.tolist() == [0.0] * 5
