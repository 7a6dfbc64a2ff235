"""What a pool of KV blocks counts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolStats:
  """Blocks now, and counts since the pool was made.

  Attributes:
    total: usable blocks, without the null block; total = free + in_use.
    free: blocks that `allocate` could hand out, cached ones included.
    cached: free blocks that a lookup could find, or that have expired since the last one.
    hits: hashes that lookups found.
    misses: hashes that lookups were given and did not find, with all those after the first.
    evicted: hashes lost because their block was allocated anew.
    expired: hashes lost because of their age.
  """

  total: int
  free: int
  in_use: int
  cached: int
  hits: int
  misses: int
  evicted: int
  expired: int
