"""Who owns which block of the KV cache. Only ids live here; the arrays are on the device.

A block is in one of three states:

  in use   references > 0
  cached   no references, but a hash: its contents can be found again until it is popped or expires
  free     neither

Cached and free blocks wait in one queue, least recently used first, from whose head blocks are
allocated. Published contents never change, so whoever finds them may read them.

This is vLLM's automatic prefix caching (docs.vllm.ai, design/prefix_caching), but for two things:
one hash names one block at most, and cached blocks can expire.
"""

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from itertools import pairwise

from q4jax.errors import ConfigError, PoolError, PoolExhaustedError
from q4jax.kv.stats import PoolStats

NULL_BLOCK = 0  # Pads block tables; never handed out.


class BlockPool:
  """Blocks 1 to num_blocks - 1, counted references, and contents found by hash.

  Any thread may call any method: each holds the one lock throughout, costs O(1) a block, and on
  error changes nothing.

  Args:
    num_blocks: blocks of the device arrays, the null block included.
    ttl_s: cached blocks older than this many seconds of `clock` expire; None: never.
    ttl_steps: the same in steps of `advance`. With both, the first limit reached counts.
    clock: seconds, never going backwards.

  Raises:
    ConfigError: num_blocks is below 2, or a limit is negative.
  """

  def __init__(
    self,
    num_blocks: int,
    *,
    ttl_s: float | None = None,
    ttl_steps: int | None = None,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    if num_blocks < 2:
      raise ConfigError(f"num_blocks is {num_blocks}; expected 2 or more: one is the null block.")
    for name, limit in (("ttl_s", ttl_s), ("ttl_steps", ttl_steps)):
      if limit is not None and not limit >= 0:
        raise ConfigError(f"{name} is {limit}; expected 0 or more, or None for no limit.")
    self._ttl_s = math.inf if ttl_s is None else ttl_s
    self._ttl_steps = math.inf if ttl_steps is None else ttl_steps
    self._clock = clock
    self._step = 0
    self._lock = threading.Lock()
    self._references = [0] * num_blocks
    self._queue = OrderedDict.fromkeys(range(1, num_blocks))
    self._hash_of: dict[int, bytes] = {}
    self._block_of: dict[bytes, int] = {}
    # When each cached block was released, (step, second). In the queue's order, which is that of
    # release, so the expired are always in front.
    self._cached: OrderedDict[int, tuple[int, float]] = OrderedDict()
    self._hits = self._misses = self._evicted = self._expired = 0

  def allocate(self, n: int) -> list[int]:
    """Takes n blocks, the least recently used, each with one reference; their contents are gone.

    Raises:
      PoolExhaustedError: fewer than n are free.
      ConfigError: n is negative.
    """
    if n < 0:
      raise ConfigError(f"allocate was asked for {n} blocks; expected 0 or more.")
    with self._lock:
      self._require(n)
      return [self._pop() for _ in range(n)]

  def retain(self, blocks: Iterable[int]) -> None:
    """Adds a reference to each block, which must have one: a second reader of the same contents.

    Raises:
      PoolError: a block is not in use.
    """
    blocks = list(blocks)
    with self._lock:
      for block in blocks:
        self._require_in_use(block)
      for block in blocks:
        self._references[block] += 1

  def release(self, blocks: Iterable[int]) -> None:
    """Drops a reference to each block, given in the sequence's order.

    Those left without any join the queue, the last of the sequence first: it will be the first to
    go, and a prefix is of use without its end but not without its start.

    Raises:
      PoolError: a block is not in use, or has fewer references than times it is named.
    """
    blocks = list(blocks)
    with self._lock:
      times = Counter(blocks)
      for block in blocks:
        self._require_in_use(block, times[block])
      self._release(blocks)

  def publish(self, block: int, content_hash: bytes) -> bool:
    """Makes a full block findable; from now on it must not be written (see `writable`).

    The first writer wins. A block that is only cached gives its hash up to the newcomer, which is
    in use and so will stay longer.

    Returns:
      False if another block in use has this hash; the block then stays private.

    Raises:
      PoolError: the block is not in use, or is published already.
    """
    with self._lock:
      self._require_in_use(block)
      if block in self._hash_of:
        raise PoolError(
          f"Block {block} is published already; contents that changed need a block of their own: "
          "ask `writable`."
        )
      other = self._block_of.get(content_hash)
      if other is not None:
        if self._references[other]:
          return False
        self._forget(other)
      self._hash_of[block] = content_hash
      self._block_of[content_hash] = block
      return True

  def lookup(self, hashes: Iterable[bytes]) -> list[int]:
    """The blocks of the longest known prefix of `hashes`, each with a reference for the caller."""
    hashes = list(hashes)
    with self._lock:
      self._expire()
      found = []
      for content_hash in hashes:
        if content_hash not in self._block_of:
          break
        found.append(self._block_of[content_hash])
      for block in found:
        if self._references[block] == 0:
          del self._queue[block], self._cached[block]
        self._references[block] += 1
      self._hits += len(found)
      self._misses += len(hashes) - len(found)
      return found

  def writable(self, block: int) -> tuple[int, bool]:
    """A block with these contents that the caller alone can see, for copy-on-write.

    Returns:
      (block, False) if the caller holds the only reference and nobody can find it by hash.
      Otherwise (fresh, True): the caller must copy the contents of `block` to `fresh`, and only
      then release `block`. It keeps that reference until then, or another thread could be given
      the block and overwrite it before it is copied.

    Raises:
      PoolError: the block is not in use.
      PoolExhaustedError: a fresh block is needed and none is free.
    """
    with self._lock:
      self._require_in_use(block)
      if self._is_private(block):
        return block, False
      self._require(1)
      return self._pop(), True

  def recycle(self, block: int) -> int:
    """Trades a block whose contents the caller no longer needs for one to overwrite.

    That is the block itself if the caller holds the only reference and nobody can find it by hash;
    otherwise it is released and another allocated, in one step.

    Raises:
      PoolError: the block is not in use.
      PoolExhaustedError: others hold the block and none is free.
    """
    with self._lock:
      self._require_in_use(block)
      if self._is_private(block):
        return block
      if self._references[block] > 1:
        self._require(1)
      self._release([block])
      return self._pop()

  def advance(self, steps: int = 1) -> None:
    """Moves the logical clock, by which `ttl_steps` counts.

    Raises:
      ConfigError: steps is negative.
    """
    if steps < 0:
      raise ConfigError(f"advance was given {steps} steps; expected 0 or more.")
    with self._lock:
      self._step += steps

  def expire(self) -> int:
    """Forgets the cached blocks older than a limit; how many. `lookup` does so itself."""
    with self._lock:
      return self._expire()

  def stats(self) -> PoolStats:
    with self._lock:
      return PoolStats(
        total=len(self._references) - 1,
        free=len(self._queue),
        in_use=len(self._references) - 1 - len(self._queue),
        cached=len(self._cached),
        hits=self._hits,
        misses=self._misses,
        evicted=self._evicted,
        expired=self._expired,
      )

  def check(self) -> None:
    """Asserts what must hold between any two calls. O(num_blocks); for tests."""
    with self._lock:
      assert self._references[NULL_BLOCK] == 0
      assert NULL_BLOCK not in self._queue and NULL_BLOCK not in self._hash_of
      assert all(count >= 0 for count in self._references)
      unused = {b for b in range(1, len(self._references)) if self._references[b] == 0}
      assert set(self._queue) == unused
      assert {h: b for b, h in self._hash_of.items()} == self._block_of
      assert len(self._hash_of) == len(self._block_of)
      assert list(self._cached) == [b for b in self._queue if b in self._hash_of]
      released = list(self._cached.values())
      assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(released))

  # All below expect the lock to be held.

  def _require(self, n: int) -> None:
    free = len(self._queue)
    if free < n:
      raise PoolExhaustedError(
        f"{n} KV blocks asked for, {free} of {len(self._references) - 1} free; release sequences, "
        "wait for some to finish, or make the pool larger."
      )

  def _require_in_use(self, block: int, times: int = 1) -> None:
    last = len(self._references) - 1
    if type(block) is not int or not 0 <= block <= last:
      raise PoolError(f"{block!r} is no block of this pool; expected an int from 1 to {last}.")
    if block == NULL_BLOCK:
      raise PoolError(f"Block {block} is the null block; expected one of 1 to {last}, allocated.")
    if self._references[block] < times:
      raise PoolError(
        f"Block {block} has {self._references[block]} references, {times} needed: released twice, "
        "or never allocated; use only blocks that the pool gave, and release each once."
      )

  def _is_private(self, block: int) -> bool:
    return self._references[block] == 1 and block not in self._hash_of

  def _pop(self) -> int:
    block, _ = self._queue.popitem(last=False)
    if block in self._hash_of:
      self._forget(block)
      self._evicted += 1
    self._references[block] = 1
    return block

  def _release(self, blocks: list[int]) -> None:
    now = (self._step, self._clock())
    for block in reversed(blocks):
      self._references[block] -= 1
      if self._references[block] == 0:
        self._queue[block] = None
        if block in self._hash_of:
          self._cached[block] = now

  def _forget(self, block: int) -> None:
    """Turns a cached block into a free one."""
    del self._block_of[self._hash_of.pop(block)]
    del self._cached[block]

  def _expire(self) -> int:
    now = self._clock()
    count = 0
    while self._cached:
      block, (step, second) = next(iter(self._cached.items()))
      if self._step - step <= self._ttl_steps and now - second <= self._ttl_s:
        break
      self._forget(block)
      count += 1
    self._expired += count
    return count
