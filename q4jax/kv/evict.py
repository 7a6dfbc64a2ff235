"""Evicting while decoding: what a compressed cache holds is scored again, and what stays moves up.

Two pure functions of static shapes, as at the end of prefill (`compress.py`): between them the host
learns how much stays, and finds the blocks for it. Tokens in the sinks and the ring stay. Letters
as in `q4jax_kernels.paged_attention.paged`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.kv.compress import attention, dense_pos
from q4jax.kv.config import KVConfig
from q4jax.kv.decide import keep_mask
from q4jax.kv.policy import ScoreContext
from q4jax.model.caches import Compressed
from q4jax_kernels import kv_pages
from q4jax_kernels.hadamard import rotate
from q4jax_kernels.kv_pages import Pages
from q4jax_kernels.paged_attention import Mass

_NOWHERE = np.int32(2**31 - 1)  # the position of slots that hold no token: after all others


def choose(
  cache: Compressed, length: jax.Array, due: jax.Array, kv: KVConfig
) -> tuple[jax.Array, jax.Array]:
  """Which slots of the blocks stay, bool[L, B, P * bs] in the order of the tables, and how many.

  Args:
    cache: with the `observed` that the policy needs.
    length: int32[B], tokens seen; all of them came to the cache.
    due: bool[B]; of other rows everything stays.

  Returns:
    keep, and its sums int32[L, B].
  """
  policy, paged = kv.policy, cache.paged
  assert policy is not None
  needs, (layers, b, width) = policy.needs, paged.block_table.shape
  in_use = jnp.arange(width)[None, None] < paged.num_blocks[..., None]
  pos = paged.slot_pos[paged.block_table]
  live = ((pos >= 0) & in_use[..., None]).reshape(layers, b, -1)
  dense = dense_pos(length, cache.spilled, kv)
  pos = jnp.concatenate(
    [
      jnp.where(live, pos.reshape(live.shape), _NOWHERE),
      jnp.broadcast_to(jnp.where(dense < 0, _NOWHERE, dense)[None], (layers, *dense.shape)),
    ],
    axis=2,
  )

  def slots(pages: Pages, dense: jax.Array, table: jax.Array, order: jax.Array) -> jax.Array:
    """float32[B, K, P * bs + D, H] of one layer, in this order, as the model made them."""
    x = kv_pages.read(pages, table).swapaxes(1, 2)  # [B, K, P, bs, H]
    x = x.reshape(*dense.shape[:2], -1, dense.shape[3])
    x = jnp.concatenate([x, dense.astype(jnp.float32)], axis=2)
    x = jnp.take_along_axis(x, order[:, None, :, None], axis=2)
    return rotate(x) if cache.rotated else x  # its own inverse

  def layer(arrays: tuple) -> jax.Array:
    pos, live, k, v, table, queries, mass = arrays
    # By position: the ring begins anywhere, and blocks may have gaps.
    order = jnp.argsort(pos, axis=1)
    pos = jnp.take_along_axis(pos, order, axis=1)
    valid = pos != _NOWHERE
    given: dict[str, Any] = {}
    if needs.keys or needs.attn == "window":
      given["k"] = slots(paged.key_pages, k, table, order)
    if needs.values:
      given["v"] = slots(paged.value_pages, v, table, order)
    if queries is not None:
      at = (length[:, None] + jnp.arange(queries.shape[1])[None]) % queries.shape[1]
      queries = jnp.take_along_axis(queries, at[:, :, None, None], axis=1)  # the newest last
      given["queries"] = queries.swapaxes(1, 2)
      if needs.attn == "window":
        given["attn"] = attention(queries, given["k"], pos, length)
    if mass is not None:
      both = jnp.concatenate(mass, axis=2)
      given["mass"] = jnp.take_along_axis(both, order[:, None], axis=2)
      given["visits"] = jnp.where(valid, length[:, None] - pos, 0).astype(jnp.float32)
    context = ScoreContext(pos, valid, length, paged.key_pages.kv_heads, **given)
    in_blocks = order < live.shape[1]  # not in the sinks nor the ring
    keep = keep_mask(policy, kv.select, kv.protect, context, in_blocks)
    keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=1), axis=1)[:, : live.shape[1]]
    return live & (keep | ~due[:, None])

  arrays = (pos, live, paged.k, paged.v, paged.block_table, *_observed(cache))
  keep = jax.lax.map(layer, arrays)
  return keep, keep.sum(-1, dtype=jnp.int32)


def _observed(cache: Compressed) -> tuple[jax.Array | None, Mass | None]:
  return cache.observed.queries, cache.observed.mass


def compact(
  cache: Compressed, keep: jax.Array, block_table: jax.Array, due: jax.Array
) -> Compressed:
  """Moves what stays of the rows that are due to the front of their new tables, bit for bit.

  Args:
    cache: donate it to have it changed in place.
    keep: bool[L, B, P * bs] from `choose`.
    block_table: int32[L, B, P], the table as it is to be. A due row has ceil(kept / bs) blocks in
      each layer, which were its own, or which no layer or row has now; 0 behind them. Other rows'
      entries do not matter.
    due: bool[B]; other rows stay as they are.
  """
  paged, bs = cache.paged, cache.paged.block_size
  layers, b, width = block_table.shape
  order = jnp.argsort(~keep, axis=2, stable=True)
  filled = jnp.arange(width * bs)[None, None] < keep.sum(-1, keepdims=True)
  source = jnp.take_along_axis(paged.block_table, order // bs, axis=2).reshape(-1, bs)
  slot = (order % bs).reshape(-1, bs)
  target = jnp.where(due[None, :, None], block_table, 0).reshape(-1)
  pos = jnp.where(filled.reshape(-1, bs), paged.slot_pos[source, slot], -1)

  def move(pages: Pages) -> Pages:
    # A layer at a time, so that what is under way is never unpacked all at once.
    def one(i: jax.Array, pages: Pages) -> Pages:
      source_i, slot_i, target_i = (
        jax.lax.dynamic_slice_in_dim(a, i * b * width, b * width) for a in (source, slot, target)
      )
      return kv_pages.gather_slots(pages, source_i, slot_i, target_i)

    return jax.lax.fori_loop(0, layers, one, pages)

  observed = cache.observed
  if observed.mass is not None:
    moved = jnp.take_along_axis(observed.mass.paged, order[:, :, None], axis=3)
    moved = jnp.where(filled[:, :, None], moved, 0.0)
    moved = jnp.where(due[None, :, None, None], moved, observed.mass.paged)
    observed = dataclasses.replace(observed, mass=observed.mass._replace(paged=moved))
  past = paged.slot_pos.shape[0]  # no block, so nothing is stored
  paged = dataclasses.replace(
    paged,
    key_pages=move(paged.key_pages),
    value_pages=move(paged.value_pages),
    slot_pos=paged.slot_pos.at[jnp.where(target > 0, target, past)].set(pos, mode="drop"),
    block_table=jnp.where(due[None, :, None], block_table, paged.block_table),
    num_blocks=jnp.where(due[None], (block_table > 0).sum(-1, dtype=jnp.int32), paged.num_blocks),
  )
  return dataclasses.replace(cache, paged=paged, observed=observed)


def hide(cache: Compressed, keep: jax.Array) -> Compressed:
  """What `mask` does instead: tokens that do not stay are seen no more, and nothing moves."""
  paged = cache.paged
  width = paged.block_table.shape[2]
  in_use = jnp.arange(width)[None, None] < paged.num_blocks[..., None]
  pos = paged.slot_pos[paged.block_table]  # [L, B, P, bs]
  pos = jnp.where((pos >= 0) & ~keep.reshape(pos.shape), -2 - pos, pos)
  at = jnp.where(in_use, paged.block_table, paged.slot_pos.shape[0])
  slot_pos = paged.slot_pos.at[at].set(pos, mode="drop")
  return dataclasses.replace(cache, paged=dataclasses.replace(paged, slot_pos=slot_pos))
