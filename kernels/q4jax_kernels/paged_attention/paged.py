"""The compressed cache: a dense part (sinks and a ring of recent tokens) and packed pages.

Letters: L layers, B sequences, K KV heads, H head_dim, bs slots of a block, NB blocks of the pool,
P blocks of one sequence and layer at most, D = sink + recent + bs dense slots.

The token at position p < sink lies in dense slot p for ever, another in slot
sink + (p - sink) % (recent + bs): a ring. Before one more comes to a full ring, its oldest bs
tokens are moved to a block of the pages (a spill), where they are quantised, once. So tokens at
positions sink .. sink + spilled - 1 have left the ring, and those after them are in it.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from q4jax_kernels import kv_pages
from q4jax_kernels.kv_pages import Pages


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["k", "v", "key_pages", "value_pages", "slot_pos", "block_table", "num_blocks"],
  meta_fields=["sink", "recent"],
)
@dataclasses.dataclass(frozen=True)
class Paged:
  """The cache of all layers and sequences. Donate it to have it changed in place.

  Attributes:
    k, v: the dense part, float[L, B, K, D, H].
    key_pages, value_pages: pools of NB blocks that all layers and sequences share.
    slot_pos: int32[NB, bs], the position of each slot's token; negative where there is none, or
      where it is masked. Block 0 has none.
    block_table: int32[L, B, P], whose first num_blocks entries are the blocks of a sequence. The
      next one is where a spill goes: the host puts a fresh block there before the step. 0 is none.
    num_blocks: int32[L, B].
    sink, recent: tokens, as in the module's docstring.
  """

  k: jax.Array
  v: jax.Array
  key_pages: Pages
  value_pages: Pages
  slot_pos: jax.Array
  block_table: jax.Array
  num_blocks: jax.Array
  sink: int
  recent: int

  @property
  def block_size(self) -> int:
    """bs."""
    return self.key_pages.block_size

  @property
  def ring_size(self) -> int:
    """Slots of the ring."""
    return self.recent + self.block_size


class Mass(NamedTuple):
  """The softmax of each slot, mean over the query heads of its KV head; zero where none is seen."""

  paged: jax.Array  # float32[B, K, P * bs], in the order of the block table
  dense: jax.Array  # float32[B, K, D]


def spills(cache: Paged, length: jax.Array, spilled: jax.Array, active: jax.Array) -> jax.Array:
  """bool[B]: the rows whose ring is full, so that it must spill before the next step.

  Also of NumPy arrays.
  """
  return active & (length - cache.sink - spilled >= cache.ring_size)


def spill(
  cache: Paged, length: jax.Array, spilled: jax.Array, active: jax.Array
) -> tuple[Paged, jax.Array]:
  """Makes room in the rings that are full, of all layers: the cache, and `spilled` as it is then.

  A spill goes to the block that block_table[layer, b] has at index num_blocks[layer, b], which
  grows by one. Where that is 0, or the table is full, the tokens are dropped.

  Lengths grow by one a step, so the caller knows when the next spill is due (`spills`), and a step
  in which none is can do without this.
  """
  full = spills(cache, length, spilled, active)
  layers = len(cache.num_blocks)
  next_block = jnp.take_along_axis(
    jnp.pad(cache.block_table, ((0, 0), (0, 0), (0, 1))), cache.num_blocks[..., None], axis=2
  )
  block_ids = jnp.where(full, next_block[..., 0], 0)

  # The oldest tokens, by how many came to the ring before them: [B, bs].
  oldest = spilled[:, None] + jnp.arange(cache.block_size)[None]
  at = (cache.sink + oldest % cache.ring_size)[None, :, None, :, None]

  def move(dense: jax.Array, pages: Pages) -> Pages:
    x = jnp.take_along_axis(dense, at, axis=3)  # [L, B, K, bs, H]
    return kv_pages.write(pages, block_ids.reshape(-1), x.reshape(-1, *x.shape[2:]))

  past = cache.slot_pos.shape[0]  # no block, so nothing is stored
  positions = jnp.broadcast_to(cache.sink + oldest, (layers, *oldest.shape))
  slot_pos = cache.slot_pos.at[jnp.where(block_ids > 0, block_ids, past)].set(
    positions, mode="drop"
  )
  cache = dataclasses.replace(
    cache,
    key_pages=move(cache.k, cache.key_pages),
    value_pages=move(cache.v, cache.value_pages),
    slot_pos=slot_pos,
    num_blocks=cache.num_blocks + (block_ids > 0),
  )
  return cache, spilled + cache.block_size * full


def append(
  k: jax.Array, v: jax.Array, cache: Paged, length: jax.Array, active: jax.Array, layer: int
) -> Paged:
  """Stores k and v [B, 1, K, H] in the ring, or among the sinks. As in api.py."""
  slot = jnp.where(
    length < cache.sink, length, cache.sink + (length - cache.sink) % cache.ring_size
  )
  slot = jnp.where(active, slot, cache.k.shape[3])  # or past the last, and dropped
  rows = jnp.arange(len(length))

  def store(dense: jax.Array, new: jax.Array) -> jax.Array:
    return dense.at[layer, rows, :, slot].set(new[:, 0].astype(dense.dtype), mode="drop")

  return dataclasses.replace(cache, k=store(cache.k, k), v=store(cache.v, v))


def live_dense(cache: Paged, length: jax.Array, spilled: jax.Array, active: jax.Array) -> jax.Array:
  """bool[B, D]: the dense slots that hold a token once this step's is appended.

  `length` is that from before the step.
  """
  newest = (length - cache.sink)[:, None]
  slot = jnp.arange(cache.ring_size)[None]
  came = newest - (newest - slot) % cache.ring_size  # the last token that the slot was given to
  ring = (came >= 0) & (came >= spilled[:, None])
  sinks = jnp.arange(cache.sink)[None] <= length[:, None]
  return jnp.concatenate([sinks, ring], axis=1) & active[:, None]


def live_paged(cache: Paged, layer: int, active: jax.Array) -> jax.Array:
  """bool[B, P, bs]: the slots of each row's blocks that attention sees."""
  table = cache.block_table[layer]
  used = jnp.arange(table.shape[1])[None] < cache.num_blocks[layer][:, None]
  return (cache.slot_pos[table] >= 0) & (used & active[:, None])[..., None]
