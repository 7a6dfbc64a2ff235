"""Attention over a KV cache whose older part lies packed in pages."""

from q4jax_kernels.paged_attention.api import decode_attention
from q4jax_kernels.paged_attention.paged import Mass, Paged, spill, spills

__all__ = ["Mass", "Paged", "decode_attention", "spill", "spills"]
