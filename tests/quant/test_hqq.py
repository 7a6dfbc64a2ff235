"""HQQ: its proximal operator against brute force, its objective's fall, and what it is for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from q4jax.errors import ConfigError
from q4jax.quant import hqq, rtn
from q4jax.quant.grid import Grid, fake_quant


@pytest.mark.parametrize("p", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("beta", [1.0, 10.0, 100.0])
def test_shrink_minimises_its_objective(p, beta):
  x = np.linspace(-3, 3, 121).astype(np.float32)
  e = hqq.shrink(x, p, beta).astype(np.float64)
  grid = np.linspace(-3.5, 3.5, 70001)

  def value(e, x):
    return np.abs(e) ** p + beta / 2 * (e - x) ** 2

  best = np.array([value(grid, one).min() for one in x.astype(np.float64)])
  np.testing.assert_allclose(value(e, x.astype(np.float64)), best, rtol=1e-3, atol=1e-6)
  assert (e[np.abs(x) < 1e-3] == 0).all() and (np.sign(e) * np.sign(x) >= 0).all()


@given(
  st.integers(2, 8),
  st.sampled_from([8, 64, "channel", "tensor"]),
  st.sampled_from([0.3, 0.7]),
  st.sampled_from([1.0, 10.0]),
  st.integers(0, 9),
)
def test_the_objective_falls_monotonically(bits, group, p, beta, seed):
  rng = np.random.default_rng(seed)
  w = rng.standard_t(2, (4, 128)).astype(np.float32)
  grid = Grid(bits, group, "minimum", "float32")
  start = rtn.fit(w, grid)
  x = grid.split(w)
  minimum, history = hqq.solve(x, grid, start, hqq.HQQ(p, beta))
  assert len(history) > 1
  values = np.array(history)
  # Up to float32's rounding of weights of up to 2^bits steps.
  assert (values[1:] <= values[:-1] * (1 + 3e-7 * 2**bits) + 1e-6).all()
  # What it returns has the objective that it says, written out in float64.
  scale = start.scale.astype(np.float64)[..., None]
  codes = np.rint((x + minimum[..., None]) / scale).clip(0, 2**bits - 1)
  miss = (x - (scale * codes - minimum[..., None])) / scale
  e = hqq.shrink(miss, p, beta)
  value = (np.abs(e) ** p + beta / 2 * (e - miss) ** 2).sum(axis=-1)
  np.testing.assert_allclose(value, values.min(axis=0), rtol=1e-2)
  np.testing.assert_array_equal(hqq.fit(w, grid, how=hqq.HQQ(p, beta)).minimum, minimum)


def test_most_weights_come_nearer_and_outliers_pay():
  rng = np.random.default_rng(0)
  w = rng.standard_normal((64, 256)).astype(np.float32)
  w[:, ::64] += 6
  grid = Grid(3, 64, "minimum")
  plain = np.abs(fake_quant(w, grid, rtn.fit(w, grid)) - w)
  robust = np.abs(fake_quant(w, grid, hqq.fit(w, grid)) - w)
  assert np.median(robust) < np.median(plain)
  assert np.power(robust, 0.7).mean() < np.power(plain, 0.7).mean()


def test_wrong_arguments_are_named():
  w = np.ones((2, 64), np.float32)
  with pytest.raises(ConfigError, match="rule='signed' must be 'minimum'"):
    hqq.fit(w, Grid(4, 32))
  with pytest.raises(ConfigError, match="0 < p < 1"):
    hqq.HQQ(p=1.0)
  zeros = np.zeros((2, 64), np.float32)
  assert not fake_quant(zeros, Grid(4, 32, "minimum"), hqq.fit(zeros, Grid(4, 32, "minimum"))).any()
