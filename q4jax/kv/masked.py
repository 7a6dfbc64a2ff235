"""Statistics over the masked part of the last axis, for policies and selection.

Shapes are static, the number of slots that count is not: every function takes a mask, and what lies
outside it has no influence, be it NaN.
"""

import jax
import jax.numpy as jnp


def mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean over the masked slots, float32[..., 1]; 0 where there are none."""
  count = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
  return jnp.sum(jnp.where(mask, x, 0.0), axis=-1, keepdims=True) / count


def std(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Population deviation over the masked slots, float32[..., 1]; 0 where there are none."""
  deviation = jnp.where(mask, x - mean(x, mask), 0.0)
  # Scaled first: probabilities of 1e-20 have squares that float32 does not.
  largest = jnp.max(jnp.abs(deviation), axis=-1, keepdims=True)
  scaled = deviation / jnp.where(largest > 0, largest, 1.0)
  return largest * jnp.sqrt(mean(scaled * scaled, mask))


def median(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Median over the masked slots, float32[..., 1], of an even number the mean of the middle two.

  The lower one is found bit by bit, from how many are below: 32 passes, where XLA on a CPU needs
  fifteen times as long to sort 4096 slots.
  """
  x = jnp.where(mask, x, jnp.inf)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  top = jnp.uint32(1 << 31)
  key = jnp.where(bits & top, ~bits, bits | top)  # in the order of the numbers, -0.0 before 0.0
  count = jnp.sum(mask, axis=-1, keepdims=True)
  at = jnp.maximum(count - 1, 0) // 2

  def next_bit(i: jax.Array, found: jax.Array) -> jax.Array:
    more = found | top >> i.astype(jnp.uint32)
    return jnp.where(jnp.sum(key < more, axis=-1, keepdims=True) <= at, more, found)

  zero = jnp.zeros((*key.shape[:-1], 1), jnp.uint32)
  found = jax.lax.fori_loop(0, 32, next_bit, zero)
  low = jax.lax.bitcast_convert_type(jnp.where(found & top, found ^ top, ~found), jnp.float32)
  above = jnp.min(jnp.where(x > low, x, jnp.inf), axis=-1, keepdims=True)
  alone = jnp.sum(mask & (x <= low), axis=-1, keepdims=True) <= count // 2
  high = jnp.where(alone, above, low)
  return jnp.where(count > 0, low + (high - low) / 2, 0.0)


def softmax(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Softmax over the masked slots, 0 elsewhere."""
  x = jnp.where(mask, x, -jnp.inf)
  largest = jnp.max(x, axis=-1, keepdims=True)
  e = jnp.where(mask, jnp.exp(x - jnp.where(jnp.isfinite(largest), largest, 0.0)), 0.0)
  return e / jnp.maximum(jnp.sum(e, axis=-1, keepdims=True), jnp.finfo(e.dtype).tiny)


def max_pool(x: jax.Array, mask: jax.Array, kernel: int) -> jax.Array:
  """The largest masked value among `kernel` (odd) neighbours; -inf where there is none."""
  window = (1,) * (x.ndim - 1) + (kernel,)
  strides = (1,) * x.ndim
  x = jnp.where(mask, x, -jnp.inf)
  return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "SAME")


def smaller(x: jax.Array, mask: jax.Array) -> jax.Array:
  """How many masked slots hold a strictly smaller value, int32[..., S]; -1 outside the mask.

  Equal values get equal counts. Divided by the number of masked slots it is a percentile rank.
  """
  mask = jnp.broadcast_to(mask, x.shape)
  return jnp.where(mask, smaller_in_part(x, mask.astype(jnp.int32)), -1)


def smaller_in_part(x: jax.Array, part: jax.Array) -> jax.Array:
  """How many slots of the same part hold a strictly smaller value, int32[..., S].

  `part`, an integer for each slot, has the shape of `x`.
  """
  slots = _slots(x)
  part, ordered, slot = jax.lax.sort((part, x, slots), dimension=-1, num_keys=2)
  new_part = _starts(part)
  start_of_part = jax.lax.cummax(jnp.where(new_part, slots, 0), axis=x.ndim - 1)
  start_of_run = jax.lax.cummax(jnp.where(new_part | _starts(ordered), slots, 0), axis=x.ndim - 1)
  # Back to where each came from: sorting by slot inverts the permutation.
  _, count = jax.lax.sort((slot, start_of_run - start_of_part), dimension=-1, num_keys=1)
  return count


def first_in_order(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Each masked slot's place from the largest value on, int32[..., S]: 0 is the largest.

  Of equal values the earlier slot comes first. Slots outside the mask come last.
  """
  slots = _slots(x)
  mask = jnp.broadcast_to(mask, x.shape)
  _, _, slot = jax.lax.sort((~mask, -x, slots), dimension=-1, num_keys=2, is_stable=True)
  _, place = jax.lax.sort((slot, slots), dimension=-1, num_keys=1)
  return place


def _slots(x: jax.Array) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


def _starts(x: jax.Array) -> jax.Array:
  """True where a value differs from the one before it, and at the first."""
  return jnp.concatenate([jnp.ones_like(x[..., :1], bool), x[..., 1:] != x[..., :-1]], axis=-1)
