"""A sliding window over the last blocks of one sequence."""

from collections import deque

from q4jax.errors import ConfigError
from q4jax.kv.pool import BlockPool


class Ring:
  """At most `size` blocks of one sequence; once full, the oldest makes room for the next.

  Belongs to one sequence, hence to one thread at a time; the pool it draws from may be shared.

  Raises:
    ConfigError: size is below 1.
  """

  def __init__(self, pool: BlockPool, size: int) -> None:
    if size < 1:
      raise ConfigError(f"The ring's size is {size}; expected 1 or more blocks.")
    self._pool = pool
    self._size = size
    self._blocks: deque[int] = deque()

  @property
  def blocks(self) -> list[int]:
    """The blocks in use, oldest first."""
    return list(self._blocks)

  def next_block(self) -> int:
    """The block to write next: a new one until the ring is full, then the oldest.

    An oldest block that is shared or published is let go and a fresh one taken for it.

    Raises:
      PoolExhaustedError: a new block is needed and none is free; the ring stays as it was.
    """
    if len(self._blocks) < self._size:
      (block,) = self._pool.allocate(1)
    else:
      block = self._pool.recycle(self._blocks[0])
      self._blocks.popleft()
    self._blocks.append(block)
    return block

  def release(self) -> None:
    """Returns every block to the pool; the ring is empty and may be used again."""
    self._pool.release(self._blocks)
    self._blocks.clear()
