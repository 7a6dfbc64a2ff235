"""Many threads on one small pool: nobody ever writes what another can read."""

import random
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import pytest

import q4jax
from q4jax.kv.pool import BlockPool
from q4jax.kv.prefix import prefix_hashes

BLOCKS = 48
THREADS = 4
OPERATIONS = 50_000  # of each thread


@pytest.fixture(autouse=True)
def _switch_threads_often() -> Iterator[None]:
  usual = sys.getswitchinterval()
  sys.setswitchinterval(1e-5)
  yield
  sys.setswitchinterval(usual)


class Worker(threading.Thread):
  """Acts at random on a shared pool, and looks at each block it holds before letting it go.

  `contents` stands for the device arrays. A private block gets a tag that no one else ever writes,
  a published one its own hash. Whoever holds a block knows what must be in it.
  """

  def __init__(self, seed: int, pool: BlockPool, contents: list[Any], mailbox: deque) -> None:
    super().__init__()
    self.seed, self.random = seed, random.Random(seed)
    self.pool, self.contents, self.mailbox = pool, contents, mailbox
    self.held: list[tuple[int, Any]] = []  # (block, what it must contain), one for each reference
    self.done: Counter[str] = Counter()
    self.error: BaseException | None = None

  def run(self) -> None:
    actions = [
      self.allocate, self.share, self.receive, self.release, self.release, self.prompt, self.prompt,
      self.write, self.write, self.overwrite, self.expire,
    ]  # fmt: skip
    try:
      for _ in range(OPERATIONS):
        action = self.random.choice(actions)
        try:
          self.done[action.__name__] += bool(action())
        except q4jax.PoolExhaustedError:
          self.done["exhausted"] += 1
          self.release()
      while self.held:
        self.release()
    except BaseException as error:
      self.error = error

  def tag(self) -> tuple[int, int]:
    return self.seed, self.random.getrandbits(64)

  def put(self, block: int, content: Any) -> None:
    self.contents[block] = content
    self.held.append((block, content))

  def take(self) -> tuple[int, Any]:
    """One held reference, no longer in `held`; its block must be as it was left."""
    at = self.random.randrange(len(self.held))
    self.held[at], self.held[-1] = self.held[-1], self.held[at]
    block, content = self.held.pop()
    assert self.contents[block] == content, f"someone wrote to block {block}"
    return block, content

  def allocate(self) -> bool:
    for block in self.pool.allocate(self.random.randint(1, 3)):
      self.put(block, self.tag())
    return True

  def share(self) -> bool:
    """Gives another thread a reference, as forked sequences would."""
    if not self.held or len(self.mailbox) > 8:
      return False
    block, content = self.take()
    self.pool.retain([block])
    self.held.append((block, content))
    self.mailbox.append((block, content))
    return True

  def receive(self) -> bool:
    try:
      self.held.append(self.mailbox.popleft())
    except IndexError:
      return False
    return True

  def release(self) -> bool:
    taken = [self.take() for _ in range(min(len(self.held), self.random.randint(1, 8)))]
    self.pool.release([block for block, _ in taken])
    return bool(taken)

  def prompt(self) -> bool:
    """Finds what it can of a sequence, writes and publishes the rest."""
    tokens = [self.random.randrange(12)] * self.random.randint(4, 20)
    hashes = prefix_hashes(tokens, 4, b"soak")
    found = self.pool.lookup(hashes)
    self.held += zip(found, hashes, strict=False)
    for block, content_hash in zip(found, hashes, strict=False):
      assert self.contents[block] == content_hash, f"block {block} is not what its hash says"
    self.done["found"] += len(found)
    for content_hash in hashes[len(found) :]:
      (block,) = self.pool.allocate(1)
      self.put(block, content_hash)
      self.done["published"] += self.pool.publish(block, content_hash)
    return True

  def write(self) -> bool:
    if not self.held:
      return False
    block, content = self.take()
    try:
      target, copy = self.pool.writable(block)
    except q4jax.PoolExhaustedError:
      self.held.append((block, content))
      raise
    if copy:
      self.contents[target] = self.contents[block]
      assert self.contents[target] == content, f"block {block} was overwritten before its copy"
      self.pool.release([block])
      self.done["copied"] += 1
    self.put(target, self.tag())
    return True

  def overwrite(self) -> bool:
    if not self.held:
      return False
    block, content = self.take()
    try:
      self.put(self.pool.recycle(block), self.tag())
    except q4jax.PoolExhaustedError:
      self.held.append((block, content))
      raise
    return True

  def expire(self) -> bool:
    self.pool.advance()
    return bool(self.pool.expire())


def test_nobody_writes_what_another_can_read() -> None:
  pool = BlockPool(BLOCKS, ttl_steps=5)
  contents: list[Any] = [None] * BLOCKS
  mailbox: deque[tuple[int, Any]] = deque()
  workers = [Worker(seed, pool, contents, mailbox) for seed in range(THREADS)]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join(60)
    assert not worker.is_alive()
  for worker in workers:
    if worker.error is not None:
      raise worker.error
  pool.check()
  for block, content in mailbox:
    assert contents[block] == content
    pool.release([block])
  pool.check()
  assert pool.stats().in_use == 0
  done: Counter[str] = sum((worker.done for worker in workers), Counter())
  stats = pool.stats()
  # Each thing happened often enough to have gone wrong.
  often = {
    "allocate", "share", "receive", "release", "prompt", "found", "published", "write", "copied",
    "overwrite", "exhausted", "expire",
  }  # fmt: skip
  assert {name: done[name] for name in often if done[name] < 500} == {}
  assert stats.hits == done["found"] and stats.evicted > 500
