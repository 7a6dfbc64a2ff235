"""What decoding remembers for a policy (`Observed`): where it begins, and how spills move it."""

import jax
import jax.numpy as jnp

from q4jax.kv.compress import dense_part, dense_pos, in_front, spilled_after, stored
from q4jax.kv.config import KVConfig
from q4jax.model.caches import Observed, Recording
from q4jax_kernels.paged_attention import Mass, Paged, spills


def observe(
  prompt: Recording, keep: jax.Array, length: jax.Array, width: int, kv: KVConfig
) -> Observed:
  """What is known of a prompt of int32[B] tokens, for blocks as `pack` fills them.

  Args:
    keep: bool[L, B, S] from `decide`.
    width: P, of the block table.
  """
  if not kv.evicts_again:
    return Observed()
  ring, mass, window = None, None, kv.window
  if prompt.queries is not None:
    ago = (length[:, None] - 1 - jnp.arange(window)[None]) % window
    ring = jnp.take_along_axis(prompt.queries, window - 1 - ago[None, :, :, None, None], axis=2)
  if prompt.mass is not None:
    stays = stored(keep, length, kv)
    order = in_front(stays, width * kv.block_size)
    filled = jnp.arange(order.shape[2])[None, None] < stays.sum(-1, keepdims=True)
    paged = jnp.take_along_axis(prompt.mass, order[:, :, None], axis=3)
    live = dense_pos(length, spilled_after(length, kv), kv) >= 0
    dense = dense_part(prompt.mass[..., None], length, kv)[..., 0]
    # Slots that no token is in are 0, so that the next one's sum begins there.
    mass = Mass(
      jnp.where(filled[:, :, None], paged, 0.0), jnp.where(live[None, :, None], dense, 0.0)
    )
  return Observed(ring, mass)


def spill_mass(
  mass: Mass, before: Paged, length: jax.Array, spilled: jax.Array, active: jax.Array
) -> Mass:
  """The mass of the tokens that `paged.spill`, given the same, moves to blocks goes with them."""
  size = before.block_size
  full = spills(before, length, spilled, active)
  at = before.sink + (spilled[:, None] + jnp.arange(size)[None]) % before.ring_size  # [B, bs]
  moved = jnp.take_along_axis(mass.dense, at[None, :, None], axis=3)  # [L, B, K, bs]
  layers, rows = (jnp.arange(n) for n in before.num_blocks.shape)
  # Past the last slot, and dropped, where nothing moves.
  to = jnp.where(full[None], before.num_blocks * size, mass.paged.shape[3])
  paged = mass.paged.at[
    layers[:, None, None], rows[None, :, None], :, to[..., None] + jnp.arange(size)[None, None]
  ].set(moved.swapaxes(2, 3), mode="drop")
  left = (jnp.arange(mass.dense.shape[3])[None, None] == at[..., None]).any(1) & full[:, None]
  return Mass(paged, jnp.where(left[None, :, None], 0.0, mass.dense))
