"""The specification of attention, in jax.numpy; also what runs where there is no kernel."""

import jax
import jax.numpy as jnp


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Causal grouped-query attention: q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H].

  The queries are the last T of the S positions.
  Products take their operands in q's dtype and accumulate in float32, as does the softmax. Written
  as plain batched matrix products, which XLA:CPU runs twice as fast as jax.nn's.
  """
  b, t, n, h = q.shape
  s, kv_heads = k.shape[1:3]
  # Query heads that share a KV head lie below each other: [B * K, N / K * T, H].
  query = (
    q.reshape(b, t, kv_heads, n // kv_heads, h)
    .transpose(0, 2, 3, 1, 4)
    .reshape(-1, n // kv_heads * t, h)
  )
  key, value = (x.transpose(0, 2, 1, 3).reshape(-1, s, h) for x in (k, v))
  logits = jnp.einsum("bqh,bsh->bqs", query, key, preferred_element_type=jnp.float32) * h**-0.5
  seen = jnp.tile(jnp.tril(jnp.ones((t, s), bool), s - t), (n // kv_heads, 1))[None]
  p = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
  out = jnp.einsum("bqs,bsh->bqh", p.astype(q.dtype), value, preferred_element_type=jnp.float32)
  out = out.reshape(b, kv_heads, n // kv_heads, t, h).transpose(0, 3, 1, 2, 4)
  return out.reshape(q.shape).astype(q.dtype)


def cached_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache: tuple[jax.Array, jax.Array],
  start: jax.Array,
  length: jax.Array,
  layer: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Appends k, v to one layer of the cache and attends to it. Shapes as in api.py."""
  return scored_attention(q, k, v, cache, jnp.zeros(0), start, length, layer)[:2]


def scored_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache: tuple[jax.Array, jax.Array],
  mass: jax.Array,
  start: jax.Array,
  length: jax.Array,
  layer: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
  """As in api.py. An empty mass is not added to."""
  b, t, n, h = q.shape
  k_cache, v_cache = cache
  slots = k_cache.shape[3]
  step = jnp.arange(t, dtype=jnp.int32).reshape(1, t)
  # Padding is sent past the last slot and dropped.
  slot = jnp.where(step < length.reshape(b, 1), start.reshape(b, 1) + step, slots)
  row = jnp.arange(b, dtype=jnp.int32).reshape(b, 1)
  k_cache = k_cache.at[layer, row, :, slot].set(k.astype(k_cache.dtype), mode="drop")
  v_cache = v_cache.at[layer, row, :, slot].set(v.astype(v_cache.dtype), mode="drop")
  keys, values = (cache[layer].astype(jnp.float32) for cache in (k_cache, v_cache))

  kv_heads = k.shape[2]
  query = q.reshape(b, t, kv_heads, n // kv_heads, h).astype(jnp.float32)
  logits = jnp.einsum("btkrh,bksh->bkrts", query, keys) * h**-0.5
  position = start.reshape(b, 1, 1, 1, 1) + step.reshape(1, 1, 1, t, 1)
  seen = jnp.arange(slots, dtype=jnp.int32).reshape(1, 1, 1, 1, slots) <= position
  p = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
  # Slots that were never written may hold anything, NaN included, and 0 * NaN is NaN.
  filled = jnp.arange(slots).reshape(1, 1, slots, 1) < (start + length).reshape(b, 1, 1, 1)
  values = jnp.where(filled, values, 0.0)
  out = jnp.einsum("bkrts,bksh->btkrh", p, values).reshape(b, t, n, h)
  real = step < length.reshape(b, 1)
  if mass.size:
    paid = jnp.where(real.reshape(b, 1, 1, t, 1), p, 0.0)
    mass = mass.at[layer].add(paid.sum(axis=3).mean(axis=2))
  return jnp.where(real.reshape(b, t, 1, 1), out, 0.0), (k_cache, v_cache), mass


def window_attention(q: jax.Array, k: jax.Array, seen: jax.Array) -> jax.Array:
  """As in api.py."""
  b, window, n, h = q.shape
  kv_heads, slots = k.shape[1:3]
  query = q.reshape(b, window, kv_heads, n // kv_heads, h).astype(jnp.float32)
  logits = jnp.einsum("bwkrh,bksh->bkrws", query, k.astype(jnp.float32)) * h**-0.5
  sees = (jnp.arange(slots)[None, None] < seen[..., None])[:, None, None]
  p = jax.nn.softmax(jnp.where(sees, logits, -1e30), axis=-1)
  return jnp.where(sees, p, 0.0).reshape(b, n, window, slots)
