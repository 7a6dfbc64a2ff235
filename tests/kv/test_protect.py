"""Protected slots against a loop over them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from q4jax.errors import ConfigError
from q4jax.kv.protect import Protect


@given(st.integers(0, 2**32), st.integers(0, 6), st.integers(0, 9), st.integers(0, 9))
def test_against_a_loop(seed: int, sink: int, recent: int, grace: int) -> None:
  rng = np.random.default_rng(seed)
  pos = np.sort(rng.permuted(np.tile(np.arange(20), (3, 1)), axis=1)[:, :10]).astype(np.int32)
  valid = np.arange(10) < rng.integers(0, 11, (3, 1))
  length = (pos.max(axis=1) + 1).astype(np.int32)
  protected = np.asarray(Protect(sink, recent, grace)(pos, length, valid))
  for b in range(3):
    for s in range(10):
      queries = length[b] - pos[b, s]  # those from its own on
      expected = valid[b, s] and (pos[b, s] < sink or queries <= recent or queries <= grace)
      assert protected[b, s] == expected


def test_defaults_by_hand() -> None:
  pos = np.arange(100, dtype=np.int32)[None]
  protected = Protect()(pos, np.array([100], np.int32), np.ones((1, 100), bool))
  assert np.flatnonzero(protected[0]).tolist() == [0, 1, 2, 3, *range(36, 100)]


def test_position_counts_and_not_the_slot() -> None:
  # Tokens 2 to 96 have been evicted: the three slots left are no sinks but for the first two.
  pos = np.array([[0, 1, 97, 98, 99]], np.int32)
  protected = Protect(sink=4, recent=2, grace=0)(pos, np.array([100], np.int32), pos >= 0)
  assert protected.tolist() == [[True, True, False, True, True]]


@pytest.mark.parametrize("name", ["sink", "recent", "grace"])
@pytest.mark.parametrize("value", [-1, 1.5, "4", True, None])
def test_refuses(name: str, value: object) -> None:
  with pytest.raises(
    ConfigError, match=f"Protect: {name} is .*; expected a whole number, 0 or more"
  ):
    Protect(**{name: value})
