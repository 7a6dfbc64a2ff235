"""Joins the softmax over the pages, which a kernel leaves unfinished, with the dense part.

A partial softmax is the sum of p * value and of p, where p = exp(logit - top) and top is the
largest logit: two of them add up once both are scaled to the larger top (arXiv:1805.02867). The
dense part, a few tokens, is XLA's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from q4jax_kernels.paged_attention.paged import Mass, Paged, live_dense, live_paged

NONE = -1e30  # the logit of a slot that is not seen
_EXACT = jax.lax.Precision.HIGHEST


class Partial(NamedTuple):
  """The softmax over the pages, of R query heads a KV head, unfinished. All float32."""

  out: jax.Array  # [B, K, R, H], sum of p * value
  top: jax.Array  # [B, K, R, 1], NONE where nothing is seen
  total: jax.Array  # [B, K, R, 1], sum of p
  logits: jax.Array | None = None  # [B, K, R, P * bs]; anything where nothing is seen


def merge(parts: Partial, axis: int) -> Partial:
  """Partial softmaxes of disjoint slots, side by side along an axis, as one. Without logits."""
  top = parts.top.max(axis, keepdims=True)
  weight = jnp.exp(parts.top - top)
  out, total = ((a * weight).sum(axis) for a in (parts.out, parts.total))
  return Partial(out, top.squeeze(axis), total)


def join(
  query: jax.Array,
  pages: Partial,
  cache: Paged,
  length: jax.Array,
  spilled: jax.Array,
  active: jax.Array,
  layer: int,
) -> tuple[jax.Array, Mass | None]:
  """The output float32[B, 1, N, H], and the mass if the logits are given.

  Args:
    query: float32[B, K, R, H], already scaled.
    pages: their part.
    cache: with this step's token appended; this and the others as in api.py.
  """
  b, kv_heads, r, h = query.shape
  keys, values = (a[layer].astype(jnp.float32) for a in (cache.k, cache.v))
  live = live_dense(cache, length, spilled, active)
  dense = jnp.einsum("bkrh,bksh->bkrs", query, keys, precision=_EXACT)
  dense = jnp.where(live[:, None, None], dense, NONE)
  values = jnp.where(live[:, None, :, None], values, 0.0)
  most = jnp.maximum(pages.top, dense.max(-1, keepdims=True))
  p, weight = jnp.exp(dense - most), jnp.exp(pages.top - most)
  total = pages.total * weight + p.sum(-1, keepdims=True)
  out = pages.out * weight + jnp.einsum("bkrs,bksh->bkrh", p, values, precision=_EXACT)
  out = (out / total).reshape(b, 1, kv_heads * r, h)
  out = jnp.where(active[:, None, None, None], out, 0.0)
  if pages.logits is None:
    return out, None

  def mean(p: jax.Array, seen: jax.Array) -> jax.Array:
    return jnp.where(seen[:, None], (p / total).mean(2), 0.0)

  seen = live_paged(cache, layer, active).reshape(b, -1)
  return out, Mass(mean(jnp.exp(pages.logits - most), seen), mean(p, live))
