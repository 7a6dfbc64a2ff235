"""Every selection rule against loops in float64, on ties, unequal lengths and protected rows."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from q4jax.errors import ConfigError
from q4jax.kv.select import (
  LogZ,
  MedianStd,
  Quantile,
  Select,
  TopK,
  TopP,
  UnionRank,
  get_select,
  select_names,
)

B, K, S = 4, 3, 12
# Compiled in haste: there are many rules, and little to compute.
run = jax.jit(
  lambda select, score, eligible, valid, seen=None: select(
    score, eligible, valid, valid.sum(-1) if seen is None else seen
  ),
  static_argnums=0,
  compiler_options={"xla_backend_optimization_level": 0},
)


def make(seed: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """score, eligible, valid: full, ragged, single and wholly protected rows; NaN where not valid."""
  rng = np.random.default_rng(seed)
  if kind == "ties":  # quarters: sums, medians and deviations of few values are exact enough
    score = rng.integers(0, 4, (B, K, S)) / 4
  else:
    score = np.exp(rng.normal(size=(B, K, S)) * 2)
  filled = np.array([S, rng.integers(2, S), 1, rng.integers(1, S + 1)])[:, None]
  valid = np.arange(S) < filled
  eligible = valid & (rng.random((B, S)) < 0.8)
  eligible[2] = valid[2] & (seed % 2 == 0)
  eligible[3] &= seed % 3 != 0
  return np.where(valid[:, None], score, np.nan).astype(np.float32), eligible, valid


def above(score: np.ndarray, tau: Callable[[np.ndarray], float]) -> list[bool]:
  """Slots, of scores [K, n], that any head finds above its tau."""
  return [
    any(score[h, j] > tau(score[h]) for h in range(len(score))) for j in range(score.shape[1])
  ]


def best(value: list[float], count: int, exact: bool = False) -> list[bool] | None:
  """The best `count`, the earlier of equals first; None if rounding may decide between two."""
  count = max(count, 0)
  order = sorted(range(len(value)), key=lambda j: (-value[j], j))
  close = 0 < count < len(value) and value[order[count - 1]] - value[order[count]] < 1e-4
  if close and not exact:
    return None
  return [j in order[:count] for j in range(len(value))]


def zscore(x: np.ndarray, centre: float) -> np.ndarray:
  spread = x.std()
  return (x - centre) / spread if spread > 0 else x - centre


def u(score: np.ndarray) -> list[float]:
  z = [zscore(x, np.median(x)) for x in score]
  return [max(x[j] for x in z) for j in range(score.shape[1])]


def log_u(score: np.ndarray) -> list[float]:
  z = [zscore(np.log(x), np.log(x).mean()) for x in score]
  return [max(x[j] for x in z) for j in range(score.shape[1])]


def r(score: np.ndarray) -> list[float]:
  return [max(sum(y < x[j] for y in x) for x in score) for j in range(score.shape[1])]


def top_p(score: np.ndarray, p: float) -> list[bool]:
  chosen = set()
  for x in score:
    held = 0.0
    for j in sorted(range(len(x)), key=lambda j: (-x[j], j)):
      if held >= p * x.sum() or x[j] == 0:
        break
      chosen.add(j)
      held += x[j]
  return [j in chosen for j in range(score.shape[1])]


def exactly(keep: float, n: int) -> int:
  return math.ceil(Fraction(str(keep)) * n)


# select -> (scores [K, eligible], how many are valid, how many protected) -> which to keep
Rule = Callable[[np.ndarray, int, int], list[bool] | None]
CONTINUOUS: list[tuple[Select, Rule]] = [
  (MedianStd(0.5), lambda x, n, p: above(x, lambda a: np.median(a) + 0.5 * a.std())),
  (MedianStd(-0.3), lambda x, n, p: above(x, lambda a: np.median(a) - 0.3 * a.std())),
  (LogZ(0.4), lambda x, n, p: above(np.log(x), lambda a: a.mean() + 0.4 * a.std())),
  (UnionRank(0.6), lambda x, n, p: best(u(x), exactly(0.6, n) - p)),
  (UnionRank(0.35, by="logz"), lambda x, n, p: best(log_u(x), exactly(0.35, n) - p)),
  (TopP(0.8), lambda x, n, p: top_p(x, 0.8)),
]
ANY: list[tuple[Select, Rule]] = [
  (Quantile(0.75), lambda x, n, p: above(x, lambda a: np.quantile(a, 0.75))),
  (Quantile(0.5), lambda x, n, p: above(x, lambda a: np.quantile(a, 0.5))),
  (UnionRank(0.6, by="rank"), lambda x, n, p: best(r(x), exactly(0.6, n) - p, exact=True)),
  (UnionRank(1.0), lambda x, n, p: [True] * x.shape[1]),
  (TopK(5, by="rank"), lambda x, n, p: best(r(x), min(5, n) - p, exact=True)),
  (TopP(0.5), lambda x, n, p: top_p(x, 0.5)),
  (TopP(1.0), lambda x, n, p: [bool((x[:, j] > 0).any()) for j in range(x.shape[1])]),
]


@pytest.mark.parametrize(
  ("select", "rule", "kind"),
  [(*case, "continuous") for case in CONTINUOUS + ANY] + [(*case, "ties") for case in ANY],
  ids=lambda x: "rule" if callable(x) and not isinstance(x, Select) else str(x),
)
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32))
def test_against_a_loop(select: Select, rule: Rule, kind: str, seed: int) -> None:
  score, eligible, valid = make(seed, kind)
  keep = np.asarray(run(select, score, eligible, valid))
  for b in range(B):
    slots = np.flatnonzero(eligible[b])
    expected = valid[b] & ~eligible[b]
    if len(slots):
      n, protected = int(valid[b].sum()), int(expected.sum())
      chosen = rule(score[b][:, slots].astype(np.float64), n, protected)
      if chosen is None:
        continue
      expected[slots] = chosen
    assert keep[b].tolist() == expected.tolist(), f"row {b}"


@given(
  st.integers(0, 2**32),
  st.sampled_from([0.1, 0.55, 1.0]),
  st.sampled_from(["zscore", "rank"]),
  st.sampled_from(["ties", "continuous"]),
)
def test_union_rank_keeps_exactly_so_many(seed: int, keep: float, by: Any, kind: str) -> None:
  score, eligible, valid = make(seed, kind)
  kept = np.asarray(run(UnionRank(keep, by=by), score, eligible, valid)).sum(axis=1)
  for b in range(B):
    protected = int((valid[b] & ~eligible[b]).sum())
    assert kept[b] == max(exactly(keep, int(valid[b].sum())), protected)


@pytest.mark.parametrize("keep", [0.55, 0.6, 1 / 3])
def test_counts_are_exact_at_any_length(keep: float) -> None:
  # 0.55 * 100 is above 55 in floating point, in which ceil keeps one too many.
  lengths = np.array([1, 3, 7, 10, 20, 60, 99, 100, 333, 1000])
  valid = np.arange(1000) < lengths[:, None]
  score = np.zeros((len(lengths), 1, 1000), np.float32)
  kept = np.asarray(run(UnionRank(keep), score, valid, valid)).sum(axis=1)
  fraction = Fraction(str(keep)).limit_denominator(46340)
  assert kept.tolist() == [math.ceil(fraction * int(n)) for n in lengths]


def test_long_contexts_do_not_overflow() -> None:
  from q4jax.kv.select import _times

  n = 1_000_003
  for share in (0.6, 0.12345, 0.99999, 46339 / 46340):
    fraction = Fraction(str(share)).limit_denominator(46340)
    assert int(_times(share, np.int32(n))) == math.floor(fraction * n)
    assert int(_times(share, np.int32(n), up=True)) == math.ceil(fraction * n)


def test_of_equal_slots_the_earlier_stays() -> None:
  score = np.zeros((1, 2, 10), np.float32)
  valid = np.ones((1, 10), bool)
  eligible = valid.copy()
  eligible[0, [0, 9]] = False
  for select in (UnionRank(0.5), UnionRank(0.5, by="rank"), TopK(5)):
    keep = np.asarray(run(select, score, eligible, valid))
    assert np.flatnonzero(keep[0]).tolist() == [0, 1, 2, 3, 9]


def test_protected_slots_stay_beyond_the_target() -> None:
  score = np.ones((1, 2, 10), np.float32)
  valid = np.ones((1, 10), bool)
  eligible = np.arange(10)[None] >= 8
  for select in (UnionRank(0.1), TopK(1)):
    keep = np.asarray(run(select, score, eligible, valid))
    assert np.flatnonzero(keep[0]).tolist() == list(range(8))


def test_a_sink_does_not_lift_the_threshold() -> None:
  rng = np.random.default_rng(0)
  score = rng.random((1, 1, 50)).astype(np.float32)
  valid = np.ones((1, 50), bool)
  eligible = np.arange(50)[None] > 0
  before = np.asarray(run(MedianStd(0.5), score, eligible, valid))
  score[0, 0, 0] = 1e6
  assert (np.asarray(run(MedianStd(0.5), score, eligible, valid)) == before).all()


def test_shares_are_of_the_tokens_seen() -> None:
  """Evicting again and again leaves keep of all, not keep^n; and never more than there are."""
  score = np.random.default_rng(6).normal(size=(2, K, 20)).astype(np.float32)
  valid = np.ones((2, 20), bool)
  cases: list[tuple[Select, tuple[int, int], list[int]]] = [
    (UnionRank(0.5), (20, 30), [10, 15]),
    (UnionRank(0.5, by="rank"), (39, 100), [20, 50]),
    (TopK(7), (20, 5), [7, 5]),
  ]
  for select, seen, most in cases:
    kept = np.asarray(run(select, score, valid, valid, np.array(seen)))
    assert kept.sum(axis=1).tolist() == [min(n, 20) for n in most]
    bound = select.most(np.array(seen))
    assert bound is not None and bound.tolist() == most
  assert MedianStd().most(np.array([9])) is None


ALL = [MedianStd(), LogZ(), Quantile(), TopP(), UnionRank(), UnionRank(by="rank"), TopK(7),
       UnionRank(by="logz")]  # fmt: skip


@pytest.mark.parametrize("select", ALL, ids=str)
def test_nan_counts_as_minus_infinity(select: Select) -> None:
  rng = np.random.default_rng(1)
  score = np.exp(rng.normal(size=(B, K, S))).astype(np.float32)
  valid = np.ones((B, S), bool)
  score[:, :, 3] = -np.inf
  score[:, 0, 7] = -np.inf
  expected = np.asarray(run(select, score, valid, valid))
  score[np.isneginf(score)] = np.nan
  keep = np.asarray(run(select, score, valid, valid))
  assert (keep == expected).all()
  assert not keep[:, 3].any() and keep.any(axis=1).all()


@pytest.mark.parametrize("select", ALL, ids=str)
def test_nan_and_infinity_stay_out_of_the_statistics(select: Select) -> None:
  rng = np.random.default_rng(2)
  score = np.exp(rng.normal(size=(B, K, S))).astype(np.float32)
  valid = np.ones((B, S), bool)
  score[:, :, 5] = np.nan
  score[:, 1, 6] = np.inf
  keep = np.asarray(run(select, score, valid, valid))
  assert keep[:, 6].all()
  assert not isinstance(select, MedianStd) or (keep.sum(axis=1) > 2).all()


@pytest.mark.parametrize("select", ALL, ids=str)
def test_rows_do_not_mix_and_empty_slots_do_not_count(select: Select) -> None:
  score, eligible, valid = make(4, "continuous")
  keep = np.asarray(run(select, score, eligible, valid))
  others = make(6, "continuous")
  for b in range(B):
    row = np.arange(B) == b
    mixed = [np.where(row.reshape(B, *[1] * (x.ndim - 1)), x, y)
             for x, y in zip((score, eligible, valid), others, strict=True)]  # fmt: skip
    assert (np.asarray(run(select, *mixed))[b] == keep[b]).all()
  wide = [np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 5)]) for x in (score, eligible, valid)]
  wide[0][..., S:] = 1e9
  assert (np.asarray(run(select, *wide))[:, :S] == keep).all()


def test_all_of_the_mass_is_all_that_is_not_zero() -> None:
  score = np.zeros((B, K, S), np.float32)
  score[:, 0, :3] = [1, 1e-9, 1e-9]  # which float32 cannot add up
  valid = np.ones((B, S), bool)
  keep = np.asarray(run(TopP(1.0), score, valid, valid))
  assert keep[:, :3].all() and not keep[:, 3:].any()


@pytest.mark.parametrize("select", ALL, ids=str)
def test_empty_rows_keep_nothing(select: Select) -> None:
  empty = np.zeros((B, S), bool)
  assert not np.asarray(run(select, np.full((B, K, S), np.nan, np.float32), empty, empty)).any()


def test_heads_that_like_everything_alike_have_no_say() -> None:
  score = np.ones((1, 2, 6), np.float32)
  score[0, 1] = [1, 5, 2, 4, 3, 0]
  valid = np.ones((1, 6), bool)
  keep = np.asarray(run(TopK(3), score, valid, valid))
  assert np.flatnonzero(keep[0]).tolist() == [1, 3, 4]


def test_scores_of_any_scale_are_told_apart() -> None:
  score, eligible, valid = make(5, "continuous")
  for select in (UnionRank(0.4), MedianStd(0.5), LogZ(0.1)):
    keep = np.asarray(run(select, score, eligible, valid))
    for scale in (2.0**-80, 2.0**60):
      scaled = (score * np.float32(scale)).astype(np.float32)
      assert (np.asarray(run(select, scaled, eligible, valid)) == keep).all(), (select, scale)


def test_lookup() -> None:
  assert select_names() == ["log_z", "median_std", "quantile", "top_k", "top_p", "union_rank"]
  assert get_select("union_rank", keep=0.5, by="rank") == UnionRank(0.5, by="rank")
  with pytest.raises(ConfigError, match="Unknown select 'union_rnk'; nearest: union_rank"):
    get_select("union_rnk")
  with pytest.raises(ConfigError, match="'top_p' has no option 'q'; nearest|there are: p"):
    get_select("top_p", q=0.5)


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("union_rank", {"keep": 0}),
    ("union_rank", {"keep": 1.01}),
    ("union_rank", {"keep": float("nan")}),
    ("union_rank", {"by": "score"}),
    ("quantile", {"q": 1}),
    ("quantile", {"q": 0.0}),
    ("top_p", {"p": 0}),
    ("top_p", {"p": 1.5}),
    ("top_k", {"k": 0}),
    ("top_k", {"k": 2.5}),
    ("median_std", {"alpha": float("inf")}),
    ("median_std", {"alpha": "1"}),
    ("log_z", {"alpha": float("nan")}),
  ],
)
def test_options_are_checked(name: str, options: dict[str, Any]) -> None:
  (option,) = options
  with pytest.raises(ConfigError, match=f": {option} is .*; expected "):
    get_select(name, **options)
