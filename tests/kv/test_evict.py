"""Evicting while decoding, against lists of tokens in float64, and block by block."""

import math
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kv_steps import Holds, attend_all, dims, spilled, store_of
from q4jax.errors import ConfigError, PoolExhaustedError
from q4jax.kv import cache as kv_cache
from q4jax.kv.cache import CompressedKV, most_blocks
from q4jax.kv.config import KVConfig
from q4jax.kv.evict import choose, compact
from q4jax.kv.policy import get_policy, policy_names
from q4jax.kv.protect import Protect
from q4jax.kv.select import MedianStd, Select, TopK, UnionRank
from q4jax.model.caches import Compressed, Observed, Recording
from q4jax_kernels import kv_pages
from q4jax_kernels.kv_format import KVFormat
from q4jax_kernels.kv_pages import Pages
from q4jax_kernels.paged_attention import Mass, Paged

L, N, K, H, BS, WINDOW = 2, 4, 2, 16, 16, 40
FLOAT = KVFormat(32)
KV = KVConfig(
  FLOAT,
  FLOAT,
  policy=get_policy("knorm"),
  select=UnionRank(0.5),
  protect=Protect(sink=3, recent=4, grace=0),
  block_size=BS,
  evict_every=2 * BS,
)
LENGTH, STEPS, SLOTS = np.array([0, 2, 41, 61]), 130, 200  # padding, less than the sinks, two more
B = len(LENGTH)

# Compiled in haste: the arrays are small.
hasty = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_tokens(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """k, v [L, B, K, SLOTS, H] and q [L, B, SLOTS, N, H], sharp enough that policies differ."""
  rng = np.random.default_rng(seed)
  k, v = rng.normal(size=(2, L, B, K, SLOTS, H)).astype(np.float32)
  return k * 1.5, v, rng.normal(size=(L, B, SLOTS, N, H)).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@dataclass
class Tokens:
  """One row of one layer: k, v [K, SLOTS, H], q [SLOTS, N, H], and a list of what is left."""

  k: np.ndarray
  v: np.ndarray
  q: np.ndarray
  left: list[int] = field(default_factory=list)
  mass: dict[int, np.ndarray] = field(default_factory=dict)

  def probabilities(self, at: int, over: list[int]) -> np.ndarray:
    """float64[N, len(over)] of the query at a position."""
    keys = np.repeat(self.k[:, over].astype(np.float64), N // K, axis=0)
    return softmax(np.einsum("nsh,nh->ns", keys, self.q[at].astype(np.float64)) / math.sqrt(H))

  def append(self, at: int) -> np.ndarray:
    """One token more; the attention's output [N, H]."""
    self.left.append(at)
    p = self.probabilities(at, self.left)
    for s, m in zip(self.left, p.reshape(K, N // K, -1).mean(1).T, strict=True):
      self.mass[s] = self.mass.get(s, 0) + m
    values = np.repeat(self.v[:, self.left].astype(np.float64), N // K, axis=0)
    return np.einsum("ns,nsh->nh", p, values)

  def score(self, name: str, seen: int) -> np.ndarray:
    """float64[K, len(left)]"""
    if name == "knorm":
      return -np.sqrt((self.k[:, self.left].astype(np.float64) ** 2).sum(-1))
    if name in ("h2o", "vatp"):
      mean = np.stack([self.mass[p] / (seen - p) for p in self.left], axis=1)
      values = np.abs(self.v[:, self.left].astype(np.float64)).sum(-1)
      return mean * (values if name == "vatp" else 1)
    rows = range(max(0, seen - WINDOW), seen)
    total = np.zeros((N, len(self.left)))
    for at in rows:
      visible = [p for p in self.left if p <= at]
      total[:, : len(visible)] += self.probabilities(at, visible) / len(rows)
    mean = total.reshape(K, N // K, -1).mean(1)
    return np.stack([mean[:, max(0, i - 2) : i + 3].max(1) for i in range(len(self.left))], axis=1)

  def evict(self, name: str, seen: int, gone: int, kv: KVConfig) -> None:
    """Leaves ceil(keep * seen) of all, of which those in the dense part are not chosen."""
    young = seen - max(kv.protect.recent, kv.protect.grace)
    first = kv.protect.sink
    mine = [i for i, p in enumerate(self.left) if first <= p < first + gone and p < young]
    assert isinstance(kv.select, UnionRank)
    count = math.ceil(round(kv.select.keep * seen, 6)) - (len(self.left) - len(mine))
    count = min(max(count, 0), len(mine))
    if count == len(mine):
      return
    a = self.score(name, seen)[:, mine]
    u = ((a - np.median(a, axis=1)[:, None]) / a.std(axis=1)[:, None]).max(axis=0)
    order = np.argsort(-u, kind="stable")
    gap = u[order[count - 1]] - u[order[count]] if count else 1
    assert gap == 0 or gap > 1e-5, "or rounding to float32 may decide: take another seed"
    lost = {self.left[mine[i]] for i in order[count:]}
    self.left = [p for p in self.left if p not in lost]


def alive(cache: Compressed, seen: int, layer: int, row: int) -> list[int]:
  """Positions that a row's next query may see, in order."""
  paged, gone = cache.paged, int(cache.spilled[row])
  table = np.asarray(paged.block_table)[layer, row, : int(paged.num_blocks[layer, row])]
  slots = np.asarray(paged.slot_pos)[table].reshape(-1)
  sinks = min(paged.sink, seen)
  return [*range(sinks), *slots[slots >= 0].tolist(), *range(sinks + gone, seen)]


CASES = [  # policy, grace, rotate, mask
  ("knorm", 0, False, False),
  ("h2o", 20, False, False),
  ("vatp", 0, True, True),
  ("snapkv", 0, True, False),
]


@pytest.mark.parametrize(("name", "grace", "turn", "mask"), CASES)
def test_against_lists_of_tokens(name: str, grace: int, turn: bool, mask: bool) -> None:
  options = {"window": WINDOW} if name == "snapkv" else {}
  protect = replace(KV.protect, grace=grace)
  policy = get_policy(name, **options)
  kv = replace(KV, policy=policy, protect=protect, rotate=turn, mask=mask)
  k, v, q = random_tokens(seed=4)
  rows = [[Tokens(k[i, b], v[i, b], q[i, b]) for b in range(B)] for i in range(L)]
  gone = [spilled(n, kv) for n in LENGTH]
  for i, b in np.ndindex(L, B):
    for at in range(LENGTH[b]):
      rows[i][b].append(at)
    rows[i][b].evict(name, LENGTH[b], gone[b], kv)

  window = kv.window
  queries = np.zeros((L, B, window, N, H), np.float32)
  for b, n in enumerate(LENGTH):
    count = min(n, window)
    queries[:, b, window - count :] = q[:, b, n - count : n]
  room, started = np.full(B, STEPS), LENGTH > 0
  dense = (jnp.asarray(k), jnp.asarray(v))
  recorded = jnp.asarray(queries) if window else None
  mass = np.zeros((L, B, K, SLOTS), np.float32)
  for i, b in np.ndindex(L, B):
    for p, m in rows[i][b].mass.items():
      mass[i, b, :, p] = m
  prompt = Recording(dense, recorded, jnp.asarray(mass) if kv.mass else None)
  host = CompressedKV(kv, dims(L, N, K, H), prompt, LENGTH, room)
  cache, length, begun, evictions = host.state, LENGTH.copy(), LENGTH.copy(), 0
  for step in range(STEPS):
    running = started & [True, step >= 9, step < 100, True]  # so that turns differ, and one stops
    for b in np.flatnonzero(running):
      n = length[b]
      if n - begun[b] == kv.evict_every:
        begun[b] = n
        evictions += gone[b] > 0
        for i in range(L):
          rows[i][b].evict(name, n, gone[b], kv)
      gone[b] = spilled(n + 1, kv)
    at = length.clip(max=SLOTS - 1)
    now = [np.stack([x[:, b, :, at[b]] for b in range(B)], 1) for x in (k, v)]
    query = np.stack([q[:, b, at[b]] for b in range(B)], 1)
    cache = host.before_step(cache, jnp.asarray(length, jnp.int32), running)
    out, cache = attend_all(query, *now, cache, jnp.asarray(length, jnp.int32), running)
    length = length + running
    for i, b in np.ndindex(L, B):
      if running[b]:
        wanted = rows[i][b].append(at[b])
        np.testing.assert_allclose(out[i, b], wanted, atol=2e-5)
        assert alive(cache, length[b], i, b) == rows[i][b].left, (step, i, b)
    assert host.pool.stats().in_use == host.usage.blocks
  assert evictions > 7
  left = [len(rows[i][b].left) for i, b in np.ndindex(L, B)]
  assert host.usage.kept == sum(left) / L
  holds = Holds.of(cache)
  for i, b in np.ndindex(L, B):
    for p, found in holds.seen(length[b], i, b).items():
      for x, stored in zip((k, v), found, strict=True):
        size = np.linalg.norm(x[i, b, :, p])  # rotated or not
        np.testing.assert_allclose(np.linalg.norm(stored), size, rtol=1e-5)
  host.pool.check()
  host.close(cache)
  host.pool.check()
  assert host.pool.stats().in_use == 0


@pytest.mark.parametrize("name", sorted({type(get_policy(n)): n for n in policy_names()}.values()))
def test_every_policy_gets_what_it_needs(name: str) -> None:
  kv, blocks, width = replace(KV, policy=get_policy(name)), 9, 4

  def make() -> Compressed:
    dense = jnp.zeros((L, B, K, 3 + 4 + BS, H))
    pages = [
      Pages.zeros(blocks, K, H, FLOAT, kind=kind, block_size=BS) for kind in ("key", "value")
    ]
    whole = (jnp.zeros(s, jnp.int32) for s in ((blocks, BS), (L, B, width), (L, B)))
    window, mass = kv.window, None
    if kv.mass:
      mass = Mass(jnp.zeros((L, B, K, width * BS)), dense[..., 0])
    observed = Observed(jnp.zeros((L, B, window, N, H)) if window else None, mass)
    return Compressed(Paged(dense, dense, *pages, *whole, 3, 4), jnp.zeros(B, int), observed, True)

  cache, length, due = jax.eval_shape(lambda: (make(), jnp.zeros(B, int), jnp.ones(B, bool)))
  keep, counts = jax.eval_shape(partial(choose, kv=kv), cache, length, due)
  assert (keep.shape, keep.dtype) == ((L, B, width * BS), bool)
  assert (counts.shape, counts.dtype) == ((L, B), jnp.int32)


PACKED = [  # key, value, layout
  (KVFormat(4, 8), KVFormat(4, 8, True), "x16"),
  (KVFormat(8, 16, True), KVFormat(4, 16), "rows"),
  (KVFormat(16), KVFormat(8), "x16"),
]


def by_slot(pages: Pages) -> list[np.ndarray]:
  """[NB, K, bs, ...] of codes, and of scales and minimums where there are any."""
  if pages.format.is_float:
    return [np.asarray(pages.codes)]
  unpack = hasty(kv_pages.unpack, static_argnums=(1, 2, 3))
  parts = unpack(pages.parts, pages.format, pages.layout, pages.kind)
  return [np.asarray(a) for a in parts if a is not None]


@pytest.mark.parametrize(("key", "value", "layout"), PACKED)
def test_what_stays_moves_bit_for_bit(key: KVFormat, value: KVFormat, layout: str) -> None:
  """To a row's own blocks, to others, and of a row that is not due not at all."""
  rng, blocks, width = np.random.default_rng(3), 80, 6
  ids, had = list(rng.permutation(np.arange(1, blocks))), rng.integers(3, width + 1, (L, B))
  had[0, 1] = 0
  table, slot_pos = np.zeros((L, B, width), int), np.full((blocks, BS), -1)
  for at in np.ndindex(L, B):
    table[at][: had[at]] = [ids.pop() for _ in range(had[at])]
    for j, block in enumerate(table[at][: had[at]]):  # gaps, hidden ones, and a ragged end
      pos = 3 + BS * j + np.arange(BS)
      slot_pos[block] = np.where(rng.random(BS) < 0.7, pos, rng.choice([-1, -2 - pos[0]]))
  pages = []
  for kind, format in (("key", key), ("value", value)):
    empty = Pages.zeros(blocks, K, H, format, kind=kind, layout=layout, block_size=BS)
    x = rng.normal(size=(blocks - 1, K, BS, H)).astype(np.float32)
    pages.append(hasty(kv_pages.write)(empty, jnp.arange(1, blocks), jnp.asarray(x)))
  dense = jnp.zeros((L, B, K, 3 + 4 + BS, H))
  arrays = (jnp.asarray(a, jnp.int32) for a in (slot_pos, table, had))
  mass = rng.random((L, B, K, width * BS)).astype(np.float32)
  observed = Observed(None, Mass(jnp.asarray(mass), jnp.ones((L, B, K, 3 + 4 + BS))))
  before = Compressed(
    Paged(dense, dense, *pages, *arrays, 3, 4), jnp.zeros(B, jnp.int32), observed, False
  )

  seen = np.where(np.arange(width) < had[..., None], 1, 0).repeat(BS, 2)
  seen &= slot_pos[table].reshape(L, B, -1) >= 0
  keep = seen & (rng.random(seen.shape) < 0.5)
  due = np.array([True, True, False, True])
  keep[:, 2] = seen[:, 2]
  count = -(-keep.sum(-1) // BS)
  new = np.zeros_like(table)
  for at in np.ndindex(L, B):
    fresh = at[1] == 3  # these go to blocks that nobody had
    new[at][: count[at]] = [ids.pop() if fresh else table[at][j] for j in range(count[at])]
  after = hasty(compact)(
    before, jnp.asarray(keep, bool), jnp.asarray(new, jnp.int32), jnp.asarray(due)
  )

  now = after.paged
  found_table, found_pos = np.asarray(now.block_table), np.asarray(now.slot_pos)
  assert after.observed.mass is not None
  found_mass = np.asarray(after.observed.mass.paged)
  arrays = [
    pair
    for old, new_pages in zip(pages, (now.key_pages, now.value_pages), strict=True)
    for pair in zip(by_slot(old), by_slot(new_pages), strict=True)
  ]
  np.testing.assert_array_equal(found_table, np.where(due[:, None], new, table))
  np.testing.assert_array_equal(now.num_blocks, np.where(due, count, had))
  np.testing.assert_array_equal(found_mass[:, ~due], mass[:, ~due])
  written = set(new[:, due][new[:, due] > 0].tolist())
  for at in np.ndindex(L, B):
    kept = np.flatnonzero(keep[at])
    for i in range(count[at] * BS if due[at[1]] else 0):
      block, slot = found_table[at][i // BS], i % BS
      if i >= len(kept):
        assert found_pos[block, slot] == -1 and not found_mass[at][:, i].any()
        continue
      source = table[at][kept[i] // BS], kept[i] % BS
      assert found_pos[block, slot] == slot_pos[source]
      np.testing.assert_array_equal(found_mass[at][:, i], mass[at][:, kept[i]])
      for was, is_now in arrays:
        np.testing.assert_array_equal(was[source[0], :, source[1]], is_now[block, :, slot])
  others = sorted(set(range(blocks)) - written)
  assert 0 in others and len(written) > 8
  np.testing.assert_array_equal(found_pos[others], slot_pos[others])
  for was, is_now in arrays:
    np.testing.assert_array_equal(was[others], is_now[others])


class Steps:
  """Two rows without a model: random tokens, and the steps of a cache over them."""

  def __init__(self, kv: KVConfig, num_blocks: int | None = None) -> None:
    self.k, self.v, self.q = random_tokens(seed=2)
    self.length = np.array([30, 61])
    dense = [jnp.asarray(x[:, :2]) for x in (self.k, self.v)]
    self.host = CompressedKV(
      kv,
      dims(L, N, K, H),
      Recording((dense[0], dense[1])),
      self.length,
      np.full(2, 139),
      None if num_blocks is None else store_of(kv, dims(L, N, K, H), num_blocks),
    )
    self.state = self.host.state

  def step(self) -> np.ndarray:
    at, both = jnp.asarray(self.length, jnp.int32), np.ones(2, bool)
    self.state = self.host.before_step(self.state, at, both)
    assert isinstance(self.state, Compressed)
    new = [np.stack([x[:, b, :, self.length[b]] for b in range(2)], 1) for x in (self.k, self.v)]
    query = np.stack([self.q[:, b, self.length[b]] for b in range(2)], 1)
    out, self.state = attend_all(query, *new, self.state, at, both)
    self.length = self.length + 1
    return np.asarray(out)


def test_an_exhausted_pool_is_evicted_before_it_is_an_error() -> None:
  kv = replace(KV, evict_every=64 * BS)  # its turn never comes
  tight = Steps(kv, num_blocks=1 + 24)
  programs = (kv_cache._choose, kv_cache._compact, kv_cache._spill)
  sizes = None
  for _ in range(120):
    free = tight.host.pool.stats().free
    tight.step()
    assert tight.host.pool.stats().in_use == tight.host.usage.blocks
    if free < 2 and sizes is None:
      sizes = [f._cache_size() for f in programs]
  use = tight.host.usage
  assert use.seen == 30 + 61 + 240 and use.kept < 0.7 * use.seen
  assert sizes == [f._cache_size() for f in programs], "nothing compiles anew"
  tight.host.pool.check()
  tight.host.close(tight.state)
  assert tight.host.pool.stats().in_use == 0


def test_a_pool_that_evicting_does_not_help() -> None:
  kv = replace(KV, select=UnionRank(1.0))
  free, tight = Steps(kv), Steps(kv, num_blocks=1 + 12)
  with pytest.raises(PoolExhaustedError, match="2 KV blocks asked for, 0 of 12"):
    for _ in range(139):
      np.testing.assert_array_equal(tight.step(), free.step())
  at = tight.host.usage
  with pytest.raises(PoolExhaustedError):  # asking again is in vain, and harmless
    tight.step()
  assert tight.host.usage == at
  for i, b in np.ndindex(L, 2):
    assert alive(tight.state, tight.length[b], i, b) == list(range(tight.length[b]))


@pytest.mark.parametrize("select", [UnionRank(0.3), UnionRank(0.75), TopK(40), MedianStd()])
@pytest.mark.parametrize("grace", [0, 60])
def test_no_more_blocks_than_are_made(select: Select, grace: int) -> None:
  """Where as much stays as can; counted step by step."""
  kv = replace(KV, select=select, protect=replace(KV.protect, grace=grace))
  for prompt in range(1, 150, 7):
    for room in (0, 5, 40, 200):

      def after(seen: int, in_blocks: int, gone: int) -> int:
        if isinstance(select, MedianStd):
          return in_blocks
        dense, most = seen - gone, int(np.asarray(select.most(np.array(seen))))
        young = max(0, grace - (dense - min(dense, kv.protect.sink)))
        return min(in_blocks, max(most - dense, young))

      gone = spilled(prompt, kv)
      blocks = -(-after(prompt, gone, gone) // BS)
      bound = most_blocks(kv, np.array([prompt]), np.array([room]), np.array([[blocks]]))[0, 0]
      kept, since = after(prompt, gone, gone), prompt
      peak = blocks
      for seen in range(prompt, prompt + room):
        if seen - since == kv.evict_every:
          kept, since = after(seen, kept, gone), seen
          blocks = -(-kept // BS)
        if spilled(seen + 1, kv) > gone:
          gone, kept, blocks = gone + BS, kept + BS, blocks + 1
        peak = max(peak, blocks)
      assert peak <= bound, (prompt, room)


def test_less_is_made_where_less_can_come() -> None:
  length, room, counts = np.array([100]), np.array([1000]), np.array([[2]])
  # ceil(0.5 * 1100) stay, at least 7 of them elsewhere, and two blocks come until the next turn.
  assert most_blocks(KV, length, room, counts) == -(-(550 - 7) // BS) + 2
  never = replace(KV, evict_every=0)
  for kv in (never, replace(KV, mask=True), replace(KV, select=MedianStd())):
    assert most_blocks(kv, length, room, counts) == 2 + (spilled(1100, kv) - spilled(100, kv)) // BS


@pytest.mark.parametrize(
  ("kv", "message"),
  [
    (replace(KV, evict_every=24), "evict_every is 24; .* a multiple of the block_size of 16"),
    (replace(KV, evict_every=-16), "evict_every is -16; expected 0"),
    (replace(KV, policy=None), "evict_every is 32, but there is no policy"),
  ],
)
def test_misuse(kv: KVConfig, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    kv.check(dims())
