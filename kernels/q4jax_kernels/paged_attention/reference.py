"""The specification of paged attention, in jax.numpy; it dequantises every block of the table."""

import jax
import jax.numpy as jnp

from q4jax_kernels import kv_pages
from q4jax_kernels.paged_attention.paged import Mass, Paged, append, live_dense, live_paged


def decode_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache: Paged,
  length: jax.Array,
  spilled: jax.Array,
  active: jax.Array,
  layer: int,
  *,
  scores: bool,
) -> tuple[jax.Array, Paged, Mass | None]:
  """Appends one token a row, then attends to all that is live. Shapes as in api.py."""
  cache = append(k, v, cache, length, active, layer)
  b, _, n, h = q.shape
  kv_heads = k.shape[2]
  paged = live_paged(cache, layer, active).reshape(b, -1)
  live = jnp.concatenate([paged, live_dense(cache, length, spilled, active)], axis=1)

  def slots(pages: kv_pages.Pages, dense: jax.Array) -> jax.Array:
    """float32[B, K, P * bs + D, H]."""
    blocks = kv_pages.read(pages, cache.block_table[layer])  # [B, P, K, bs, H]
    blocks = blocks.swapaxes(1, 2).reshape(b, kv_heads, -1, h)
    return jnp.concatenate([blocks, dense[layer].astype(jnp.float32)], axis=2)

  keys, values = slots(cache.key_pages, cache.k), slots(cache.value_pages, cache.v)
  query = q.reshape(b, kv_heads, n // kv_heads, h).astype(jnp.float32)
  exact = jax.lax.Precision.HIGHEST
  logits = jnp.einsum("bkrh,bksh->bkrs", query, keys, precision=exact) * h**-0.5
  p = jax.nn.softmax(jnp.where(live[:, None, None], logits, -1e30), axis=-1)
  # Slots that hold no token may hold anything, NaN included, and 0 * NaN is NaN.
  values = jnp.where(live[:, None, :, None], values, 0.0)
  out = jnp.einsum("bkrs,bksh->bkrh", p, values, precision=exact).reshape(q.shape)
  out = jnp.where(active[:, None, None, None], out, 0.0)
  if not scores:
    return out, cache, None
  mass = jnp.where(live[:, None], p.mean(axis=2), 0.0)
  return out, cache, Mass(*jnp.split(mass, [paged.shape[1]], axis=2))
