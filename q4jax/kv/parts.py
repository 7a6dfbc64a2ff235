"""Reductions within parts of a row: runs of slots such as a local neighbourhood."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def reduce(op: Callable[..., jax.Array], x: jax.Array, part: jax.Array, parts: int) -> jax.Array:
  """Reduces the slots of each part: x [B, ..., S] -> [B, ..., parts].

  Args:
    op: jax.ops.segment_sum, segment_min or segment_max.
    part: int32[B, S], which part a slot belongs to; below 0 to none.
    parts: how many there can be.
  """

  def row(x: jax.Array, part: jax.Array) -> jax.Array:
    # Slots of no part go to one part more, which is dropped.
    index = jnp.where(part < 0, parts, part)
    reduced = op(jnp.moveaxis(x, -1, 0), index, num_segments=parts + 1)
    return jnp.moveaxis(reduced[:parts], 0, -1)

  return jax.vmap(row)(x, part)


def pick(reduced: jax.Array, part: jax.Array) -> jax.Array:
  """For each slot the value of a part: [B, ..., parts] and int32[B, S] -> [B, ..., S].

  Parts that do not exist give the value of the nearest that does.
  """
  index = jnp.clip(part, 0, reduced.shape[-1] - 1)
  return jax.vmap(lambda r, i: r[..., i])(reduced, index)
