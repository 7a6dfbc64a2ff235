"""The search against its start, against dense grids written apart, and on exact grids."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from q4jax.errors import ConfigError
from q4jax.quant import rtn, search
from q4jax.quant.grid import RULES, Grid, fake_quant, quantize


def matrix(kind, n, k, seed):
  rng = np.random.default_rng(seed)
  w = rng.standard_normal((n, k)) if kind != "tailed" else rng.standard_t(2, (n, k))
  w = w + 5 if kind == "shifted" else w * 1e-3 if kind == "small" else w
  return w.astype(np.float32)


def errors(w, y, grid, importance):
  """The weighted squared error of each group, float64."""
  square = (w.astype(np.float64) - y) ** 2 * importance
  return grid.split(square).sum(axis=-1)


@settings(max_examples=100, deadline=None)
@given(
  st.builds(
    Grid,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([8, 32, 128, "channel", "tensor"]),
    rule=st.sampled_from(RULES),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
  ),
  st.sampled_from(["normal", "tailed", "shifted", "small"]),
  st.booleans(),
  st.integers(0, 9),
)
def test_no_group_is_worse_than_its_start(grid, kind, weighted, seed):
  w = matrix(kind, 3, 128, seed)
  importance = np.random.default_rng(seed).gamma(0.3, 1, 128).astype(np.float32)
  importance = importance if weighted else np.ones(128, np.float32)
  start = errors(w, fake_quant(w, grid, rtn.fit(w, grid)), grid, importance)
  p = search.fit(w, grid, importance if weighted else None)
  found = errors(w, fake_quant(w, grid, p), grid, importance)
  assert p.scale.dtype == np.dtype(grid.scale_dtype)
  assert (found <= start * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits, slack", [(2, 1.2), (3, 1.2), (4, 1.2), (8, 2)])
@pytest.mark.parametrize("rule", ["absmax", "signed", "minimum"])
def test_is_near_the_best_of_a_dense_grid(bits, slack, rule):
  # At 8 bits what is best of 800 steps is luck: weights that happen to lie near points.
  rng = np.random.default_rng(1)
  w = rng.standard_normal((8, 32)).astype(np.float32)
  importance = rng.gamma(1, 1, 32).astype(np.float32)
  grid = Grid(bits, 32, rule, "float32")
  y = fake_quant(w, grid, search.fit(w, grid, importance, steps=20, refits=3))
  found = errors(w, y, grid, importance)[:, 0]
  codes = np.arange(2**bits)
  best = 0.0
  for row in w.astype(np.float64):
    largest = np.abs(row).max()
    if rule == "minimum":
      span = np.linspace(0.4, 1.1, 60)[:, None] * np.ptp(row) / codes[-1]
      low = np.linspace(0.4, 1.1, 60)[None] * row.min()
      points = low[..., None] + span[..., None] * codes
    else:
      sides = (1, -1) if rule == "signed" else (1,)
      steps = np.concatenate([side * np.linspace(0.2, 1.2, 800) for side in sides])
      points = (steps * largest / 2 ** (bits - 1))[:, None] * (codes - 2 ** (bits - 1))
    points = points.reshape(-1, 1, len(codes))
    miss = np.abs(row[None, :, None] - points).min(axis=-1) ** 2
    best += (miss @ importance).min()
  assert found.sum() <= slack * best


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_weights_on_a_grid_come_back_exactly(rule, bits):
  rng = np.random.default_rng(3)
  top = 2**bits - 1
  codes = rng.integers(0, top + 1, (4, 64))
  codes[:, ::16], codes[:, 1::16] = 0, top
  zero = {"minimum": -3, "zero_point": 1}.get(rule, (top + 1) // 2)
  w = ((codes - zero) * 0.25).astype(np.float32)
  grid = Grid(bits, 64, rule)
  # The range that holds them is among those tried or one refit away.
  y = fake_quant(w, grid, search.fit(w, grid, steps=20, refits=3))
  np.testing.assert_allclose(y, w, atol=2e-3)


def test_importance_moves_the_error_away_from_where_it_counts():
  w = matrix("tailed", 16, 128, 0)
  importance = np.where(np.arange(128) % 8 == 0, 100, 1).astype(np.float32)
  grid = Grid(3, 64, "minimum")
  plain = np.square(fake_quant(w, grid, search.fit(w, grid)) - w)
  weighted = np.square(fake_quant(w, grid, search.fit(w, grid, importance)) - w)
  assert weighted[:, ::8].mean() < 0.8 * plain[:, ::8].mean()
  # Only ratios count.
  scaled = search.fit(w, grid, importance * np.float32(1e-12))
  np.testing.assert_array_equal(scaled.scale, search.fit(w, grid, importance).scale)


def test_it_pays_most_at_few_bits():
  w = matrix("normal", 64, 512, 0)
  for bits, ratio in [(2, 0.5), (3, 0.8), (4, 0.9)]:
    grid = Grid(bits, 128, "absmax")
    start = np.square(fake_quant(w, grid, rtn.fit(w, grid)) - w).mean()
    assert np.square(fake_quant(w, grid, search.fit(w, grid)) - w).mean() < ratio * start


def test_groups_that_do_not_matter_and_zeros_keep_their_start():
  w = matrix("normal", 2, 64, 0)
  w[1, 32:] = 0
  importance = np.ones(64, np.float32)
  importance[:32] = 0
  grid = Grid(4, 32)
  p = search.fit(w, grid, importance)
  np.testing.assert_array_equal(p.scale[:, 0], rtn.fit(w, grid).scale[:, 0])
  assert p.scale[1, 1] == 0 and not quantize(w, grid, p).dequantize()[1, 32:].any()


def test_rows_do_not_depend_on_how_many_there_are():
  w = matrix("normal", 600, 1024, 0)
  grid = Grid(4, 64, "minimum")
  whole, part = search.fit(w, grid, steps=3), search.fit(w[590:], grid, steps=3)
  np.testing.assert_array_equal(whole.scale[590:], part.scale)
  np.testing.assert_array_equal(whole.minimum[590:], part.minimum)


def test_wrong_importance_is_named():
  w = matrix("normal", 2, 64, 0)
  with pytest.raises(ConfigError, match="importance must be 64 finite values"):
    search.fit(w, Grid(4, 32), np.ones(63, np.float32))
  with pytest.raises(ConfigError, match="lowest -1"):
    search.fit(w, Grid(4, 32), np.full(64, -1, np.float32))
