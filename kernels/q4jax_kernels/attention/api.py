"""One door to attention: plain causal attention, and attention over a contiguous KV cache."""

from functools import partial

import jax
import jax.numpy as jnp

from q4jax_kernels import ffi
from q4jax_kernels.attention import cpu, reference

# Keys and values of all layers, [L, B, K, S, H] each; slot s holds position s. One pair for the
# whole model: every array that passes the jit boundary costs time at each token (docs/adr/0006).
Cache = tuple[jax.Array, jax.Array]

causal_attention = reference.causal_attention


def cached_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache: Cache,
  start: jax.Array,
  length: jax.Array,
  layer: int,
) -> tuple[jax.Array, Cache]:
  """Appends keys and values to one layer of the cache, then attends causally to its filled slots.

  Args:
    q: float32[B, T, N, H], RoPE applied; k, v: float32[B, T, K, H], N a multiple of K.
    cache: keys and values [L, B, K, S, H] in float16, bfloat16 or float32; donated where possible.
    start: int32[B], slots already filled; the new tokens take slots start .. start + length - 1.
    length: int32[B], real tokens among the T; the rest is padding: not stored, output zero.
    layer: which of the L is appended to and read; the others stay as they are.

  Returns:
    float32[B, T, N, H] and the updated cache. start + length <= S is the caller's to ensure.
  """
  arguments = (q, k, v, cache, start, length)
  if not _native(cache):
    return reference.cached_attention(*arguments, layer)
  return jax.lax.platform_dependent(
    *arguments,
    cpu=partial(cpu.cached_attention, layer=layer),
    default=partial(reference.cached_attention, layer=layer),
  )


def scored_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache: Cache,
  mass: jax.Array,
  start: jax.Array,
  length: jax.Array,
  layer: int,
) -> tuple[jax.Array, Cache, jax.Array]:
  """`cached_attention`, which also adds up how much attention each slot gets.

  Args:
    mass: float32[L, B, K, S], donated where possible. To the layer's slots is added the softmax of
      all T queries, its mean over the query heads of the slot's KV head.

  Returns:
    float32[B, T, N, H], the updated cache, the updated mass.
  """
  arguments = (q, k, v, cache, mass, start, length)
  if not _native(cache):
    return reference.scored_attention(*arguments, layer)
  return jax.lax.platform_dependent(
    *arguments,
    cpu=partial(cpu.scored_attention, layer=layer),
    default=partial(reference.scored_attention, layer=layer),
  )


def _native(cache: Cache) -> bool:
  return cache[0].dtype in (jnp.float16, jnp.float32) and ffi.available()
