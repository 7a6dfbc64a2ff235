"""What leaves the dense cache of a prompt, and where it goes: against loops in float64."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kv_steps import Holds, attend_all, dims, spilled
from q4jax.kv import compress
from q4jax.kv.cache import CompressedKV
from q4jax.kv.compress import decide, pack, spilled_after
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import Needs, Policy, ScoreContext, get_policy
from q4jax.kv.protect import Protect
from q4jax.kv.select import UnionRank
from q4jax.model.caches import Recording
from q4jax_kernels import kv_pages
from q4jax_kernels.hadamard import rotate
from q4jax_kernels.kv_format import KVFormat, quantize
from q4jax_kernels.kv_pages import Pages
from q4jax_kernels.paged_attention import Paged

L, N, K, S, H = 2, 4, 2, 72, 16
LENGTH = np.array([0, 1, 30, 37, 61, 72])  # nothing, less than the sinks, no spill, one, more
B = len(LENGTH)
KV = KVConfig(protect=Protect(sink=3, recent=4, grace=0), block_size=16)

# Compiled in haste: the arrays are small.
hasty = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_cache(seed: int = 0, slots: int = S, batch: int = B) -> tuple[np.ndarray, np.ndarray]:
  return tuple(
    np.random.default_rng(seed).normal(size=(2, L, batch, K, slots, H)).astype(np.float32)
  )


@pytest.mark.parametrize(("sink", "recent", "size"), [(0, 0, 16), (3, 4, 16), (4, 64, 32)])
def test_as_many_leave_as_if_they_had_come_one_by_one(sink: int, recent: int, size: int) -> None:
  kv = KVConfig(protect=Protect(sink, recent), block_size=size)
  lengths = np.arange(300)
  assert spilled_after(lengths, kv).tolist() == [spilled(n, kv) for n in lengths]


def probabilities(q: np.ndarray, k: np.ndarray, length: int) -> np.ndarray:
  """float64[N, W, S] of the last W queries [W, N, H] of one row over k [K, S, H]."""
  window, heads, h = q.shape
  out = np.zeros((heads, window, k.shape[1]))
  for w in range(window):
    at = length - window + w
    for n in range(heads):
      if at >= 0:
        key = k[n * len(k) // heads, : at + 1].astype(np.float64)
        e = np.exp(key @ q[w, n].astype(np.float64) / math.sqrt(h))
        out[n, w, : at + 1] = e / e.sum()
  return out


def random_queries(window: int, seed: int = 1) -> np.ndarray:
  """float32[L, B, W, N, H], 0 where a row has no such query."""
  q = np.random.default_rng(seed).normal(size=(L, B, window, N, H)).astype(np.float32) * 2
  exists = np.arange(window) >= window - LENGTH[:, None]
  return q * exists[:, :, None, None]


def test_attention_of_the_last_queries() -> None:
  q, (k, _) = random_queries(9), random_cache()
  pos = jnp.broadcast_to(jnp.arange(S), (B, S))
  found = compress.attention(jnp.array(q[0]), jnp.array(k[0]), pos, jnp.array(LENGTH))
  for b, length in enumerate(LENGTH):
    np.testing.assert_allclose(found[b], probabilities(q[0, b], k[0, b], length), atol=1e-6)


def recorded(cache: tuple[np.ndarray, np.ndarray]) -> tuple[jax.Array, jax.Array]:
  return jnp.array(cache[0]), jnp.array(cache[1])


def prompt_mass(q: np.ndarray, cache: tuple[np.ndarray, np.ndarray]) -> jax.Array:
  """float32[L, B, K, S], of all queries."""
  mass = np.zeros((L, B, K, S))
  for layer, b in np.ndindex(L, B):
    p = probabilities(q[layer, b], cache[0][layer, b], LENGTH[b])
    mass[layer, b] = p.sum(axis=1).reshape(K, N // K, S).mean(axis=1)
  return jnp.array(mass, jnp.float32)


def chosen(score: np.ndarray, length: int, kv: KVConfig) -> set[int]:
  """Positions of one row that UnionRank by z-score sends to the blocks; score float64[K, S]."""
  leave = set(range(kv.protect.sink, kv.protect.sink + spilled(length, kv)))
  newest = max(kv.protect.recent, kv.protect.grace)
  eligible = sorted(p for p in leave if p < length - newest)
  if not eligible:
    return leave
  a = score[:, eligible]
  u = ((a - np.median(a, axis=1)[:, None]) / a.std(axis=1)[:, None]).max(axis=0)
  count = math.ceil(round(kv.select.keep * length, 6)) - (length - len(eligible))
  order = np.argsort(-u, kind="stable")
  if 0 < count < len(u):  # else rounding to float32 may decide
    assert u[order[count - 1]] - u[order[count]] > 1e-5
  return (leave - set(eligible)) | {eligible[i] for i in order[: max(count, 0)]}


@pytest.mark.parametrize("grace", [0, 30])
@pytest.mark.parametrize("name", ["threshold", "h2o"])
def test_decide(name: str, grace: int) -> None:
  policy = get_policy(name, **({"window": 9} if name == "threshold" else {}))
  protect = replace(KV.protect, grace=grace)
  kv = replace(KV, policy=policy, select=UnionRank(0.55), protect=protect)
  window = kv.window or S
  q, cache = random_queries(window), random_cache()
  run = hasty(decide, static_argnames="kv")
  prompt = Recording(recorded(cache), jnp.array(q) if kv.window else None, prompt_mass(q, cache))
  keep = np.asarray(run(prompt, jnp.array(LENGTH), kv=kv))
  evicted = 0
  for layer in range(L):
    for b, length in enumerate(LENGTH):
      p = probabilities(q[layer, b], cache[0][layer, b], length)
      if name == "h2o":
        score = p.sum(axis=1) / np.maximum(length - np.arange(S), 1)
      else:
        score = p.sum(axis=1) / max(min(length, window), 1)
      score = score.reshape(K, N // K, S).mean(axis=1)
      want = chosen(score, length, kv)
      assert set(np.flatnonzero(keep[layer, b])) == want, (layer, b)
      evicted += spilled(length, kv) - len(want)
  assert evicted > 20


def test_decide_without_a_policy_keeps_all_that_leave() -> None:
  keep = decide(Recording(recorded(random_cache())), jnp.array(LENGTH), KV)
  assert keep.shape == (L, B, S)
  for b, length in enumerate(LENGTH):
    for layer in range(L):
      where = np.flatnonzero(keep[layer, b]).tolist()
      assert where == list(range(3, 3 + spilled(length, KV)))


class Greedy(Policy):
  """Wants all that a context can have at once."""

  needs = Needs(attn="cumulative", window=5, keys=True, values=True, queries=True)

  def score(self, c: ScoreContext) -> jax.Array:
    assert c.k is not None and c.v is not None and c.queries is not None and c.mass is not None
    assert c.queries.shape[2] == 5
    return jnp.sum(c.k * c.v, axis=-1) + c.mass + c.group_mean(c.queries).sum((2, 3))[..., None]


def test_a_policy_gets_all_it_needs() -> None:
  kv, cache = replace(KV, policy=Greedy()), random_cache()
  run = hasty(decide, static_argnames="kv")
  mass = prompt_mass(random_queries(S), cache)
  prompt = Recording(recorded(cache), jnp.array(random_queries(5)), mass)
  assert run(prompt, jnp.array(LENGTH), kv=kv).any()


INT4, INT8 = KVFormat(4, 8), KVFormat(8, symmetric=True)
PACKED = [  # key, value, rotate, layout, mask
  (INT4, INT4, True, "rows", False),
  (INT4, INT4, True, "x16", True),
  (INT8, KVFormat(4, 16), False, "x16", False),
  (KVFormat(16), KVFormat(32), False, "rows", True),
]


def empty(key: KVFormat, value: KVFormat, layout: str, blocks: int, width: int) -> Paged:
  """A pool of NaN and 7s, and a table that must not matter."""
  dense = jnp.full((L, B, K, 3 + 4 + 16, H), jnp.nan)
  pages = [
    Pages.zeros(blocks, K, H, f, kind=kind, layout=layout, block_size=16)
    for f, kind in ((key, "key"), (value, "value"))
  ]
  table = jnp.full((L, B, width), 7, jnp.int32)
  pos = jnp.full((blocks, 16), -1, jnp.int32)
  return Paged(dense, dense, *pages, pos, table, jnp.ones((L, B), jnp.int32), 3, 4)


def by_slot(pages: Pages) -> tuple[np.ndarray, ...]:
  """[NB, K, bs, ...] of codes, and of scales and minimums where there are any."""
  if pages.format.is_float:
    return (np.asarray(pages.codes),)
  unpack = hasty(kv_pages.unpack, static_argnums=(1, 2, 3))
  parts = unpack(pages.parts, pages.format, pages.layout, pages.kind)
  return tuple(np.asarray(a) for a in parts if a is not None)


def as_stored(x: jax.Array, format: KVFormat) -> tuple[np.ndarray, ...]:
  if format.is_float:
    return (np.asarray(x.astype(format.dtype)),)
  parts = hasty(quantize, static_argnums=1)(x, format)
  return tuple(np.asarray(a) for a in parts if a is not None)


@pytest.mark.parametrize(("key", "value", "turn", "layout", "mask"), PACKED)
def test_pack(key: KVFormat, value: KVFormat, turn: bool, layout: str, mask: bool) -> None:
  kv = replace(KV, key=key, value=value, rotate=turn, mask=mask)
  cache, rng, width = tuple(map(jnp.array, random_cache())), np.random.default_rng(2), 6
  keep = np.zeros((L, B, S), bool)
  for b, length in enumerate(LENGTH):
    keep[:, b, 3 : 3 + spilled(length, kv)] = rng.random((L, spilled(length, kv))) < 0.5
  stored = [[spilled(n, kv) for n in LENGTH]] * L if mask else keep.sum(-1)
  counts = -(-np.array(stored) // 16)
  ids, table = iter(rng.permutation(np.arange(1, 60))), np.zeros((L, B, width), np.int32)
  for at in np.ndindex(L, B):
    table[at][: counts[at]] = [next(ids) for _ in range(counts[at])]
  run = hasty(pack, static_argnames="kv")
  before = empty(key, value, layout, 64, width)
  after = run(cache, jnp.array(keep), jnp.array(LENGTH), jnp.array(table), before, kv=kv)

  positions = np.full((64, 16), -1)
  x = [rotate(c) if turn else c for c in cache]
  whole = [as_stored(c, f) for c, f in zip(x, (key, value), strict=True)]  # [L, B, K, S, ..]
  pages = [by_slot(after.key_pages), by_slot(after.value_pages)]
  for layer, b in np.ndindex(L, B):
    kept = [p for p in range(S) if keep[layer, b, p]]
    lie = list(range(3, 3 + spilled(LENGTH[b], kv))) if mask else kept
    for i, p in enumerate(lie):
      block, slot = table[layer, b, i // 16], i % 16
      positions[block, slot] = p if p in kept else -2 - p
      for want, found in zip(whole, pages, strict=True):
        for w, f in zip(want, found, strict=True):
          assert (f[block, :, slot] == w[layer, b, :, p]).all(), (layer, b, p)
    for p in range(LENGTH[b]):  # the dense part, bit for bit
      at = p if p < 3 else 3 + (p - 3) % 20
      if p < 3 or p >= 3 + spilled(LENGTH[b], kv):
        np.testing.assert_array_equal(after.k[layer, b, :, at], x[0][layer, b, :, p])
        np.testing.assert_array_equal(after.v[layer, b, :, at], x[1][layer, b, :, p])
  np.testing.assert_array_equal(after.slot_pos, positions)
  assert not any(a[0].any() for side in pages for a in side), "the null block is not written"


def test_a_prompt_and_steps_are_the_longer_prompt() -> None:
  """Filled by P tokens and then d one by one, or by P + d at once: attention sees the same."""
  kv, config, steps = replace(KV, key=KVFormat(4, 8), value=KVFormat(32)), dims(L, N, K, H), 41
  length = np.array([1, 2, 23, 24, 25, 50])  # short of the sinks; rings full, and nearly so
  k, v = random_cache(slots=50 + steps)
  shape = (steps, L, B)
  rng = np.random.default_rng(3)
  queries = rng.normal(size=(*shape, N, H)).astype(np.float32)
  room = np.full(B, steps)
  short = CompressedKV(kv, config, Recording(recorded((k, v))), length, room)
  cache, active = short.state, np.ones(B, bool)
  for i in range(steps):
    at = length + i
    new = [np.stack([c[:, b, :, at[b]] for b in range(B)], axis=1) for c in (k, v)]
    cache = short.before_step(cache, jnp.asarray(at, jnp.int32), active)
    out, cache = attend_all(queries[i], *new, cache, jnp.asarray(at, jnp.int32), active)
    assert np.isfinite(out).all()
  long = CompressedKV(kv, config, Recording(recorded((k, v))), length + steps, room)
  assert short.usage == long.usage
  both = [Holds.of(c) for c in (cache, long.state)]
  for layer, b in np.ndindex(L, B):
    one, other = (h.seen(length[b] + steps, layer, b) for h in both)
    assert one.keys() == other.keys() == set(range(length[b] + steps))
    for p in one:
      for a, c in zip(one[p], other[p], strict=True):
        np.testing.assert_array_equal(a, c)
