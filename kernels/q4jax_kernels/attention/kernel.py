"""What a kernel has around it: tokens are stored before, and without a cache there is a gradient.

A kernel is an `attend(q, k, v, start, length, layer)` with q [B, T, N, H] over k and v
[L, B, K, S, H], which hold the new tokens already; it returns float32[B, T, N, H].
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from q4jax_kernels.attention import reference

Attend = Callable[..., jax.Array]
_Cache = tuple[jax.Array, jax.Array]

_WINDOW = 16  # slots to write together: for less XLA would change the layout again
_SLOTS = 128  # what kernels may have to take together


def cached_attention(
  attend: Attend,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache: _Cache,
  start: jax.Array,
  length: jax.Array,
  layer: int,
) -> tuple[jax.Array, _Cache]:
  """Arguments as in api.py."""
  cache = append(k, v, cache, start, length, layer)
  return attend(q, *cache, start, length, layer), cache


def append(
  k: jax.Array, v: jax.Array, cache: _Cache, start: jax.Array, length: jax.Array, layer: int
) -> _Cache:
  """The cache with k, v [B, T, K, H] in one layer. Arguments as in api.py.

  By slices: a scatter, as the reference has it, makes XLA keep all of the cache in another layout,
  and copy it there and back in each layer for a kernel that takes it as it is.
  """
  slots = cache[0].shape[3]
  t = min(max(_WINDOW, k.shape[1]), slots)
  k, v = (jnp.pad(a[:, :t], ((0, 0), (0, t - a[:, :t].shape[1]), (0, 0), (0, 0))) for a in (k, v))

  def row(i: jax.Array, cache: _Cache) -> _Cache:
    first = jnp.minimum(start[i], slots - t)  # of the slots that are written, old ones among them
    before = start[i] - first
    token = jnp.arange(t, dtype=jnp.int32) - before
    fresh = ((token >= 0) & (token < length[i]))[:, None]

    def put(side: jax.Array, new: jax.Array) -> jax.Array:
      at = (layer, i, 0, first, 0)
      old = lax.dynamic_slice(side, at, (1, 1, side.shape[2], t, side.shape[4]))
      moved = jnp.roll(new[i], before, axis=0).swapaxes(0, 1).astype(side.dtype)
      return lax.dynamic_update_slice(side, jnp.where(fresh, moved, old), at)

    return put(cache[0], k), put(cache[1], v)

  return lax.fori_loop(0, len(start), row, cache)


def padded(slots: int) -> int:
  """How many a cache has that is made for `causal_attention`."""
  return slots + -slots % _SLOTS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def causal_attention(attend: Attend, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Shapes as in api.py; the gradient is the reference's."""
  (b, t), s = q.shape[:2], k.shape[1]
  before = jnp.full(b, s - t, jnp.int32)

  def stored(x: jax.Array) -> jax.Array:  # [1, B, K, S, H]
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded(s) - s), (0, 0)))[None]

  out = attend(q, stored(k), stored(v), before, jnp.full(b, t, jnp.int32), 0)
  return out.astype(q.dtype)


def _forward(attend: Attend, *qkv: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return causal_attention(attend, *qkv), qkv


def _backward(attend: Attend, qkv: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
  return jax.vjp(reference.causal_attention, *qkv)[1](dy)


causal_attention.defvjp(_forward, _backward)
