"""Attention, with and without a KV cache."""

from q4jax_kernels.attention.api import (
  Cache,
  cached_attention,
  causal_attention,
  scored_attention,
  window_attention,
)

__all__ = [
  "Cache",
  "cached_attention",
  "causal_attention",
  "scored_attention",
  "window_attention",
]
