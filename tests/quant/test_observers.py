"""Observers against NumPy over everything at once, in float64; order, masks, merges and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from q4jax.errors import ConfigError
from q4jax.quant.histogram import Histogram
from q4jax.quant.observers import Hessian, MinMax, Moments, MovingAverage

K = 12
KINDS = (MinMax, MovingAverage, Moments, Hessian, Histogram)


def batches(seed, count=4):
  """Batches [B, T, K] of different sizes with masks, as NumPy arrays."""
  rng = np.random.default_rng(seed)
  out = []
  for i in range(count):
    b, t = rng.choice([1, 3]), rng.choice([2, 5])  # Few shapes: each compiles.
    x = rng.standard_normal((b, t, K)) * 10.0 ** rng.integers(-3, 3)
    valid = rng.random((b, t)) < 0.7
    valid[0, 0] = True
    out.append((x.astype(np.float32), valid if i % 2 else None))
  return out


def observe(kind, data):
  state = kind.init(K)
  update = jax.jit(kind.update)
  for x, valid in data:
    state = update(state, jnp.asarray(x), None if valid is None else jnp.asarray(valid))
  return state


def seen(data):
  """All valid rows, float64[rows, K]."""
  return np.concatenate(
    [x[np.ones(x.shape[:2], bool) if valid is None else valid] for x, valid in data]
  ).astype(np.float64)


@given(st.integers(0, 99))
def test_they_are_what_numpy_says(seed):
  data = batches(seed)
  x = seen(data)
  low, high = observe(MinMax, data).range()
  np.testing.assert_array_equal(low, x.min(axis=0))
  np.testing.assert_array_equal(high, x.max(axis=0))
  moments = observe(Moments, data)
  np.testing.assert_allclose(moments.mean_abs(), np.abs(x).mean(axis=0), rtol=1e-5)
  np.testing.assert_allclose(moments.mean_square(), np.square(x).mean(axis=0), rtol=1e-5)
  assert int(moments.count) == len(x)
  expected = x.T @ x / len(x)
  np.testing.assert_allclose(observe(Hessian, data).mean(), expected, atol=1e-5 * expected.max())
  sequences = []
  for b, valid in data:
    for i, s in enumerate(b):
      s = s if valid is None else s[valid[i]]
      if len(s):
        sequences.append((s.min(axis=0), s.max(axis=0)))
  low, high = observe(MovingAverage, data).range()
  np.testing.assert_allclose(low, np.mean([s[0] for s in sequences], axis=0), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(high, np.mean([s[1] for s in sequences], axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 99))
def test_order_and_merging_do_not_matter(kind, seed):
  data = batches(seed)
  once, back = observe(kind, data), observe(kind, data[::-1])
  parts = [observe(kind, data[i : i + 1]) for i in range(4)]
  a, b, c, d = parts
  left = a.merge(b).merge(c).merge(d)
  right = a.merge(b.merge(c.merge(d)))
  empty = kind.init(K).merge(once).merge(kind.init(K))
  for other in (back, left, right, empty):
    for x, y in zip(jax.tree.leaves(once), jax.tree.leaves(other), strict=True):
      if kind in (Histogram, MinMax):
        np.testing.assert_array_equal(x, y)
      else:
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(x).max())


@pytest.mark.parametrize(
  "kind, k, nbytes",
  [
    (MinMax, 4096, 8 * 4096),
    (MovingAverage, 4096, 8 * 4096 + 4),
    (Moments, 4096, 8 * 4096 + 4),
    (Hessian, 512, 4 * 512 * 512 + 4),
    (Histogram, 4096, 8 * 2048 + 12),
  ],
)
def test_memory_is_what_the_documentation_says_and_does_not_grow(kind, k, nbytes):
  state = kind.init(k)
  assert state.nbytes == nbytes
  state = jax.jit(kind.update)(state, jnp.ones((3, k)))
  assert jax.jit(kind.update)(state, jnp.ones((7, k)) * 1e6).nbytes == nbytes


def test_an_update_compiles_once_a_shape():
  traces = []

  @jax.jit
  def update(state, x):
    traces.append(1)
    return state.update(x)

  state = Histogram.init()
  for size in (1e-20, 1.0, 1e20):
    state = update(state, jnp.full((2, K), size))
  assert len(traces) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_seen_and_values_that_are_not_finite_are_refused(kind):
  def read(state):
    named = {Moments: Moments.mean_square, Hessian: Hessian.mean}
    return named.get(kind, lambda s: s.range())(state)

  with pytest.raises(ConfigError, match="nothing was observed"):
    read(kind.init(K))
  only_padding = observe(kind, [(np.ones((1, 2, K), np.float32), np.zeros((1, 2), bool))])
  with pytest.raises(ConfigError, match="nothing was observed"):
    read(only_padding)
  for bad in (np.nan, np.inf):
    x = np.ones((1, 2, K), np.float32)
    x[0, 1, 3] = bad
    with pytest.raises(ConfigError, match="not finite"):
      read(observe(kind, [(x, None)]))
    # Padding may hold anything.
    assert read(observe(kind, [(x, np.array([[True, False]]))])) is not None
