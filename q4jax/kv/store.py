"""The kv blocks of all sequences that may run: the arrays on the device, and who owns which."""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.config import LlamaConfig
from q4jax.errors import ConfigError
from q4jax.kv.compress import spilled_after
from q4jax.kv.config import KVConfig
from q4jax.kv.pool import BlockPool
from q4jax.kv.prefix import prefix_hashes
from q4jax_kernels import ffi
from q4jax_kernels.kv_pages import LANES, Pages

# What a batch works on: key pages, value pages, and the positions of their slots.
Arrays = tuple[Pages, Pages, jax.Array]


class KVStore:
  """A fixed number of blocks, and the contents of those that nobody uses but a prefix may find.

  The arrays are donated from step to step, so one batch has them at a time: `borrowed` waits for
  the one before. A batch that loses them (it failed inside a step) takes all contents with it.

  Args:
    kv, config: what a block holds.
    num_blocks: the null block included.
    ttl_s: seconds after which a prefix that nobody uses is forgotten; None: when its block is
      needed.

  Raises:
    ConfigError: num_blocks is below 2, or ttl_s negative.
  """

  def __init__(
    self,
    kv: KVConfig,
    config: LlamaConfig,
    num_blocks: int,
    device: jax.Device,
    ttl_s: float | None = None,
  ) -> None:
    self.kv, self.config, self.num_blocks = kv, config, num_blocks
    self._device, self._ttl_s = device, ttl_s
    self.pool = BlockPool(num_blocks, ttl_s=ttl_s)
    self._arrays: Arrays | None = None
    self._taken = False
    self._lock, self._owner = threading.Lock(), 0

  @contextmanager
  def borrowed(self) -> Iterator[None]:
    """Has the store to itself; other threads wait.

    Raises:
      ConfigError: this very thread has it, so that waiting would be for ever.
    """
    if self._lock.locked() and self._owner == threading.get_ident():
      raise ConfigError(
        "another stream of this engine is unfinished in this thread, and has its KV pool; read it "
        "to its end or close it first, or give both prompts to one call."
      )
    with self._lock:
      self._owner = threading.get_ident()
      try:
        yield
      finally:
        if self._taken:
          self._forget()
        self._owner = 0

  def take(self) -> Arrays:
    """The arrays, to be donated; `put` gives them back."""
    arrays, self._arrays, self._taken = self._arrays, None, True
    return jax.device_put(self._zeros(), self._device) if arrays is None else arrays

  def put(self, arrays: Arrays, blocks: Iterable[int]) -> None:
    """Gives back the arrays as the last step left them, and references to these blocks."""
    if any(a.is_deleted() for a in jax.tree.leaves(arrays)):
      self._forget()
    else:
      self._arrays, self._taken = arrays, False
      self.pool.release(blocks)

  def _forget(self) -> None:
    """A step failed that the arrays had been donated to: all blocks are free, and empty."""
    self.pool = BlockPool(self.num_blocks, ttl_s=self._ttl_s)
    self._arrays, self._taken = None, False

  def _zeros(self) -> Arrays:
    kv, config = self.kv, self.config
    on_cpu = jax.default_backend() == "cpu" and ffi.available()
    pages = partial(
      Pages.zeros,
      self.num_blocks,
      config.num_kv_heads,
      config.head_dim,
      layout="x16" if on_cpu and config.head_dim % LANES == 0 else "rows",
      block_size=kv.block_size,
    )
    slot_pos = jnp.full((self.num_blocks, kv.block_size), -1, jnp.int32)
    return pages(kv.key, kind="key"), pages(kv.value, kind="value"), slot_pos

  def prefixes(self, prompts: Sequence[np.ndarray]) -> "Prefixes":
    """What is here of these prompts (int[T]); the blocks found have a reference for the caller.

    Only where blocks depend on nothing but the tokens before them: without eviction.
    """
    layers, sink = self.config.num_layers, self.kv.protect.sink
    names: list[list[list[bytes]]] = []
    blocks: list[np.ndarray] = []
    for tokens in prompts:
      stored = int(spilled_after(np.array([len(tokens)]), self.kv)[0])
      names.append(self.names(tokens[: sink + stored].tolist()))
      found = self.pool.lookup(name for of_layers in names[-1] for name in of_layers)
      whole = len(found) // layers * layers
      self.pool.release(found[whole:])
      blocks.append(np.array(found[:whole], np.int32).reshape(-1, layers).T)
    known = np.array([found.shape[1] for found in blocks])
    return Prefixes(names, blocks, np.where(known > 0, sink + known * self.kv.block_size, 0))

  def names(self, tokens: list[int]) -> list[list[bytes]]:
    """What the blocks of a text are published as, of each block one name a layer."""
    kv, sink = self.kv, self.kv.protect.sink
    salt = repr((kv.key, kv.value, kv.rotate, tokens[:sink])).encode()

    def of_layer(name: bytes, layer: int) -> bytes:
      return hashlib.blake2b(name, digest_size=32, salt=layer.to_bytes(4, "little")).digest()

    return [
      [of_layer(name, layer) for layer in range(self.config.num_layers)]
      for name in prefix_hashes(tokens[sink:], kv.block_size, salt)
    ]


@dataclass(frozen=True)
class Prefixes:
  """What the prompts of a batch begin with that a store has already.

  Attributes:
    names: of each prompt, the names [block][layer] of all blocks that it will leave.
    blocks: of each prompt, int32[L, n], those of its first blocks that are known.
    tokens: int[B], where reading each prompt goes on. Its sinks lie before that, and are read
      again: they are in no block.
  """

  names: list[list[list[bytes]]]
  blocks: list[np.ndarray]
  tokens: np.ndarray

  @property
  def references(self) -> list[int]:
    """All blocks found, each as often as it was."""
    return [block for found in self.blocks for block in found.T.ravel().tolist()]
