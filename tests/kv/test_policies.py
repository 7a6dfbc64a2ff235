"""Every policy against its formula in NumPy: float64, loops, one row and head at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.errors import ConfigError
from q4jax.kv.decide import keep_mask
from q4jax.kv.policies.random import Random
from q4jax.kv.policy import Needs, get_policy, policy_names, register
from q4jax.kv.protect import Protect
from q4jax.kv.select import LogZ, TopP, UnionRank
from q4jax.testing import random_context

HEADS, KV_HEADS, WINDOW = 4, 2, 4
GROUP = HEADS // KV_HEADS


@dataclass
class Row:
  """The filled slots of one row for one KV head, and the query heads that share it, in float64."""

  pos: np.ndarray  # [n]
  length: int
  k: np.ndarray  # [n, H]
  v: np.ndarray  # [n, H]
  attn: np.ndarray  # [GROUP, queries that exist, n]
  all_attn: np.ndarray  # [HEADS, queries that exist, n]
  queries: np.ndarray  # [GROUP, queries that exist, H]
  mass: np.ndarray  # [n]
  visits: np.ndarray  # [n]


def rows(c: Any) -> list[tuple[int, int, Row]]:
  found = []
  x = {name: np.asarray(getattr(c, name)).astype(np.float64)
       for name in ("k", "v", "attn", "queries", "mass", "visits")}  # fmt: skip
  for b in range(len(c.length)):
    n, length = int(c.valid[b].sum()), int(c.length[b])
    w = min(WINDOW, length)
    for h in range(KV_HEADS):
      heads = slice(h * GROUP, (h + 1) * GROUP)
      found.append((b, h, Row(
        pos=np.asarray(c.pos[b, :n]), length=length, k=x["k"][b, h, :n], v=x["v"][b, h, :n],
        attn=x["attn"][b, heads, -w:, :n], all_attn=x["attn"][b, :, -w:, :n],
        queries=x["queries"][b, heads, -w:], mass=x["mass"][b, h, :n], visits=x["visits"][b, :n],
      )))  # fmt: skip
  return found


def threshold(r: Row) -> list[float]:
  group, queries, n = r.attn.shape
  return [
    sum(r.attn[g, w, s] for g in range(group) for w in range(queries)) / (group * queries)
    for s in range(n)
  ]


def snapkv(r: Row, kernel: int = 3) -> list[float]:
  x = threshold(r)
  return [max(x[max(0, s - kernel // 2) : s + kernel // 2 + 1]) for s in range(len(x))]


def value_snap(r: Row) -> list[float]:
  return [a * sum(x * x for x in v) ** 0.5 for a, v in zip(snapkv(r), r.v, strict=True)]


def h2o(r: Row) -> list[float]:
  return [m / visits for m, visits in zip(r.mass, r.visits, strict=True)]


def vatp(r: Row) -> list[float]:
  return [a * sum(abs(x) for x in v) for a, v in zip(h2o(r), r.v, strict=True)]


def tova(r: Row) -> list[float]:
  return [sum(r.all_attn[head, -1, s] for head in range(HEADS)) / HEADS for s in range(len(r.pos))]


def keydiff(r: Row) -> list[float]:
  unit = [k / np.sqrt(k @ k) for k in r.k]
  anchor = sum(unit) / len(unit)
  return [-(k @ anchor) / np.sqrt((k @ k) * (anchor @ anchor)) for k in r.k]


def expected_attention(r: Row, epsilon: float = 0.02) -> list[float]:
  total = np.zeros(len(r.k))
  for q in r.queries:
    mu, size = q.mean(axis=0), q.shape[1]
    sigma = sum(np.outer(x - mu, x - mu) for x in q) / len(q)
    e = np.exp([mu @ k / size**0.5 + k @ sigma @ k / (2 * size) for k in r.k])
    total += e / e.sum() / len(r.queries)
  return [(a + epsilon) * np.sqrt(v @ v) for a, v in zip(total, r.v, strict=True)]


def scissorhands(r: Row) -> list[float]:
  group, queries, n = r.attn.shape
  pivotal = np.zeros(n)
  for w in range(queries):
    seen = [s for s in range(n) if r.pos[s] <= r.length - queries + w]
    for s in seen:
      pivotal[s] += sum(r.attn[g, w, s] > 1 / len(seen) for g in range(group))
  return list(pivotal / (group * queries))


def cake(r: Row, gamma: float = 200) -> list[float]:
  scores = [x.mean(axis=0) + gamma * x.var(axis=0) for x in r.attn]
  return list(sum(scores) / len(scores))


def morph(r: Row) -> list[float]:
  return [np.mean([max(r.attn[g, :, s]) for g in range(GROUP)]) for s in range(len(r.pos))]


def leverage(r: Row, ridge: float = 0.01) -> list[float]:
  x = r.k - r.k.mean(axis=0)
  gram = x.T @ x
  if not gram.any():
    return [0.0] * len(x)
  inverse = np.linalg.inv(gram + ridge * np.mean(np.diag(gram)) * np.eye(len(gram)))
  return [row @ inverse @ row for row in x]


def cur(r: Row, local: int = 3) -> list[float]:
  def share(x: np.ndarray, s: int) -> float:
    start = s // local * local
    return (x[s] @ x[s]) / sum(y @ y for y in x[start : start + local])

  return [share(r.k, s) * share(r.v, s) for s in range(len(r.pos))]


def lag_kv(r: Row, lag: int = 3, sink: int = 2) -> list[float]:
  n = len(r.pos)
  score = [1 + s / n for s in range(n)]
  for start in range(sink, n - 2 * lag + 1, lag):
    both = np.zeros(lag)
    for x in (r.k, r.v):
      low, high = (f(x[start + lag : start + 2 * lag], axis=0) for f in (np.min, np.max))
      e = np.exp([((x[start + i] - low) / (high - low)).std() for i in range(lag)])
      both += e / e.sum() / 2
    for place, i in enumerate(np.argsort(both)):
      score[start + i] = place / lag
  return score


ORACLES: dict[str, tuple[Callable[[Row], Any], dict[str, Any]]] = {
  "threshold": (threshold, {"window": WINDOW}),
  "snapkv": (snapkv, {"window": WINDOW, "kernel": 3}),
  "value_snap": (value_snap, {"window": WINDOW, "kernel": 3}),
  "h2o": (h2o, {}),
  "vatp": (vatp, {}),
  "tova": (tova, {}),
  "streaming": (lambda r: r.pos, {}),
  "knorm": (lambda r: [-np.sqrt(k @ k) for k in r.k], {}),
  "value_norm": (lambda r: [np.sqrt(v @ v) for v in r.v], {}),
  "keydiff": (keydiff, {}),
  "expected_attention": (expected_attention, {"window": WINDOW, "epsilon": 0.02}),
  "scissorhands": (scissorhands, {"window": WINDOW}),
  "cake": (cake, {"window": WINDOW}),
  "morph": (morph, {"window": WINDOW}),
  "leverage": (leverage, {}),
  "cur": (cur, {"local": 3}),
  "lag_kv": (lag_kv, {"lag": 3, "sink": 2}),
}


@pytest.fixture(autouse=True)
def compile_in_haste() -> Iterator[None]:
  """Many small programs, each run a few times."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("name", ORACLES)
def test_against_its_formula(name: str) -> None:
  oracle, options = ORACLES[name]
  policy = jax.jit(get_policy(name, **options))
  for seed in (5, 6, 7):
    c = random_context([14, 9, 2, 1], slots=16, window=WINDOW, seed=seed)
    score = np.asarray(policy(c))
    for b, head, row in rows(c):
      n = len(row.pos)
      np.testing.assert_allclose(score[b, head, :n], oracle(row), rtol=2e-4, atol=1e-6)
      assert (score[b, head, n:] == -np.inf).all()


def test_h2o_of_the_paper_does_not_divide() -> None:
  c = random_context([9, 5], slots=9, seed=8)
  score = np.asarray(get_policy("h2o", divide=False)(c))
  for b, head, row in rows(c):
    np.testing.assert_allclose(score[b, head, : len(row.pos)], row.mass, rtol=1e-6)


def test_random_knows_seed_and_position_only() -> None:
  a = random_context([14, 9], slots=16, seed=9)
  b = random_context([14, 9], slots=16, seed=10)
  scorer = jax.jit(Random(seed=3).__call__)
  score = np.asarray(scorer(a))
  by_position: dict[int, float] = {}
  for c in (a, b):
    x = np.asarray(scorer(c))
    assert (x[:, 0] == x[:, 1]).all()
    for row, slot in np.argwhere(np.asarray(c.valid)):
      position = int(c.pos[row, slot])
      assert by_position.setdefault(position, x[row, 0, slot]) == x[row, 0, slot]
  assert len(set(by_position.values())) == len(by_position)
  assert (np.asarray(Random(seed=4)(a))[0, 0, :14] != score[0, 0, :14]).all()
  assert all(0 <= x < 1 for x in by_position.values())


def test_every_policy_has_an_oracle() -> None:
  tested = {type(get_policy(name)) for name in ORACLES} | {Random}
  ours = [get_policy(name) for name in policy_names()]
  assert {type(p) for p in ours if type(p).__module__.startswith("q4jax.")} == tested
  assert get_policy("observed_attention") == get_policy("h2o")
  assert get_policy("value_h2o") == get_policy("vatp")


def test_lookup_names_what_is_near() -> None:
  with pytest.raises(ConfigError, match="Unknown policy 'snapvk'; nearest: snapkv"):
    get_policy("snapvk")
  with pytest.raises(ConfigError, match="Unknown policy 'qqq'; there are: cake, cur, .*vatp"):
    get_policy("qqq")
  with pytest.raises(ConfigError, match="'snapkv' has no option 'windw'; nearest: window"):
    get_policy("snapkv", windw=3)
  with pytest.raises(ConfigError, match="'tova' has no option 'window'; it has none"):
    get_policy("tova", window=3)


def test_a_name_is_taken_once() -> None:
  with pytest.raises(ConfigError, match="The name 'snapkv' belongs to q4jax.kv.policies.snapkv"):
    register("snapkv")(Random)


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("threshold", {"window": 0}),
    ("morph", {"window": 2.0}),
    ("scissorhands", {"window": -1}),
    ("snapkv", {"kernel": 4}),
    ("value_snap", {"kernel": 0}),
    ("cake", {"gamma": float("inf")}),
    ("cake", {"gamma": -1}),
    ("expected_attention", {"epsilon": -1e-3}),
    ("expected_attention", {"window": "8"}),
    ("leverage", {"ridge": 0}),
    ("cur", {"local": 0}),
    ("lag_kv", {"lag": 0}),
    ("lag_kv", {"sink": -1}),
    ("h2o", {"divide": 1}),
    ("random", {"seed": -1}),
  ],
)
def test_options_are_checked(name: str, options: dict[str, Any]) -> None:
  (option,) = options
  with pytest.raises(ConfigError, match=f": {option} is .*; expected "):
    get_policy(name, **options)


def test_needs_are_checked() -> None:
  with pytest.raises(ConfigError, match="Needs: attn is 'windw'; expected one of 'none'"):
    Needs(attn="windw")  # type: ignore[arg-type]
  with pytest.raises(ConfigError, match="window is 0"):
    Needs(window=0)


def test_keep_mask_puts_the_parts_together() -> None:
  c = random_context([14, 9, 1], slots=16, window=WINDOW, seed=11)
  protect = Protect(sink=1, recent=2, grace=0)
  mask = jax.jit(keep_mask, static_argnums=(0, 1, 2))
  keep = np.asarray(mask(get_policy("threshold", window=WINDOW), UnionRank(0.6), protect, c))
  # Of all tokens seen, the one row's lost ones too.
  assert c.length[0] == 14 and c.length[1] > 9
  assert keep.sum(axis=1).tolist() == [9, math.ceil(0.6 * c.length[1]), 1]
  assert not keep[~np.asarray(c.valid)].any()
  assert keep[0, [0, 12, 13]].all()


@pytest.mark.parametrize("select", [TopP(0.9), LogZ(0.0), UnionRank(0.5, by="logz")])
def test_shares_of_scores_that_are_no_amounts_are_refused(select: Any) -> None:
  c = random_context([4], slots=4)
  with pytest.raises(ConfigError, match="needs scores of 0 or more, and KNorm does not"):
    keep_mask(get_policy("knorm"), select, Protect(), c)
  jax.eval_shape(lambda c: keep_mask(get_policy("value_norm"), select, Protect(), c), c)


def test_half_precision_caches_are_scored_in_float32() -> None:
  c = random_context([6], slots=8, seed=12)
  half = jax.tree.map(lambda x: x.astype(jnp.float16) if x.dtype == jnp.float32 else x, c)
  policy = jax.jit(get_policy("knorm").__call__)
  score = policy(half)
  assert score.dtype == jnp.float32
  np.testing.assert_allclose(score[0, :, :6], policy(c)[0, :, :6], rtol=2e-3)
