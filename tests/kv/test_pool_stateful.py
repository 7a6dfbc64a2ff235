"""The block pool against a model that keeps everything in lists and searches them."""

from dataclasses import asdict
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import q4jax
from q4jax.kv.pool import BlockPool

HASHES = [bytes([letter]) for letter in b"abcd"]
some_hashes = st.lists(st.sampled_from(HASHES), min_size=1, max_size=4)
pick = st.randoms(use_true_random=False)


class Block:
  """All that is known of one block."""

  def __init__(self, block: int) -> None:
    self.id = block
    self.holders = 0
    self.hash: bytes | None = None
    self.freed = (0, 0.0)


class PoolAgainstLists(RuleBasedStateMachine):
  """Every answer of the pool, and the order in which it gives blocks, must be the model's."""

  @initialize(
    usable=st.integers(1, 8),
    ttl_s=st.none() | st.integers(0, 6),
    ttl_steps=st.none() | st.integers(0, 6),
  )
  def start(self, usable: int, ttl_s: int | None, ttl_steps: int | None) -> None:
    self.second, self.step = 0.0, 0
    self.ttl = (ttl_steps, ttl_s)
    self.pool = BlockPool(usable + 1, ttl_s=ttl_s, ttl_steps=ttl_steps, clock=lambda: self.second)
    self.blocks = [Block(i) for i in range(1, usable + 1)]
    self.queue = list(self.blocks)
    self.counts = {"hits": 0, "misses": 0, "evicted": 0, "expired": 0}

  # The model.

  def in_use(self) -> list[Block]:
    return [b for b in self.blocks if b.holders]

  def find(self, content_hash: bytes) -> Block | None:
    return next((b for b in self.blocks if b.hash == content_hash), None)

  def take(self) -> Block:
    block = self.queue.pop(0)
    self.counts["evicted"] += block.hash is not None
    block.hash, block.holders = None, 1
    return block

  def let_go(self, block: Block) -> None:
    block.holders -= 1
    if not block.holders:
      block.freed = (self.step, self.second)
      self.queue.append(block)

  def forget_the_old(self) -> int:
    old = [
      b
      for b in self.queue
      if b.hash is not None
      and any(
        ttl is not None and now - then > ttl
        for now, then, ttl in zip((self.step, self.second), b.freed, self.ttl, strict=True)
      )
    ]
    for block in old:
      block.hash = None
    self.counts["expired"] += len(old)
    return len(old)

  # The rules.

  @rule(n=st.integers(0, 9))
  def allocate(self, n: int) -> None:
    if n > len(self.queue):
      with pytest.raises(q4jax.PoolExhaustedError):
        self.pool.allocate(n)
    else:
      assert self.pool.allocate(n) == [self.take().id for _ in range(n)]

  @rule(random=pick, n=st.integers(1, 4))
  def retain(self, random: Random, n: int) -> None:
    chosen = random.choices(self.blocks, k=n)
    if all(b.holders for b in chosen):
      self.pool.retain([b.id for b in chosen])
      for block in chosen:
        block.holders += 1
    else:
      with pytest.raises(q4jax.PoolError):
        self.pool.retain([b.id for b in chosen])

  @rule(random=pick, n=st.integers(1, 8))
  @precondition(lambda self: self.in_use())
  def release(self, random: Random, n: int) -> None:
    held = [b for b in self.blocks for _ in range(b.holders)]
    self.release_these(random.sample(held, min(n, len(held))))

  def release_these(self, chosen: list[Block]) -> None:
    self.pool.release([b.id for b in chosen])
    for block in chosen[::-1]:
      self.let_go(block)

  @rule(random=pick, n=st.integers(0, 3))
  def release_too_much(self, random: Random, n: int) -> None:
    culprit = random.choice(self.blocks)
    chosen = [*random.choices(self.blocks, k=n), *[culprit] * (culprit.holders + 1)]
    random.shuffle(chosen)
    with pytest.raises(q4jax.PoolError):
      self.pool.release([b.id for b in chosen])

  @rule(random=pick, content_hash=st.sampled_from(HASHES))
  def publish(self, random: Random, content_hash: bytes) -> None:
    self.publish_this(random.choice(self.blocks), content_hash)

  def publish_this(self, block: Block, content_hash: bytes) -> None:
    if not block.holders or block.hash is not None:
      with pytest.raises(q4jax.PoolError):
        self.pool.publish(block.id, content_hash)
      return
    other = self.find(content_hash)
    if other is not None and other.holders:
      assert not self.pool.publish(block.id, content_hash)
      return
    if other is not None:
      other.hash = None
    block.hash = content_hash
    assert self.pool.publish(block.id, content_hash)

  @rule(hashes=some_hashes)
  def lookup(self, hashes: list[bytes]) -> None:
    self.forget_the_old()
    found = []
    for content_hash in hashes:
      block = self.find(content_hash)
      if block is None:
        break
      if not block.holders:
        self.queue.remove(block)
      block.holders += 1
      found.append(block.id)
    self.counts["hits"] += len(found)
    self.counts["misses"] += len(hashes) - len(found)
    assert self.pool.lookup(hashes) == found

  @rule(hashes=some_hashes)
  def prompt(self, hashes: list[bytes]) -> None:
    """A short life: by chance alone, blocks are seldom published and released and found again."""
    if len(hashes) <= len(self.queue):
      blocks = [self.take() for _ in hashes]
      assert self.pool.allocate(len(hashes)) == [b.id for b in blocks]
      for block, content_hash in zip(blocks, hashes, strict=True):
        self.publish_this(block, content_hash)
      self.release_these(blocks)

  @rule(random=pick)
  def writable(self, random: Random) -> None:
    block = random.choice(self.blocks)
    if not block.holders:
      with pytest.raises(q4jax.PoolError):
        self.pool.writable(block.id)
    elif block.holders == 1 and block.hash is None:
      assert self.pool.writable(block.id) == (block.id, False)
    elif not self.queue:
      with pytest.raises(q4jax.PoolExhaustedError):
        self.pool.writable(block.id)
    else:
      assert self.pool.writable(block.id) == (self.take().id, True)

  @rule(random=pick)
  def recycle(self, random: Random) -> None:
    block = random.choice(self.blocks)
    if not block.holders:
      with pytest.raises(q4jax.PoolError):
        self.pool.recycle(block.id)
    elif block.holders == 1 and block.hash is None:
      assert self.pool.recycle(block.id) == block.id
    elif block.holders > 1 and not self.queue:
      with pytest.raises(q4jax.PoolExhaustedError):
        self.pool.recycle(block.id)
    else:
      self.let_go(block)
      assert self.pool.recycle(block.id) == self.take().id

  @rule(seconds=st.integers(0, 4), steps=st.integers(0, 4))
  def wait(self, seconds: int, steps: int) -> None:
    self.second += seconds
    self.step += steps
    self.pool.advance(steps)

  @rule()
  def expire(self) -> None:
    assert self.pool.expire() == self.forget_the_old()

  @invariant()
  def agree(self) -> None:
    self.pool.check()
    assert asdict(self.pool.stats()) == {
      "total": len(self.blocks),
      "free": len(self.queue),
      "in_use": len(self.in_use()),
      "cached": sum(b.hash is not None for b in self.queue),
      **self.counts,
    }


PoolAgainstLists.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
test_pool_against_lists = PoolAgainstLists.TestCase
