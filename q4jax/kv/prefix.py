"""Names for the contents of KV blocks, so that equal prefixes share them.

The keys and values of a block depend on every token before it, so its name does too:

  name[-1] = H(block_size, salt)      name[i] = H(name[i - 1], tokens of block i)

with H = BLAKE2b of 256 bits: a collision would hand one user's context to another, so Python's
`hash` will not do.
"""

import hashlib
import struct
from collections.abc import Sequence

from q4jax.errors import ConfigError


def prefix_hashes(
  tokens: Sequence[int], block_size: int, salt: bytes, first: int = 0
) -> list[bytes]:
  """The names of the full blocks of a sequence, 32 bytes each; a block not yet full has none.

  Args:
    tokens: ids of the whole sequence, position 0 first, each 0 to 2^32 - 1.
    block_size: tokens in a block.
    salt: whatever else decides the contents: model, quantiser, eviction policy, positions that do
      not start at 0. Sequences of different salts never share.
    first: the first block whose name is wanted. Those before it only feed the chain.

  Raises:
    ConfigError: block_size, first or a token is out of range.
  """
  if block_size < 1:
    raise ConfigError(f"block_size is {block_size}; expected 1 or more tokens.")
  if first < 0:
    raise ConfigError(f"first is {first}; expected the index of a block, 0 or more.")
  name = _digest(struct.pack("<Q", block_size) + salt)
  names = []
  for start in range(0, len(tokens) - block_size + 1, block_size):
    block = tokens[start : start + block_size]
    try:
      name = _digest(name + struct.pack(f"<{block_size}I", *block))
    except struct.error as error:
      raise ConfigError(
        f"Tokens {start} to {start + block_size - 1} cannot be hashed ({error}); "
        "expected integers from 0 to 2^32 - 1."
      ) from error
    names.append(name)
  return names[first:]


def _digest(data: bytes) -> bytes:
  return hashlib.blake2b(data, digest_size=32, person=b"q4jax.kv").digest()
