"""The host's side of a compressed cache: which blocks belong to whom, and when that changes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.buckets import bucket
from q4jax.config import LlamaConfig
from q4jax.errors import PoolExhaustedError
from q4jax.kv.compress import decide, pack, spilled_after
from q4jax.kv.config import KVConfig
from q4jax.kv.evict import choose, compact, hide
from q4jax.kv.observed import observe, spill_mass
from q4jax.kv.pool import BlockPool
from q4jax.kv.store import KVStore, Prefixes
from q4jax.model.caches import Compressed, Recording
from q4jax_kernels.paged_attention import Paged, spill

_decide = jax.jit(decide, static_argnames="kv")
_choose = jax.jit(choose, static_argnames="kv")
_compact = jax.jit(compact, donate_argnames="cache")
_hide = jax.jit(hide, donate_argnames="cache")


@partial(jax.jit, static_argnames="kv", donate_argnames="paged")
def _pack(
  prompt: Recording,
  keep: jax.Array,
  length: jax.Array,
  table: jax.Array,
  paged: Paged,
  kv: KVConfig,
) -> Compressed:
  paged = pack(prompt.cache, keep, length, table, paged, kv)
  observed = observe(prompt, keep, length, table.shape[2], kv)
  return Compressed(paged, spilled_after(length, kv), observed, kv.rotate)


@partial(jax.jit, donate_argnums=0)
def _spill(cache: Compressed, length: jax.Array, table: jax.Array, active: jax.Array) -> Compressed:
  before = replace(cache.paged, block_table=table)
  paged, spilled = spill(before, length, cache.spilled, active)
  observed = cache.observed
  if observed.mass is not None:
    mass = spill_mass(observed.mass, before, length, cache.spilled, active)
    observed = replace(observed, mass=mass)
  return replace(cache, paged=paged, spilled=spilled, observed=observed)


@dataclass(frozen=True)
class KVUsage:
  """What a compressed cache holds, in tokens of one layer's sequence, and in bytes.

  Attributes:
    seen: tokens of all sequences.
    kept: mean over layers of the tokens that attention still sees, dense ones included.
    blocks: kv blocks in use, each counted once.
    block_bytes: bytes of these blocks, scales and positions included.
    dense_bytes: bytes of sinks and rings.
    float16_bytes: bytes that a float16 cache of all tokens seen would have.
  """

  seen: int
  kept: float
  blocks: int
  block_bytes: int
  dense_bytes: int
  float16_bytes: int

  @property
  def keep_ratio(self) -> float:
    return self.kept / self.seen

  @property
  def compression(self) -> float:
    """float16_bytes over what is held."""
    return self.float16_bytes / (self.block_bytes + self.dense_bytes)


class CompressedKV:
  """Compresses the dense cache of a prefilled batch and hands out blocks while it decodes.

  Args:
    kv: what to do.
    config: of the model.
    prompt: what prefill left, as `KVConfig.recording` began it; not needed afterwards.
    length: tokens of each row's prompt; 0 for a row of padding.
    room: tokens that each row may decode.
    store: where the blocks are; one of its own, of as many as this batch can need, if None.
    prefixes: what the rows begin with, of this store; nothing is known of them if None.

  Raises:
    PoolExhaustedError: the store has fewer blocks than the prompts need; nothing was taken.
  """

  def __init__(
    self,
    kv: KVConfig,
    config: LlamaConfig,
    prompt: Recording,
    length: np.ndarray,
    room: np.ndarray,
    store: KVStore | None = None,
    prefixes: Prefixes | None = None,
  ) -> None:
    kv.check(config)
    self.kv, self.config = kv, config
    self._length, self._started = length.astype(np.int64), length > 0
    self._evicted = self._length  # tokens seen when the row's last turn to be evicted was
    self._spilled = np.asarray(spilled_after(self._length, kv))
    keep = _decide(prompt, jnp.asarray(length, jnp.int32), kv=kv)
    self._kept = np.array(keep.sum(-1))  # [L, B]
    stored = np.broadcast_to(self._spilled, self._kept.shape) if kv.mask else self._kept
    counts = -(-stored // kv.block_size)
    most = most_blocks(kv, self._length, np.where(self._started, room, 0), counts)
    width = bucket(int(most.max()) + 1)
    device = next(iter(prompt.cache[0].devices()))
    if store is None:
      store = KVStore(kv, config, _pool_size(1 + int(most.sum())), device)
    self.store = store
    self.table = np.zeros((*counts.shape, width), np.int32)
    self._counts = np.zeros_like(counts)
    self._named = np.zeros(len(length), np.int64)  # first blocks of each row that have a name
    self._shared = 0  # blocks that the counts have more than once
    if prefixes is None:
      self._append(counts, self.pool.allocate(int(counts.sum())))
      fresh = self.table
    else:
      fresh = self._share(counts, prefixes)
    k, v = jax.device_put(self._dense(prompt.cache[0].dtype), device)
    keys, values, slot_pos = store.take()
    paged = Paged(
      k,
      v,
      keys,
      values,
      slot_pos,
      jnp.asarray(self.table),
      jnp.asarray(self._counts, jnp.int32),
      kv.protect.sink,
      kv.protect.recent,
    )
    self.state = _pack(
      prompt, keep, jnp.asarray(length, jnp.int32), jnp.asarray(fresh), paged, kv=kv
    )

  def _dense(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    c, protect = self.config, self.kv.protect
    slots = protect.sink + protect.recent + self.kv.block_size
    shape = (c.num_layers, len(self._length), c.num_kv_heads, slots, c.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

  @property
  def pool(self) -> BlockPool:
    return self.store.pool

  def _share(self, counts: np.ndarray, prefixes: Prefixes) -> np.ndarray:
    """Fills the table with known blocks, and new ones [L, B, P] that are still to be written."""
    fresh = np.zeros_like(self.table)
    of_name: dict[bytes, int] = {}
    again: list[int] = []  # of rows before
    new: list[tuple[int, int, int, bytes]] = []
    same: list[tuple[int, int, int, bytes]] = []
    for row, (found, names) in enumerate(zip(prefixes.blocks, prefixes.names, strict=True)):
      known = found.shape[1]
      self.table[:, row, :known] = found
      for i in range(known, counts[0, row]):
        for layer, name in enumerate(names[i]):
          (same if name in of_name else new).append((layer, row, i, name))
          of_name.setdefault(name, 0)
    try:
      blocks = self.pool.allocate(len(new))
    except PoolExhaustedError:
      self.pool.release(prefixes.references)
      raise
    for (layer, row, i, name), block in zip(new, blocks, strict=True):
      self.table[layer, row, i] = fresh[layer, row, i] = of_name[name] = block
      self.pool.publish(block, name)  # Nobody can look before it is written: see KVStore.borrowed.
    for layer, row, i, name in same:
      self.table[layer, row, i] = of_name[name]
      again.append(of_name[name])
    self.pool.retain(again)
    self._counts = self._counts + counts  # Never in place: see `_append`.
    self._named = counts[0]
    self._shared = int(counts.sum()) - np.unique(self.table[self.table > 0]).size
    return fresh

  def _append(self, counts: np.ndarray, ids: Sequence[int]) -> None:
    """Puts `counts` [L, B] more blocks at the ends of the tables."""
    # A copy: on CPUs the device may be reading the old one as it lies.
    more, self.table = iter(ids), self.table.copy()
    for layer, row in np.argwhere(counts):
      at = self._counts[layer, row]
      self.table[layer, row, at : at + counts[layer, row]] = [
        next(more) for _ in range(counts[layer, row])
      ]
    self._counts = self._counts + counts

  def before_step(self, cache: Compressed, length: jax.Array, running: np.ndarray) -> Compressed:
    """The cache with room for one more token of each row that is `running` (bool[B]).

    Costs nothing but where a ring is full, which is every block_size tokens of a row, and where a
    row is to be evicted. `length` is int32[B], tokens seen.

    Raises:
      PoolExhaustedError: no blocks are left, nor does evicting free them; the cache is as it was.
    """
    kv, running = self.kv, running & self._started
    ring = kv.protect.recent + kv.block_size
    full = running & (self._length - kv.protect.sink - self._spilled >= ring)
    needed = int(full.sum()) * len(self._counts)
    holds: np.ndarray = np.any(self._counts, axis=0)
    turn = running & (self._length - self._evicted >= (kv.evict_every or np.inf))
    due = turn & holds
    if kv.evict_every and needed > self.pool.stats().free:
      due = holds
    blocks: list[int] = []
    if due.any():
      cache, blocks = self._evict(cache, length, due, needed)
    elif needed:
      blocks = self.pool.allocate(needed)
    if needed:
      self._append(np.broadcast_to(full, self._counts.shape).astype(np.int64), blocks)
      self._kept = self._kept + kv.block_size * full
      cache = _spill(cache, length, jnp.asarray(self.table), jnp.asarray(full))
      self._spilled = self._spilled + kv.block_size * full  # Now the blocks will be written.
    self._evicted = np.where(turn, self._length, self._evicted)
    self._length = self._length + running
    return cache

  def _evict(
    self, cache: Compressed, length: jax.Array, due: np.ndarray, needed: int
  ) -> tuple[Compressed, list[int]]:
    """Evicts the rows that are due; also gives `needed` blocks, of those that this frees if it can.

    PoolExhaustedError if there are not so many; nothing has changed then.
    """
    keep, counts = _choose(cache, length, jnp.asarray(due), kv=self.kv)
    kept = np.where(due, counts, self._kept)
    if self.kv.mask:
      blocks = self.pool.allocate(needed)
      self._kept = kept
      return _hide(cache, keep), blocks
    left = np.where(due, -(-kept // self.kv.block_size), self._counts)
    freed = [
      block
      for layer, row in np.argwhere(left < self._counts)
      for block in self.table[layer, row, left[layer, row] : self._counts[layer, row]].tolist()
    ]
    blocks = freed[:needed] + self.pool.allocate(max(0, needed - len(freed)))
    self.table = self.table * (np.arange(self.table.shape[2]) < left[..., None])
    self._kept, self._counts = kept, left
    cache = _compact(cache, keep, jnp.asarray(self.table), jnp.asarray(due))
    self.pool.release(freed[needed:])
    return cache, blocks

  def take_back(self, rows: np.ndarray) -> None:
    """Tells that the last step of these rows (bool[B]) stored nothing: they had stopped before."""
    self._length = self._length - rows

  def close(self, cache: Compressed, texts: Sequence[np.ndarray] = ()) -> None:
    """Gives all blocks, and the arrays of the cache as it is now, back to the store.

    `texts` are the tokens of each row, int[T], prompt and answer: later prompts that go on from
    them will find their blocks. Only for what was made with `prefixes`.
    """
    for row, tokens in enumerate(texts):
      stored = int(self._spilled[row])
      names = self.store.names(tokens[: self.kv.protect.sink + stored].tolist())
      for i in range(self._named[row], len(names)):
        for layer, name in enumerate(names[i]):
          self.pool.publish(int(self.table[layer, row, i]), name)
    paged, in_order = cache.paged, self.table[self.table > 0].tolist()
    self.store.put((paged.key_pages, paged.value_pages, paged.slot_pos), in_order)
    self._counts, self.table = np.zeros_like(self._counts), np.zeros_like(self.table)

  @property
  def usage(self) -> KVUsage:
    c, paged = self.config, self.state.paged
    blocks = int(self._counts.sum()) - self._shared
    pages = paged.key_pages.nbytes + paged.value_pages.nbytes + paged.slot_pos.nbytes
    dense = self._length - self._spilled
    rows = self._started.sum() / len(self._length)
    return KVUsage(
      seen=int(self._length.sum()),
      kept=float(self._kept.mean(axis=0).sum() + dense[self._started].sum()),
      blocks=blocks,
      block_bytes=pages // self.store.num_blocks * blocks,
      dense_bytes=int((paged.k.nbytes + paged.v.nbytes) * rows),
      float16_bytes=int(self._length.sum()) * 2 * 2 * c.num_layers * c.num_kv_heads * c.head_dim,
    )


def most_blocks(
  kv: KVConfig, length: np.ndarray, room: np.ndarray, counts: np.ndarray
) -> np.ndarray:
  """int[L, B]: the most blocks that sequences can come to.

  Args:
    length, room: int[B], tokens of the prompts, and tokens that may follow.
    counts: int[L, B], blocks after the prompts.
  """
  size, end = kv.block_size, length + room
  spilled, last = (np.asarray(spilled_after(n, kv)) for n in (length, end))
  all_stay = counts + (last - spilled) // size
  most = kv.select.most(end)
  if not kv.evict_every or kv.mask or most is None:
    return all_stay
  # Of what stays at least so much is in the dense part; but what is young, by grace, is not chosen.
  stay = np.maximum(most - kv.protect.sink - kv.protect.recent, 0)
  stay = np.maximum(stay, kv.protect.grace - kv.protect.recent)
  between = kv.evict_every // size  # come until the next eviction
  return np.minimum(all_stay, np.maximum(counts, -(-stay // size)) + between)


def blocks_for(kv: KVConfig, length: np.ndarray, room: np.ndarray) -> np.ndarray:
  """int[B]: the most blocks of a layer that prompts of `length` tokens can come to, `room` later.

  Before they have been scored: where a rule keeps what it likes, that is all.
  """
  spilled = np.asarray(spilled_after(length, kv))
  most = None if kv.policy is None or kv.mask else kv.select.most(length)
  if most is not None:
    # What is young, by grace, stays besides.
    spilled = np.minimum(spilled, np.maximum(most - (length - spilled), kv.protect.grace))
  counts = -(-spilled // kv.block_size)
  return most_blocks(kv, length, room, counts[None])[0]


def _pool_size(n: int) -> int:
  """n or a little more, in steps of an eighth of a power of two: a pool's size is memory."""
  step = max(16, bucket(n) // 16)
  return -(-n // step) * step
