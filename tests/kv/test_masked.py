"""Statistics over masked slots, against NumPy's over the slots alone."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from q4jax.kv import masked

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32) | st.sampled_from((0.0, -0.0, 0.5, 0.25))


@given(
  hnp.arrays(np.float32, (2, 7), elements=FLOATS), hnp.arrays(bool, (2, 7), elements=st.booleans())
)
def test_median(x: np.ndarray, mask: np.ndarray) -> None:
  poisoned = np.where(mask, x, np.nan)
  found = np.asarray(masked.median(jnp.array(poisoned), jnp.array(mask)))
  assert found.shape == (2, 1)
  for row, counted, value in zip(x, mask, found[:, 0], strict=True):
    ordered = np.sort(np.where(np.abs(row[counted]) < 2e-38, 0, row[counted]))  # XLA flushes these
    if not len(ordered):
      assert value == 0
      continue
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    assert value == pytest.approx(low + (high - low) / 2, rel=1e-6, abs=2e-38)


def test_median_of_many() -> None:
  """One mask for several rows; an even and an odd number of slots."""
  x = np.random.default_rng(0).standard_normal((3, 1001)).astype(np.float32)
  for count in (1001, 1000, 2, 1):
    found = masked.median(jnp.array(x), jnp.arange(1001)[None] < count)
    np.testing.assert_allclose(found[:, 0], np.median(x[:, :count], axis=1), rtol=1e-6, atol=1e-7)
