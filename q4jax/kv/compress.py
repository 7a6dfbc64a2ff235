"""From the dense cache that prefill fills to a compressed one: what stays, and moving it there.

Two pure functions, for between them the host finds blocks for exactly what stays. Attention over
the prompt is over by then: tokens are scored, evicted, and only then rounded.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.kv.config import KVConfig
from q4jax.kv.decide import keep_mask
from q4jax.kv.policy import ScoreContext
from q4jax.model.caches import Recording
from q4jax_kernels import kv_pages
from q4jax_kernels.attention import Cache, window_attention
from q4jax_kernels.hadamard import rotate
from q4jax_kernels.kv_pages import Pages
from q4jax_kernels.paged_attention import Paged

_Array = TypeVar("_Array", jax.Array, np.ndarray)


def spilled_after(length: _Array, kv: KVConfig) -> _Array:
  """int[B]: how many tokens behind the sinks a prompt of `length` leaves to the blocks.

  A multiple of block_size, and as if the tokens had come one by one: as few as leave the others
  room in the ring.
  """
  size = kv.block_size
  over = length - kv.protect.sink - (kv.protect.recent + size)
  return (over.clip(0) + size - 1) // size * size


def decide(prompt: Recording, length: jax.Array, kv: KVConfig) -> jax.Array:
  """bool[L, B, S]: the tokens of each layer that leave the ring and are not evicted.

  Args:
    prompt: what prefill left; slot s holds position s, the last query is of position length - 1.
    length: int32[B], tokens of the prompts.
  """
  cache = prompt.cache
  slots = cache[0].shape[3]
  pos = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (len(length), slots))
  valid = pos < length[:, None]
  behind = pos - kv.protect.sink
  leaves = (behind >= 0) & (behind < spilled_after(length, kv)[:, None])
  policy = kv.policy
  if policy is None:
    return jnp.broadcast_to(leaves, (cache[0].shape[0], *leaves.shape))

  def layer(arrays: tuple) -> jax.Array:
    k, v, queries, mass = arrays
    context = context_of(k, v, queries, mass, pos, valid, length, kv)
    return keep_mask(policy, kv.select, kv.protect, context, leaves) & leaves

  return jax.lax.map(layer, (*cache, prompt.queries, prompt.mass))


def context_of(
  k: jax.Array,
  v: jax.Array,
  queries: jax.Array | None,
  mass: jax.Array | None,
  pos: jax.Array,
  valid: jax.Array,
  length: jax.Array,
  kv: KVConfig,
) -> ScoreContext:
  """What the policy may know of one layer: k, v [B, K, S, H], queries [B, W, N, H], mass."""
  assert kv.policy is not None
  context = ScoreContext(pos, valid, length, k.shape[1], k=k, v=v, mass=mass)
  if mass is not None:
    visits = (length[:, None] - pos).clip(0).astype(jnp.float32)
    context = dataclasses.replace(context, visits=visits)
  if queries is not None:
    context = dataclasses.replace(context, queries=queries.swapaxes(1, 2))
    if kv.policy.needs.attn == "window":
      context = dataclasses.replace(context, attn=attention(queries, k, pos, length))
  return context


def attention(queries: jax.Array, k: jax.Array, pos: jax.Array, length: jax.Array) -> jax.Array:
  """float32[B, N, W, S]: causal softmax of queries [B, W, N, H] over k [B, K, S, H].

  The last query is that of position length - 1. Rows before the first token are 0.
  `pos` int32[B, S] is where the slots' tokens stand, ascending; slots that hold none come last and
  are at `length` or later.
  """
  window = queries.shape[1]
  at = length[:, None] - window + jnp.arange(window)[None]  # [B, W]
  seen = (pos[:, None] <= at[..., None]).sum(-1, dtype=jnp.int32)
  return window_attention(queries, k, seen)


def pack(
  cache: Cache, keep: jax.Array, length: jax.Array, block_ids: jax.Array, paged: Paged, kv: KVConfig
) -> Paged:
  """Fills an empty compressed cache: sinks and ring, and what `keep` says of the rest in blocks.

  Args:
    cache: dense [L, B, K, S, H].
    keep: bool[L, B, S] from `decide`.
    block_ids: int32[L, B, P], where the blocks go, in order; 0 where it is not to be written, as it
      has these contents already, or there is none: behind the ceil(kept / bs) of each (layer, row),
      in mask mode ceil(spilled / bs).
    paged: its pool is written to in these blocks alone; its dense part is replaced.
  """
  k, v = cache
  layers, b, kv_heads, _, h = k.shape
  bs, width = kv.block_size, block_ids.shape[2]
  stays = stored(keep, length, kv)
  order = in_front(stays, width * bs)
  count = stays.sum(-1, keepdims=True)
  hidden = jnp.take_along_axis(stays & ~keep, order, axis=-1)
  slot_pos = jnp.where(hidden, -2 - order, order)
  slot_pos = jnp.where(jnp.arange(width * bs)[None, None] < count, slot_pos, -1).astype(jnp.int32)

  flat = block_ids.reshape(-1)

  def fill(pages: Pages, dense: jax.Array) -> Pages:
    # A layer at a time, so that no float copy of all layers exists.
    def one(i: jax.Array, pages: Pages) -> Pages:
      layer = jax.lax.dynamic_index_in_dim(dense, i, keepdims=False)
      x = jnp.take_along_axis(layer, order[i][:, None, :, None], axis=2)  # [B, K, P * bs, H]
      x = (rotate(x) if kv.rotate else x).reshape(b, kv_heads, width, bs, h).swapaxes(1, 2)
      return kv_pages.write(pages, block_ids[i].reshape(-1), x.reshape(-1, kv_heads, bs, h))

    return jax.lax.fori_loop(0, layers, one, pages)

  def ends(dense: jax.Array) -> jax.Array:
    x = dense_part(dense, length, kv)
    return rotate(x) if kv.rotate else x

  past = paged.slot_pos.shape[0]
  return dataclasses.replace(
    paged,
    k=ends(k).astype(paged.k.dtype),
    v=ends(v).astype(paged.v.dtype),
    key_pages=fill(paged.key_pages, k),
    value_pages=fill(paged.value_pages, v),
    slot_pos=paged.slot_pos.at[jnp.where(flat > 0, flat, past)].set(
      slot_pos.reshape(-1, bs), mode="drop"
    ),
  )


def restore(
  cache: Cache, keys: Pages, values: Pages, block_table: jax.Array, known: jax.Array, kv: KVConfig
) -> Cache:
  """Writes known blocks back to a dense cache, so that prefill can go on behind them.

  Args:
    cache: dense [L, B, K, S, H]; donate it.
    block_table: int32[L, B, P], the first blocks of each row; P * bs + sinks <= S.
    known: int32[B], how many of them there are.
  """
  bs, first = kv.block_size, kv.protect.sink
  width = block_table.shape[2] * bs
  mine = (jnp.arange(width)[None] < known[:, None] * bs)[:, None, :, None]

  def fill(dense: jax.Array, pages: Pages) -> jax.Array:
    def layer(i: jax.Array, dense: jax.Array) -> jax.Array:
      x = kv_pages.read(pages, block_table[i]).swapaxes(1, 2)  # [B, K, P, bs, H]
      x = x.reshape(*x.shape[:2], width, -1)
      x = (rotate(x) if kv.rotate else x).astype(dense.dtype)  # its own inverse
      old = jax.lax.dynamic_index_in_dim(dense, i, keepdims=False)[:, :, first : first + width]
      new = jnp.where(mine, x, old)
      return jax.lax.dynamic_update_slice(dense, new[None], (i, 0, 0, first, 0))

    return jax.lax.fori_loop(0, len(block_table), layer, dense)

  return fill(cache[0], keys), fill(cache[1], values)


def stored(keep: jax.Array, length: jax.Array, kv: KVConfig) -> jax.Array:
  """bool[L, B, S]: the tokens of a prompt that the blocks get, hidden or not."""
  if not kv.mask:
    return keep
  behind = jnp.arange(keep.shape[2], dtype=jnp.int32)[None] - kv.protect.sink
  leaves = (behind >= 0) & (behind < spilled_after(length, kv)[:, None])
  return jnp.broadcast_to(leaves[None], keep.shape)


def in_front(mask: jax.Array, count: int) -> jax.Array:
  """int32[L, B, count]: the slots of `mask` bool[L, B, S] in their order, and then any."""
  order = jnp.argsort(~mask, axis=-1, stable=True)
  return jnp.pad(order, ((0, 0), (0, 0), (0, max(0, count - mask.shape[2]))))[..., :count]


def dense_pos(length: jax.Array, spilled: jax.Array, kv: KVConfig) -> jax.Array:
  """int32[B, D]: where the token of each dense slot stands after `length` tokens; -1: no token."""
  sink, ring = kv.protect.sink, kv.protect.recent + kv.block_size
  newest = (length - 1 - sink)[:, None]
  slot = jnp.arange(ring)[None]
  came = newest - (newest - slot) % ring  # the last token behind the sinks that the slot was given
  first = jnp.broadcast_to(jnp.arange(sink)[None], (len(length), sink))
  return jnp.concatenate(
    [
      jnp.where(first < length[:, None], first, -1),
      jnp.where(came >= spilled[:, None], sink + came, -1),
    ],
    axis=1,
  )


def dense_part(x: jax.Array, length: jax.Array, kv: KVConfig) -> jax.Array:
  """[L, B, K, D, H]: sinks and ring of a prompt's dense keys or values [L, B, K, S, H]."""
  at = dense_pos(length, spilled_after(length, kv), kv).clip(0)
  return jnp.take_along_axis(x, at[None, :, None, :, None], axis=3)
