"""Draws what test_attention's `Case` takes, for kernels that round to 16 bits."""

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from kernels.test_attention import Case

ROUNDING = 2e-2  # of outputs near 1, whose queries, probabilities and values are rounded


def draw(data: st.DataObject, kinds: tuple[tuple[int, str], ...], slots: int = 1) -> Case:
  """Several tiles and blocks, ends inside of them, rows without tokens.

  Args:
    kinds: head dims and types of the cache to draw from.
    slots: its number is a multiple of this.
  """
  t = data.draw(st.sampled_from((1, 15, 16, 33, 70)), "T")
  s = t + data.draw(st.sampled_from((0, 1, 60, 190)), "more slots")
  s += -s % slots
  lengths = data.draw(st.lists(st.integers(0, t), min_size=1, max_size=3), "lengths")
  starts = [data.draw(st.integers(0, s - length), "start") for length in lengths]
  heads, kv_heads = data.draw(st.sampled_from(((4, 2), (3, 1), (2, 2))), "heads")
  head_dim, cache = data.draw(st.sampled_from(kinds), "head dim, cache")
  seed = data.draw(st.integers(0, 2**32 - 1), "seed")
  return Case(
    starts,
    lengths,
    t=t,
    s=s,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    cache=cache,
    seed=seed,
  )


def check(case: Case, attend: Callable) -> None:
  """Twice: as it is; and with all slots alike and values of few bits, when nothing is rounded, to
  see who sees whom.
  """
  case.check(*attend(*case.arguments), rtol=0, atol=ROUNDING)
  type = case.cache[1].dtype

  def coarse(x: np.ndarray) -> np.ndarray:
    return (np.round(4 * x.astype(type).astype(np.float32)) / 4).astype(x.dtype)

  case.q, case.v = np.zeros_like(case.q), coarse(case.v)
  case.cache, case.after = ((k, coarse(v)) for k, v in (case.cache, case.after))
  case.check(*attend(*case.arguments))


def check_nan(attend: Callable, slots: int) -> None:
  """NaN in a query stays in its head; the softmax of the others, nearly one-hot, stays finite."""
  case = Case([5, 130], [3, 3], t=3, s=slots, head_dim=64, cache="bf16")
  case.q = 30 * case.q
  clean, cache = attend(*case.arguments)
  case.check(clean, cache, rtol=0, atol=0.3)
  case.q[1, 1, 2, 0] = np.nan
  out, _ = attend(*case.arguments)
  assert np.isnan(out[1, 1, 2]).all()
  others = np.ones(out.shape[:3], bool)
  others[1, 1, 2] = False
  np.testing.assert_array_equal(np.asarray(out)[others], np.asarray(clean)[others])
