"""The caches that a Llama can run over, and how attention works on each."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from q4jax_kernels.attention import Cache, cached_attention, scored_attention
from q4jax_kernels.hadamard import rotate
from q4jax_kernels.paged_attention import Mass, Paged, decode_attention


class Span(NamedTuple):
  """Where the tokens of a cached call lie.

  Attributes:
    start: int32[B], position of each row's first token, which is also the number of tokens before.
    length: int32[B], how many of the row's tokens are real; the rest is padding.
  """

  start: jax.Array
  length: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recording:
  """A dense cache that also remembers what eviction policies score by; None what they do not need.

  Attributes:
    cache: keys and values of all layers.
    queries: float32[L, B, W, N, H], the last ones, RoPE applied, the newest last; 0 where there is
      none.
    mass: float32[L, B, K, S], the attention that each slot has received from all queries, its mean
      over the query heads of its KV head.
  """

  cache: Cache
  queries: jax.Array | None = None
  mass: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observed:
  """What decoding remembers so that a policy can score again; None what it does not need.

  Attributes:
    queries: float32[L, B, W, N, H], RoPE applied, not rotated: that of position p in slot p % W; 0
      where there is none.
    mass: float32, the attention that each slot has received so far: of the blocks [L, B, K, P * bs]
      in the order of each row's table, of the dense part [L, B, K, D]; 0 in slots without a token.
  """

  queries: jax.Array | None = None
  mass: Mass | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Compressed:
  """A compressed cache; it takes one token a call.

  Attributes:
    paged: what is stored, rotated if `rotated`.
    spilled: int32[B], tokens that have left the rings.
    observed: for evicting while decoding.
    rotated: whether heads are rotated before they are stored (static).
  """

  paged: Paged
  spilled: jax.Array
  observed: Observed
  rotated: bool = dataclasses.field(metadata={"static": True})


KVCache = Cache | Recording | Compressed


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache, span: Span, layer: int
) -> tuple[jax.Array, KVCache]:
  """Appends k and v [B, T, K, H] to one layer of the cache and attends with q [B, T, N, H] to it.

  Returns float32[B, T, N, H], zero where a token is padding, and the updated cache.
  """
  if isinstance(cache, Recording):
    return _attend_recording(q, k, v, cache, span, layer)
  if isinstance(cache, Compressed):
    return _attend_compressed(q, k, v, cache, span, layer)
  return cached_attention(q, k, v, cache, span.start, span.length, layer)


def _attend_recording(
  q: jax.Array, k: jax.Array, v: jax.Array, cache: Recording, span: Span, layer: int
) -> tuple[jax.Array, Recording]:
  where, queries, mass = (span.start, span.length, layer), cache.queries, cache.mass
  if queries is not None:
    queries = _remember(queries, q, span.length, layer)
  if mass is None:
    out, dense = cached_attention(q, k, v, cache.cache, *where)
  else:
    out, dense, mass = scored_attention(q, k, v, cache.cache, mass, *where)
  return out, Recording(dense, queries, mass)


def _attend_compressed(
  q: jax.Array, k: jax.Array, v: jax.Array, cache: Compressed, span: Span, layer: int
) -> tuple[jax.Array, Compressed]:
  active, (queries, total) = span.length > 0, (cache.observed.queries, cache.observed.mass)
  if queries is not None:
    slot = jnp.where(active, span.start % queries.shape[2], queries.shape[2])  # or dropped
    queries = queries.at[layer, jnp.arange(len(slot)), slot].set(q[:, 0], mode="drop")
  if cache.rotated:
    q, k, v = rotate(q), rotate(k), rotate(v)
  out, paged, mass = decode_attention(
    q, k, v, cache.paged, span.start, cache.spilled, active, layer, scores=total is not None
  )
  if total is not None and mass is not None:
    both = zip(total, mass, strict=True)
    total = Mass(*(old.at[layer].add(new) for old, new in both))
  new = Compressed(paged, cache.spilled, Observed(queries, total), cache.rotated)
  return rotate(out) if cache.rotated else out, new


def _remember(queries: jax.Array, q: jax.Array, length: jax.Array, layer: int) -> jax.Array:
  """The queries of one layer moved on by `length` tokens a row."""
  window = queries.shape[2]
  both = jnp.concatenate([queries[layer], q.astype(jnp.float32)], axis=1)  # [B, W + T, N, H]
  last = jax.vmap(lambda row, n: jax.lax.dynamic_slice_in_dim(row, n, window))(both, length)
  return queries.at[layer].set(last)
