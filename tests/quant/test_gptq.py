"""GPTQ against the paper's loop in float64 (all later weights updated by H's inverse); its laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from q4jax.errors import ConfigError
from q4jax.quant import gptq, rtn, search
from q4jax.quant.gptq import ORDERS, objective, quantize_gptq
from q4jax.quant.grid import RULES, Grid, quantize


def problem(n=24, k=96, samples=300, seed=0):
  """Weights and a Hessian of inputs that depend on each other, some much larger than others."""
  rng = np.random.default_rng(seed)
  w = rng.standard_normal((n, k)).astype(np.float32)
  mix = rng.standard_normal((k, k)) + 3 * rng.standard_normal((k, 1))
  x = rng.standard_normal((samples, k)) @ mix * rng.gamma(0.5, 1, k)
  return w, (x.T @ x / samples).astype(np.float64)


def reference(w, h, grid, damping=0.01, fit=rtn.fit):
  """Frantar et al., algorithm 1 with groups: quantise a column, update the later ones."""
  w = w.astype(np.float64).copy()
  k = w.shape[1]
  inverse = np.linalg.inv(h + damping * np.diagonal(h).mean() * np.eye(k))
  u = np.linalg.cholesky(inverse).T
  y = np.empty_like(w)
  for c in range(k):
    if c % grid.group_size == 0:
      group = w[:, c : c + grid.group_size].astype(np.float32)
      p = fit(group, grid, None)
      scale = p.scale.astype(np.float64)[:, 0]
      if p.minimum is None:
        zero, minimum = 2 ** (grid.bits - 1), 0.0
      else:
        zero, minimum = 0, p.minimum.astype(np.float64)[:, 0]
    code = (np.rint((w[:, c] + minimum) / scale) + zero).clip(0, 2**grid.bits - 1)
    y[:, c] = scale * (code - zero) - minimum
    error = (w[:, c] - y[:, c]) / u[c, c]
    w[:, c:] -= np.outer(error, u[c, c:])
  return y


@pytest.mark.parametrize("rule", ["signed", "absmax", "minimum"])
@pytest.mark.parametrize("size", [8, 32, 96])
def test_is_the_papers_loop(rule, size):
  w, h = problem()
  grid = Grid(4, size, rule, "float32")
  ours = quantize_gptq(w, h, grid)
  theirs = reference(w, h, grid)
  # A near-tie that float32 breaks otherwise moves all of the row that follows.
  y = ours.array.dequantize()
  rows = np.abs(y - theirs).max(axis=1) < 1e-4
  assert rows.mean() > 0.5


def test_channel_groups_are_the_papers_loop_too():
  w, h = problem()
  ours = quantize_gptq(w, h, Grid(4, "channel", "absmax", "float32"))
  theirs = reference(w, h, Grid(4, 96, "absmax", "float32"))
  assert (np.abs(ours.array.dequantize() - theirs).max(axis=1) < 1e-4).mean() > 0.7


grids = st.builds(
  Grid,
  bits=st.integers(2, 8),
  group_size=st.sampled_from([8, 16, 48, "channel", "tensor"]),
  rule=st.sampled_from(RULES),
)


@settings(max_examples=40, deadline=None)
@given(grids, st.sampled_from(ORDERS), st.sampled_from([rtn.fit, search.fit]), st.integers(0, 5))
def test_an_identity_as_hessian_gives_rounding_to_nearest(grid, order, fit, seed):
  w = np.random.default_rng(seed).standard_normal((5, 96)).astype(np.float32)
  h = np.float64(3.7) * np.eye(96)
  found = quantize_gptq(w, h, grid, fit=fit, order=order)
  plain = quantize(w, grid, fit(w, grid))
  np.testing.assert_array_equal(found.array.codes, plain.codes)
  np.testing.assert_array_equal(found.array.dequantize(), plain.dequantize())


@settings(max_examples=40, deadline=None)
@given(grids, st.sampled_from(ORDERS), st.sampled_from([rtn.fit, search.fit]), st.integers(0, 5))
def test_the_objective_is_what_it_says_and_never_above_the_start(grid, order, fit, seed):
  w, h = problem(n=7, seed=seed)
  found = quantize_gptq(w, h, grid, fit=fit, order=order)
  if found.permutation is not None:
    w, h = w[:, found.permutation], h[np.ix_(found.permutation, found.permutation)]
  miss = w - found.array.dequantize().astype(np.float64)
  exact = np.einsum("nk,kl,nl->n", miss, h, miss)
  np.testing.assert_allclose(found.objective, exact, rtol=1e-3)
  start = quantize(w, grid, fit(w, grid, np.diagonal(h).astype(np.float32)))
  miss = w - start.dequantize().astype(np.float64)
  np.testing.assert_allclose(found.start, np.einsum("nk,kl,nl->n", miss, h, miss), rtol=1e-3)
  assert (found.objective <= found.start).all()
  assert found.array.scale.shape == grid.groups(w.shape)


@pytest.mark.parametrize("order", ORDERS)
def test_it_lowers_the_objective_a_lot(order):
  w, h = problem(n=64, k=128, samples=200)
  found = quantize_gptq(w, h, Grid(4, 32, "minimum"), order=order)
  assert found.objective.sum() < 0.5 * found.start.sum()


def test_act_order_of_channels_is_a_permutation_of_the_problem():
  w, h = problem()
  taken = np.argsort(-np.diagonal(h), kind="stable")
  grid = Grid(4, "channel", "absmax")
  sorted_first = quantize_gptq(w[:, taken], h[np.ix_(taken, taken)], grid)
  for order in ("grouped", "static"):
    found = quantize_gptq(w, h, grid, order=order)
    np.testing.assert_array_equal(found.array.codes[:, taken], sorted_first.array.codes)
  permuted = quantize_gptq(w, h, grid, order="permuted")
  np.testing.assert_array_equal(permuted.permutation, taken)
  np.testing.assert_array_equal(permuted.array.codes, sorted_first.array.codes)


@pytest.mark.parametrize("order", ["grouped", "permuted"])
def test_orders_do_not_depend_on_how_inputs_lie_within_groups(order):
  # Inputs shuffled inside groups, and groups among themselves, give the same weights shuffled.
  w, h = problem()
  rng = np.random.default_rng(1)
  shuffle = np.concatenate([16 * g + rng.permutation(16) for g in rng.permutation(6)])
  grid = Grid(4, 16, "signed")
  a = quantize_gptq(w, h, grid, order=order)
  b = quantize_gptq(w[:, shuffle], h[np.ix_(shuffle, shuffle)], grid, order=order)
  if order == "permuted":
    np.testing.assert_array_equal(a.array.codes, b.array.codes)
  else:
    np.testing.assert_array_equal(a.array.codes[:, shuffle], b.array.codes)


def test_inputs_that_never_were_active_are_rounded_to_nearest():
  w, h = problem()
  dead = [0, 17, 95]
  h[dead], h[:, dead] = 0, 0
  grid = Grid(4, "channel", "absmax")
  found = quantize_gptq(w, h, grid)
  plain = quantize(w, grid, rtn.fit(w, grid))
  np.testing.assert_array_equal(found.array.codes[:, dead], plain.codes[:, dead])
  assert quantize_gptq(w, 0 * h, grid).fallback == 0


def test_a_hessian_of_fewer_samples_than_inputs_works():
  w, h = problem(samples=5)
  assert np.linalg.matrix_rank(h) == 5
  found = quantize_gptq(w, h.astype(np.float32), Grid(4, 32))
  assert found.objective.sum() < 0.6 * found.start.sum()
  # Without damping it is singular: more is added, and reported.
  assert quantize_gptq(w, h, Grid(4, 32), damping=0.0).damping > 0


def test_the_groups_fit_is_asked_with_what_an_error_costs():
  w, h = problem()
  seen = []

  def fit(x, grid, importance=None):
    seen.append((x.shape, importance))
    return rtn.fit(x, grid)

  quantize_gptq(w, h, Grid(4, 32), fit=fit)
  assert [shape for shape, _ in seen] == [(24, 96)] + 3 * [(24, 32)]
  damped = h + 0.01 * np.diagonal(h).mean() * np.eye(96)
  # 1 / [H^-1]_cc of the inputs not yet rounded (those from c on): the error's cost after make-up.
  c = 40
  cost = 1 / np.linalg.inv(damped[c:, c:])[0, 0]
  np.testing.assert_allclose(seen[2][1][c - 32], cost, rtol=1e-3)


def test_rows_that_it_does_not_improve_are_as_the_start_has_them(monkeypatch):
  w, h = problem(n=4)
  round_ = gptq._round

  def worse(*args):
    codes, p = round_(*args)
    return np.where(np.arange(4)[:, None] == 2, 15 - codes, codes), p

  monkeypatch.setattr(gptq, "_round", worse)
  grid = Grid(4, 32, "minimum")
  found = quantize_gptq(w, h, grid)
  plain = quantize(w, grid, rtn.fit(w, grid))
  assert found.fallback == 1
  np.testing.assert_array_equal(found.array.dequantize()[2], plain.dequantize()[2])
  assert found.objective[2] == objective(w, plain.dequantize(), h)[2]


def test_wrong_arguments_are_named():
  w, h = problem()
  with pytest.raises(ConfigError, match=r"is \[95, 95\]; K=96"):
    quantize_gptq(w, h[:95, :95], Grid(4, 32))
  with pytest.raises(ConfigError, match="not finite"):
    quantize_gptq(w, h * np.nan, Grid(4, 32))
  with pytest.raises(ConfigError, match="order='act'"):
    quantize_gptq(w, h, Grid(4, 32), order="act")
  with pytest.raises(ConfigError, match="not positive definite"):
    quantize_gptq(w, np.ones((96, 96)) - np.eye(96) * 0.9, Grid(4, 32), damping=0.0)
