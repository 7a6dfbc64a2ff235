"""The native CPU kernel (csrc/paged_attention_kernel.h): codes are read as they lie, nothing is
dequantised to memory.

Against coded keys q is rounded to int8 by the keys' groups; against coded values the weights
p * scale to int8 in each block and group. Sums are integers within these and float32 across.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from q4jax_kernels import ffi
from q4jax_kernels.kv_pages import Pages
from q4jax_kernels.paged_attention.paged import Mass, Paged

_MAX_HEAD_DIM, _MAX_BLOCK = 256, 256  # csrc/kernels.h


def supports(cache: Paged) -> bool:
  """Whether the library is there and the cache is of a kind that it reads."""
  pages = (cache.key_pages, cache.value_pages)
  return (
    all(p.layout == "x16" and not p.format.bfloat16 for p in pages)
    and all(p.format.is_float or (p.format.group_size or p.head_dim) % 4 == 0 for p in pages)
    and cache.k.dtype in (jnp.float16, jnp.float32)
    and cache.k.shape[-1] <= _MAX_HEAD_DIM
    and cache.block_size <= _MAX_BLOCK
    and ffi.available()
  )


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
  isa: str = "best",
) -> tuple[jax.Array, Paged, Mass | None]:
  """Shapes as in api.py. The dense part of a donated cache is updated in place.

  Raises:
    NotImplementedError: pages that `supports` refuses.
  """
  if not supports(cache):
    raise NotImplementedError(
      "'cpu' needs the native library and pages in layout x16, without bfloat16, of heads of at "
      f"most {_MAX_HEAD_DIM} and blocks of at most {_MAX_BLOCK}; got {cache.key_pages.format} in "
      f"'{cache.key_pages.layout}' and {cache.value_pages.format}, heads of {cache.k.shape[-1]}, "
      f"blocks of {cache.block_size}."
    )
  b, _, kv_heads, _ = k.shape
  blocks, dense = cache.block_table.shape[2] * cache.block_size, cache.k.shape[3]
  mass_shapes = [(b, kv_heads, blocks), (b, kv_heads, dense)] if scores else [(0,), (0,)]
  results = [
    jax.ShapeDtypeStruct(q.shape, jnp.float32),
    *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (cache.k, cache.v)),
    *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in mass_shapes),
  ]
  call = jax.ffi.ffi_call("q4jax_paged_attention", results, input_output_aliases={3: 1, 4: 2})
  out, dense_k, dense_v, *mass = call(
    *(a.astype(jnp.float32) for a in (q, k, v)),
    cache.k,
    cache.v,
    *_arrays(cache.key_pages),
    *_arrays(cache.value_pages),
    cache.slot_pos,
    cache.block_table,
    cache.num_blocks,
    length,
    spilled,
    active,
    key_format=_format(cache.key_pages),
    value_format=_format(cache.value_pages),
    layer=np.int64(layer),
    sink=np.int64(cache.sink),
    scale=np.float32(q.shape[-1] ** -0.5),
    isa=np.int64(ffi.ISA_IDS[isa]),
  )
  cache = dataclasses.replace(cache, k=dense_k, v=dense_v)
  return out, cache, Mass(*mass) if scores else None


def _arrays(pages: Pages) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Codes, scale, minimum; empty where the format has none."""
  empty = jnp.zeros(0, jnp.float16)
  scale, minimum = (empty if a is None else a for a in (pages.scale, pages.minimum))
  return pages.codes, scale, minimum


def _format(pages: Pages) -> np.ndarray:
  group = 0 if pages.format.is_float else pages.format.group_size or pages.head_dim
  return np.array([pages.format.bits, group, pages.format.symmetric], np.int64)
