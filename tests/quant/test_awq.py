"""AWQ: its error against a float64 oracle, its laws, and that it does what it is for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from q4jax.errors import ConfigError
from q4jax.quant import rtn, search
from q4jax.quant.awq import ALPHAS, Inputs, quantize_awq, scale_of
from q4jax.quant.grid import RULES, Grid, quantize


def problem(seed=0, k=128, samples=64):
  """Matrices that share inputs of which a few are large, as in language models."""
  rng = np.random.default_rng(seed)
  weights = [rng.standard_normal((n, k)).astype(np.float32) * np.float32(0.02) for n in (24, 8, 8)]
  x = rng.standard_normal((samples, k)) * rng.lognormal(0, 1, k)
  x[:, ::17] *= 30
  return weights, x.astype(np.float32)


def output_error(weights, arrays, scale, x):
  """Sum of squared differences of outputs, float64, with the inputs divided as a model would."""
  total = 0.0
  x = x.astype(np.float64)
  for w, array in zip(weights, arrays, strict=True):
    y = (x / scale.astype(np.float64)) @ array.dequantize().astype(np.float64).T
    total += np.square(y - x @ w.astype(np.float64).T).sum()
  return total


grids = st.builds(
  Grid,
  bits=st.integers(2, 8),
  group_size=st.sampled_from([16, 64, "channel", "tensor"]),
  rule=st.sampled_from(RULES),
)


@settings(max_examples=40, deadline=None)
@given(grids, st.booleans(), st.booleans(), st.integers(0, 5))
def test_the_error_is_that_of_outputs_and_never_above_the_start(grid, by_hessian, clip, seed):
  weights, x = problem(seed)
  inputs = Inputs.of(x)
  if by_hessian:
    inputs = Inputs(inputs.mean_abs, hessian=x.T @ x)
  found = quantize_awq(weights, inputs, grid, clip=clip)
  exact = output_error(weights, found.arrays, found.scale, x)
  plain = [quantize(w, grid, rtn.fit(w, grid)) for w in weights]
  start = output_error(weights, plain, np.ones(128), x)
  np.testing.assert_allclose(found.error, exact, rtol=1e-3)
  np.testing.assert_allclose(found.start, start, rtol=1e-3)
  assert found.error <= found.start


@settings(max_examples=40, deadline=None)
@given(grids, st.sampled_from([rtn.fit, search.fit]), st.integers(0, 5))
def test_alpha_zero_is_rounding_to_nearest(grid, fit, seed):
  weights, x = problem(seed)
  found = quantize_awq(weights, Inputs.of(x), grid, fit=fit, alphas=[0], clip=False)
  assert found.alpha == 0 and (found.scale == 1).all()
  for w, array in zip(weights, found.arrays, strict=True):
    plain = quantize(w, grid, fit(w, grid, np.square(x).mean(axis=0)))
    np.testing.assert_array_equal(array.codes, plain.codes)
    np.testing.assert_array_equal(array.dequantize(), plain.dequantize())


def test_the_best_alpha_of_the_grid_is_taken_for_all_matrices_together():
  weights, x = problem()
  grid = Grid(3, 64, "minimum")
  errors = {}
  for alpha in ALPHAS:
    s = np.abs(x).mean(axis=0).astype(np.float64) ** alpha
    s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
    arrays = [quantize(w * s, grid, rtn.fit(w * s, grid)) for w in weights]
    errors[alpha] = output_error(weights, arrays, s, x)
  found = quantize_awq(weights, Inputs.of(x), grid, clip=False)
  assert found.alpha == min(errors, key=errors.get) != 0
  np.testing.assert_allclose(found.error, min(errors.values()), rtol=1e-4)
  assert found.error < 0.6 * found.start


def test_clipping_lowers_the_error_further():
  weights, x = problem()
  grid = Grid(3, 64, "minimum")
  plain = quantize_awq(weights, Inputs.of(x), grid, clip=False)
  assert quantize_awq(weights, Inputs.of(x), grid).error < 0.9 * plain.error


def test_a_sample_and_its_hessian_agree():
  weights, x = problem()
  grid = Grid(4, 32, "absmax")
  a = quantize_awq(weights, Inputs.of(x), grid)
  b = quantize_awq(weights, Inputs(Inputs.of(x).mean_abs, hessian=x.T @ x), grid)
  assert a.alpha == b.alpha
  np.testing.assert_allclose(a.error, b.error, rtol=1e-2)


def test_inputs_that_never_were_active():
  mean = np.array([0, 1, 2, 1e-30], np.float32)
  s = scale_of(mean, 0.5)
  assert np.isfinite(s).all() and (s > 0).all() and s[0] == s[3]
  assert (scale_of(np.zeros(4, np.float32), 1.0) == 1).all()
  np.testing.assert_allclose(s.max() * s.min(), 1, rtol=1e-6)


def test_wrong_arguments_are_named():
  weights, x = problem()
  grid = Grid(4, 32)
  with pytest.raises(ConfigError, match="K=127"):
    quantize_awq(weights, Inputs.of(x[:, 1:]), grid)
  with pytest.raises(ConfigError, match="either a sample of inputs or their Hessian"):
    quantize_awq(weights, Inputs(Inputs.of(x).mean_abs), grid)
  with pytest.raises(ConfigError, match=r"a Hessian \[128, 128\]"):
    quantize_awq(weights, Inputs(Inputs.of(x).mean_abs, hessian=x), grid)
  with pytest.raises(ConfigError, match="not finite"):
    quantize_awq(weights, Inputs.of(x * np.inf), grid)
  with pytest.raises(ConfigError, match="one or more"):
    quantize_awq([], Inputs.of(x), grid)
