"""Drives compressed caches: random keys and values without a model, a model step by step."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.config import LlamaConfig
from q4jax.kv.cache import CompressedKV
from q4jax.kv.config import KVConfig
from q4jax.kv.store import KVStore
from q4jax.model.caches import Compressed, KVCache, Span, attend
from q4jax.model.llama import Llama
from q4jax.model.model import Model
from q4jax_kernels import kv_pages


def dims(
  layers: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, context: int = 8192
) -> LlamaConfig:
  """Of a model of which only the cache is of interest."""
  return LlamaConfig("llama", 300, context, 64, 64, layers, heads, kv_heads, head_dim)


def spilled(length: int, kv: KVConfig) -> int:
  """Tokens that have left the ring when `length` came one by one, as paged.py has it."""
  gone = 0
  for before in range(length):
    if before - kv.protect.sink - gone >= kv.protect.recent + kv.block_size:
      gone += kv.block_size
  return gone


@dataclass
class Holds:
  """A compressed cache on the host, its blocks dequantised.

  Attributes:
    dense: keys and values [L, B, K, D, H].
    blocks: keys and values [NB, K, bs, H].
  """

  cache: Compressed
  dense: tuple[np.ndarray, np.ndarray]
  blocks: tuple[np.ndarray, np.ndarray]

  @classmethod
  def of(cls, cache: Compressed) -> "Holds":
    p = cache.paged
    every = np.arange(p.key_pages.num_blocks)
    blocks = (np.asarray(_read(pages, every)) for pages in (p.key_pages, p.value_pages))
    return cls(cache, (np.asarray(p.k), np.asarray(p.v)), tuple(blocks))

  def seen(self, length: int, layer: int, row: int) -> dict[int, tuple[np.ndarray, ...]]:
    """Keys and values [K, H] by position, of all tokens that a row's next query may see."""
    paged, gone = self.cache.paged, int(self.cache.spilled[row])
    at: list[tuple[int, tuple[np.ndarray, ...]]] = []
    for p in range(length):
      slot = p
      if p >= paged.sink:
        slot = paged.sink + (p - paged.sink) % (paged.recent + paged.block_size)
      if p < paged.sink or p >= paged.sink + gone:
        at.append((p, tuple(x[layer, row, :, slot] for x in self.dense)))
    for block in np.asarray(paged.block_table)[layer, row, : int(paged.num_blocks[layer, row])]:
      for slot, p in enumerate(np.asarray(paged.slot_pos)[block].tolist()):
        if p >= 0:
          at.append((p, tuple(x[block, :, slot] for x in self.blocks)))
    found = dict(at)
    assert len(found) == len(at), "a position is there twice"
    return found


_read = jax.jit(kv_pages.read)


@jax.jit
def attend_all(
  q: jax.Array, k: jax.Array, v: jax.Array, cache: Compressed, at: jax.Array, active: jax.Array
) -> tuple[jax.Array, KVCache]:
  """One token through all layers: q [L, B, N, H], k and v [L, B, K, H] -> [L, B, N, H]."""
  outs, span = [], Span(at, active.astype(jnp.int32))
  new: KVCache = cache
  for layer in range(len(q)):
    out, new = attend(q[layer, :, None], k[layer, :, None], v[layer, :, None], new, span, layer)
    outs.append(out[:, 0])
  return jnp.stack(outs), new


def store_of(kv: KVConfig, config: LlamaConfig, num_blocks: int) -> KVStore:
  return KVStore(kv, config, num_blocks, jax.devices()[0])


@dataclass
class Decoding:
  """A model's batch of unequal rows, prefilled densely and stepped through a cache.

  Attributes:
    state: the cache; `compressed` its host's side, None where the cache is dense.
    length: int[B], tokens in the cache.
  """

  model: Model
  length: np.ndarray
  state: KVCache
  compressed: CompressedKV | None

  @classmethod
  def start(
    cls,
    model: Model,
    tokens: np.ndarray,
    length: np.ndarray,
    kv: KVConfig | None,
    room: int,
    num_blocks: int | None = None,
  ) -> "Decoding":
    """Reads the first `length[b]` of int[B, T]; with room for `room` tokens more."""
    total = int(length.max()) + room
    program = _programs(model)[0]
    state = program(
      model.leaves, jnp.asarray(tokens[:, : length.max()]), jnp.asarray(length), total, kv
    )
    if kv is None:
      return cls(model, length, state, None)
    rooms = np.full(len(length), room)
    store = None if num_blocks is None else store_of(kv, model.config, num_blocks)
    compressed = CompressedKV(kv, model.config, state, length, rooms, store)
    return cls(model, length, compressed.state, compressed)

  def step(self, token: np.ndarray, running: np.ndarray | None = None) -> np.ndarray:
    """Appends one token to each running row; the logits after it, float32[B, V]."""
    running = np.ones(len(token), bool) if running is None else running
    at = jnp.asarray(self.length, jnp.int32)
    if self.compressed is not None:
      assert isinstance(self.state, Compressed)
      self.state = self.compressed.before_step(self.state, at, running)
    program = _programs(self.model)[1]
    logits, self.state = program(
      self.model.leaves, jnp.asarray(token, jnp.int32), self.state, at, jnp.asarray(running)
    )
    self.length = self.length + running
    return np.asarray(logits)


@functools.cache
def _programs(model: Model) -> tuple[Callable, Callable]:
  return model.jit(_prefill, static_argnums=(3, 4)), model.jit(_step)


def _prefill(
  module: Llama, tokens: jax.Array, length: jax.Array, slots: int, kv: KVConfig | None
) -> KVCache:
  c, b = module.config, len(tokens)
  shape = (c.num_layers, b, c.num_kv_heads, slots, c.head_dim)
  dense = (jnp.zeros(shape), jnp.zeros(shape))
  cache = dense if kv is None else kv.recording(dense, c.num_heads)
  length = length.astype(jnp.int32)
  return module.hidden(tokens, cache, Span(jnp.zeros_like(length), length))[1]


def _step(
  module: Llama, token: jax.Array, cache: KVCache, at: jax.Array, running: jax.Array
) -> tuple[jax.Array, KVCache]:
  hidden, cache = module.hidden(token[:, None], cache, Span(at, running.astype(jnp.int32)))
  return module.unembed(hidden[:, 0]), cache
