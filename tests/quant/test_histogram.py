"""The histogram against np.histogram and ranges against brute force."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from q4jax.errors import ConfigError
from q4jax.quant.histogram import Histogram, _add, _divergence


def of(*arrays, bins=2048):
  state = Histogram.init(bins=bins)
  for x in arrays:
    state = state.update(jnp.asarray(x, jnp.float32).reshape(-1, 1))
  return state


values = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)  # XLA flushes those.


@given(st.lists(st.lists(values, min_size=8, max_size=8), min_size=1, max_size=4))
def test_counts_are_numpys(arrays):
  counts, edges = of(*arrays, bins=64).bins()
  x = np.concatenate(arrays).astype(np.float64)
  assert edges[-1] == -edges[0] and (np.abs(x) < edges[-1]).all()
  expected, _ = np.histogram(x, edges)
  np.testing.assert_array_equal(counts, expected)


def test_by_hand():
  # 8 bins over -4..4 hold 3 and -0.5; then 5 doubles the range, and pairs of bins join.
  state = of([3.0, -0.5], bins=8)
  counts, edges = state.bins()
  assert edges.tolist() == [-4, -3, -2, -1, 0, 1, 2, 3, 4]
  assert counts.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
  counts, edges = state.update(jnp.array([[5.0]])).bins()
  assert edges[0] == -8 and counts.tolist() == [0, 0, 0, 1, 0, 1, 1, 0]


def test_counts_carry_beyond_32_bits():
  full = jnp.full((2, 1), 2**32 - 1, jnp.uint32).at[1].set(0)
  two = _add(full, full)
  assert (int(two[0, 0]), int(two[1, 0])) == (2**32 - 2, 1)
  state = of([1.0] * 3)
  for _ in range(40):
    state = state.merge(state)
  assert state.bins()[0].sum() == 3 * 2**40


@pytest.mark.parametrize("q", [50, 90, 99, 99.9, 100])
def test_percentiles_are_numpys_to_a_bin(q):
  x = np.random.default_rng(0).standard_t(3, 50_000)
  state = of(x[:1000], x[1000:])
  _, edges = state.bins()
  low, high = state.percentile(q)
  # NumPy interpolates between neighbours, which lie apart in the tails: it is one of them.
  width = edges[1] - edges[0]
  for found, at in ((low, (100 - q) / 2), (high, 100 - (100 - q) / 2)):
    below, above = (np.percentile(x, at, method=method) for method in ("lower", "higher"))
    assert below - width <= found <= above + width
  if q == 100:
    assert (low, high) == (x.astype(np.float32).min(), x.astype(np.float32).max())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shift", [0, 2])
def test_mse_is_near_the_best_of_a_dense_search_on_the_values(bits, symmetric, shift):
  x = np.random.default_rng(0).standard_t(4, 4000) + shift
  low, high = of(x).mse(bits, symmetric=symmetric)

  def error(low, high):
    if symmetric:
      levels = 2 ** (bits - 1) - 1
      scale = high / levels
      y = np.rint(x / scale).clip(-levels - 1, levels) * scale
    else:
      scale = (high - low) / (2**bits - 1)
      zero = np.rint(-low / scale)
      y = (np.rint(x / scale).clip(-zero, 2**bits - 1 - zero)) * scale
    return np.square(x - y).mean()

  top = np.abs(x).max()
  ends = (-top, top) if symmetric else (min(x.min(), 0), x.max())
  best = min(error(f * ends[0], f * ends[1]) for f in np.linspace(0.02, 1, 1000))
  assert error(low, high) <= 1.05 * best
  assert not symmetric or low == -high


def test_kl_keeps_the_bulk_and_drops_far_outliers():
  rng = np.random.default_rng(0)
  x = rng.standard_normal(200_000)
  clean = of(x).kl(8)
  assert clean[0] == -clean[1] and 2.5 < clean[1] <= np.abs(x).max() + 1e-6
  x[:5] = 60
  outlier = of(x, bins=8192).kl(8)
  assert 2.5 < outlier[1] < 12
  low, high = of(np.abs(rng.standard_normal(10_000))).kl(4)
  assert low == 0 < high


def test_kl_of_counts_by_hand():
  # 4 bins at 2 levels: P = [4, 0, 2, 2] / 8; levels {4, 0} -> [4, 0] and {2, 2} -> [2, 2]: no loss.
  assert _divergence(np.array([4.0, 0, 2, 2]), 4, 2) == pytest.approx(0)
  # [3, 1 | 2, 2]: Q = [2, 2, 2, 2]; KL = 3/8 log(3/2) + 1/8 log(1/2).
  expected = 3 / 8 * np.log(1.5) + 1 / 8 * np.log(0.5)
  assert _divergence(np.array([3.0, 1, 2, 2]), 4, 2) == pytest.approx(expected)
  # Two bins of four: what is beyond joins the second: P = [4, 4] / 8 against Q = [4, 0+] / 4.
  assert _divergence(np.array([4.0, 0, 2, 2]), 2, 2) > 3


def test_constant_zero_and_wrong_arguments():
  assert of([0.0, 0.0]).mse(4) == (0.0, 0.0)
  assert of([0.0, 0.0]).percentile(99) == (0.0, 0.0)
  assert of([0.0, 0.0]).kl(4) == (0.0, 0.0)
  with pytest.raises(ConfigError, match="bins=6"):
    Histogram.init(bins=6)
  with pytest.raises(ConfigError, match="q=0"):
    of([1.0]).percentile(0)
  with pytest.raises(ConfigError, match="64 bins are too few for 8 bits: take 256"):
    of([1.0, -1.0], bins=64).kl(8)
