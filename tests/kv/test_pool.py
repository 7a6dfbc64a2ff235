"""The block pool, rule by rule; test_pool_stateful.py and test_pool_threads.py mix the rules."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest

import q4jax
from q4jax.kv.pool import BlockPool
from q4jax.kv.ring import Ring


class Clock:
  """Seconds that move only when told to."""

  def __init__(self) -> None:
    self.now = 100.0

  def __call__(self) -> float:
    return self.now


def published(pool: BlockPool, *hashes: bytes) -> list[int]:
  """Blocks in use, one for each hash, in order."""
  blocks = pool.allocate(len(hashes))
  for block, content_hash in zip(blocks, hashes, strict=True):
    assert pool.publish(block, content_hash)
  return blocks


def cached(pool: BlockPool, *hashes: bytes) -> list[int]:
  blocks = published(pool, *hashes)
  pool.release(blocks)
  return blocks


def untouched(
  pool: BlockPool, error: type[Exception], message: str, call: Callable[[], object]
) -> None:
  """Asserts that `call` fails and leaves no trace."""

  def state() -> str:
    return repr({k: v for k, v in vars(pool).items() if k not in ("_lock", "_clock")})

  before = state()
  with pytest.raises(error, match=message):
    call()
  assert state() == before
  pool.check()


def test_needs_no_jax() -> None:
  program = "import sys, q4jax.kv.prefix, q4jax.kv.ring; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# Allocation.


def test_hands_out_every_block_but_the_null_block() -> None:
  pool = BlockPool(5)
  assert pool.allocate(0) == []
  assert pool.allocate(1) + pool.allocate(3) == [1, 2, 3, 4]
  pool.check()


def test_allocation_is_all_or_nothing() -> None:
  pool = BlockPool(5)
  pool.release(pool.allocate(2)[:1])
  message = "4 KV blocks asked for, 3 of 4 free; release.*make the pool larger"
  untouched(pool, q4jax.PoolExhaustedError, message, lambda: pool.allocate(4))
  assert issubclass(q4jax.PoolExhaustedError, q4jax.Q4JaxError)
  assert len(pool.allocate(3)) == 3


def test_the_least_recently_used_block_goes_first() -> None:
  pool = BlockPool(6)
  a, b, c, d = pool.allocate(4)  # 5 was never used
  pool.release([c])
  pool.release([a])
  pool.release([d])
  pool.release([b])
  assert pool.allocate(5) == [5, c, a, d, b]


def test_the_tail_of_a_sequence_goes_before_its_front() -> None:
  pool = BlockPool(5)
  blocks = pool.allocate(4)
  pool.release(blocks)
  assert pool.allocate(4) == blocks[::-1]


@pytest.mark.parametrize(
  ("message", "make"),
  [
    ("num_blocks is 1; expected 2 or more", lambda: BlockPool(1)),
    ("ttl_s is -1; expected 0 or more", lambda: BlockPool(4, ttl_s=-1)),
    ("ttl_s is nan", lambda: BlockPool(4, ttl_s=float("nan"))),
    ("ttl_steps is -2", lambda: BlockPool(4, ttl_steps=-2)),
    ("asked for -1 blocks", lambda: BlockPool(4).allocate(-1)),
    ("given -1 steps", lambda: BlockPool(4).advance(-1)),
    ("size is 0; expected 1 or more", lambda: Ring(BlockPool(4), 0)),
  ],
)
def test_refuses_numbers_that_cannot_work(message: str, make: Callable[[], object]) -> None:
  with pytest.raises(q4jax.ConfigError, match=message):
    make()


# References.


def test_a_block_is_free_after_its_last_release() -> None:
  pool = BlockPool(3)
  (block,) = pool.allocate(1)
  pool.retain([block, block])
  for in_use in (1, 1, 0):
    pool.release([block])
    assert pool.stats().in_use == in_use
  pool.check()


@pytest.mark.parametrize(
  ("blocks", "message"),
  [
    ([1, 4], "Block 4 has 0 references, 1 needed: released twice, or never allocated"),
    ([1, 0], "Block 0 is the null block; expected one of 1 to 5, allocated"),
    ([1, 6], "6 is no block of this pool; expected an int from 1 to 5"),
    ([1, -1], "-1 is no block of this pool"),
    ([1, 2.0], "2.0 is no block"),
    ([True], "True is no block"),
    ([1, "2"], "'2' is no block"),
  ],
)
def test_only_blocks_in_use_are_accepted(blocks: list[int], message: str) -> None:
  pool = BlockPool(6)
  pool.allocate(2)
  bad = blocks[-1:]
  for given in (blocks, blocks[::-1], bad):
    untouched(pool, q4jax.PoolError, message, partial(pool.release, given))
    untouched(pool, q4jax.PoolError, message, partial(pool.retain, given))
  untouched(pool, q4jax.PoolError, message, lambda: pool.publish(bad[0], b"x"))
  untouched(pool, q4jax.PoolError, message, lambda: pool.writable(bad[0]))
  untouched(pool, q4jax.PoolError, message, lambda: pool.recycle(bad[0]))


def test_no_block_is_released_more_often_than_retained() -> None:
  pool = BlockPool(4)
  a, b = pool.allocate(2)
  pool.retain([a])
  message = f"Block {a} has 2 references, 3 needed"
  untouched(pool, q4jax.PoolError, message, lambda: pool.release([b, a, a, a]))
  pool.release([a, b, a])
  assert pool.stats().in_use == 0


# Prefixes.


def test_lookup_finds_the_longest_prefix_and_holds_it() -> None:
  pool = BlockPool(6)
  a, b, c = published(pool, b"a", b"b", b"c")
  pool.release([a, b, c])
  assert pool.lookup([b"a", b"b", b"x", b"c"]) == [a, b]
  assert pool.stats().in_use == 2
  assert pool.lookup([b"a"]) == [a]
  pool.release([a, b])
  assert pool.stats().in_use == 1  # a, once more
  assert pool.lookup([b"x", b"a"]) == []
  assert pool.lookup([]) == []
  stats = pool.stats()
  assert (stats.hits, stats.misses) == (3, 4)


def test_what_is_found_is_not_popped() -> None:
  pool = BlockPool(3)
  a, b = cached(pool, b"a", b"b")
  assert pool.lookup([b"a"]) == [a]
  assert pool.allocate(1) == [b]
  with pytest.raises(q4jax.PoolExhaustedError):
    pool.allocate(1)


def test_lookup_makes_a_block_the_most_recently_used() -> None:
  pool = BlockPool(4)
  a, b, c = cached(pool, b"a", b"b", b"c")
  pool.release(pool.lookup([b"c"]))  # was first in the queue
  assert pool.allocate(3) == [b, a, c]


def test_a_hash_lives_until_its_block_is_popped() -> None:
  pool = BlockPool(3)
  a, b = cached(pool, b"a", b"b")
  assert pool.stats().cached == 2
  assert pool.allocate(1) == [b]
  assert pool.lookup([b"b"]) == []
  assert pool.lookup([b"a"]) == [a]
  stats = pool.stats()
  assert (stats.evicted, stats.cached) == (1, 0)
  assert pool.publish(b, b"new")  # nothing of the old hash is left on it


def test_the_first_writer_wins() -> None:
  pool = BlockPool(4)
  (a,) = published(pool, b"x")
  (b,) = pool.allocate(1)
  assert not pool.publish(b, b"x")
  assert pool.lookup([b"x"]) == [a]
  assert pool.publish(b, b"y")  # losing left it unpublished


def test_a_cached_block_gives_its_hash_to_one_in_use() -> None:
  pool = BlockPool(4)
  (a,) = cached(pool, b"x")
  (b,) = pool.allocate(1)
  assert b != a
  assert pool.publish(b, b"x")
  assert pool.lookup([b"x"]) == [b]
  stats = pool.stats()
  assert (stats.cached, stats.evicted, stats.expired) == (0, 0, 0)
  pool.check()


def test_a_block_is_published_once() -> None:
  pool = BlockPool(4)
  (a,) = published(pool, b"x")
  for content_hash in (b"x", b"y"):
    untouched(
      pool,
      q4jax.PoolError,
      f"Block {a} is published already",
      partial(pool.publish, a, content_hash),
    )


# Copy-on-write.


def test_a_private_block_is_written_in_place() -> None:
  pool = BlockPool(4)
  (a,) = pool.allocate(1)
  assert pool.writable(a) == (a, False)
  assert pool.recycle(a) == a
  assert pool.stats().in_use == 1


@pytest.mark.parametrize("why", ["shared", "published", "both"])
def test_a_block_that_others_see_is_copied(why: str) -> None:
  pool = BlockPool(4)
  (a,) = pool.allocate(1) if why == "shared" else published(pool, b"x")
  if why != "published":
    pool.retain([a])
  fresh, copy = pool.writable(a)
  assert copy and fresh != a
  # The original cannot be handed out before it has been copied.
  assert a not in pool.allocate(pool.stats().free)
  pool.release([a])
  assert pool.writable(fresh) == (fresh, False)
  assert pool.lookup([b"x"]) == ([] if why == "shared" else [a])
  pool.check()


def test_copying_needs_a_free_block() -> None:
  pool = BlockPool(2)
  (a,) = published(pool, b"x")
  untouched(
    pool, q4jax.PoolExhaustedError, "1 KV blocks asked for, 0 of 1", lambda: pool.writable(a)
  )


# Expiry.


def test_blocks_expire_by_seconds() -> None:
  clock = Clock()
  pool = BlockPool(4, ttl_s=10, clock=clock)
  (a,) = cached(pool, b"a")
  clock.now += 6
  (b,) = cached(pool, b"b")
  clock.now += 4
  assert pool.expire() == 0  # a is 10 s old, not older
  clock.now += 0.5
  assert pool.expire() == 1
  assert pool.lookup([b"a"]) == [] and pool.lookup([b"b"]) == [b]
  stats = pool.stats()
  assert (stats.expired, stats.evicted, stats.free) == (1, 0, 2)
  assert a in pool.allocate(2)


def test_blocks_expire_by_steps() -> None:
  pool = BlockPool(4, ttl_steps=3)
  cached(pool, b"a")
  pool.advance(2)
  cached(pool, b"b")
  pool.advance()
  assert pool.expire() == 0
  pool.advance()
  assert pool.expire() == 1
  pool.advance(100)
  assert pool.expire() == 1
  assert pool.expire() == 0


@pytest.mark.parametrize("limit", ["seconds", "steps"])
def test_either_limit_is_enough_and_lookup_needs_no_sweep(limit: str) -> None:
  clock = Clock()
  pool = BlockPool(4, ttl_s=10, ttl_steps=10, clock=clock)
  cached(pool, b"a")
  if limit == "seconds":
    clock.now += 11
  else:
    pool.advance(11)
  assert pool.lookup([b"a"]) == []
  assert pool.stats().expired == 1


def test_blocks_in_use_never_expire_and_age_from_their_last_release() -> None:
  pool = BlockPool(4, ttl_steps=3)
  (a,) = published(pool, b"a")
  pool.advance(100)
  assert pool.expire() == 0
  assert pool.lookup([b"a"]) == [a]
  pool.release([a, a])
  pool.advance(3)
  pool.release(pool.lookup([b"a"]))
  pool.advance(3)
  assert pool.lookup([b"a"]) == [a]


def test_nothing_expires_without_a_limit() -> None:
  clock = Clock()
  pool = BlockPool(4, clock=clock)
  cached(pool, b"a")
  clock.now += 1e12
  pool.advance(10**12)
  assert pool.expire() == 0


# The ring.


def test_a_full_ring_overwrites_its_oldest_block() -> None:
  pool = BlockPool(9)
  ring = Ring(pool, 3)
  a, b, c = (ring.next_block() for _ in range(3))
  assert len({a, b, c}) == 3
  assert [ring.next_block() for _ in range(4)] == [a, b, c, a]
  assert ring.blocks == [b, c, a]
  assert pool.stats().in_use == 3
  ring.release()
  assert ring.blocks == [] and pool.stats().in_use == 0
  ring.next_block()
  assert pool.stats().in_use == 1


def test_a_ring_spares_a_shared_block() -> None:
  pool = BlockPool(9)
  ring = Ring(pool, 2)
  a, b = ring.next_block(), ring.next_block()
  pool.retain([a])
  fresh = ring.next_block()
  assert fresh not in (a, b) and ring.blocks == [b, fresh]
  pool.release([a])  # the other reader's: the ring's is gone already
  assert pool.stats().in_use == 2


def test_a_ring_spares_a_published_block() -> None:
  pool = BlockPool(9)
  ring = Ring(pool, 2)
  a, b = ring.next_block(), ring.next_block()
  pool.publish(a, b"a")
  assert ring.next_block() not in (a, b)
  assert pool.lookup([b"a"]) == [a]


def test_a_ring_needs_no_spare_block_unless_others_hold_its_own() -> None:
  pool = BlockPool(3)
  ring = Ring(pool, 2)
  a, b = ring.next_block(), ring.next_block()
  pool.publish(a, b"a")
  assert ring.next_block() == a  # the only free block is the one just let go: its hash is evicted
  assert pool.stats().evicted == 1
  pool.retain([b])
  untouched(pool, q4jax.PoolExhaustedError, "0 of 2 free", ring.next_block)
  assert ring.blocks == [b, a]


def test_stats_count_blocks() -> None:
  pool = BlockPool(7)
  cached(pool, b"a", b"b")
  pool.allocate(1)
  stats = pool.stats()
  assert (stats.total, stats.free, stats.in_use, stats.cached) == (6, 5, 1, 2)
