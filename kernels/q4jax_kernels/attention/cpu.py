"""The native CPU attention (csrc/attention_kernel.h): appends to the donated cache in place."""

import jax
import jax.numpy as jnp
import numpy as np

from q4jax_kernels import ffi


def cached_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache: tuple[jax.Array, jax.Array],
  start: jax.Array,
  length: jax.Array,
  layer: int,
  isa: str = "best",
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Shapes as in api.py; the cache is float16 or float32. Only filled slots are read."""
  out, cache, _ = scored_attention(q, k, v, cache, jnp.zeros(0), start, length, layer, isa)
  return out, cache


def scored_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache: tuple[jax.Array, jax.Array],
  mass: jax.Array,
  start: jax.Array,
  length: jax.Array,
  layer: int,
  isa: str = "best",
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
  """As in api.py. An empty mass is not added to."""
  k_cache, v_cache = cache
  call = jax.ffi.ffi_call(
    "q4jax_attention",
    [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k_cache, v_cache, mass)],
    input_output_aliases={3: 1, 4: 2, 5: 3} if mass.size else {3: 1, 4: 2},
  )
  out, k_cache, v_cache, mass = call(
    *(a.astype(jnp.float32) for a in (q, k, v)),
    k_cache,
    v_cache,
    mass,
    start,
    length,
    layer=np.int64(layer),
    scale=np.float32(q.shape[-1] ** -0.5),
    isa=np.int64(ffi.ISA_IDS[isa]),
  )
  return out, (k_cache, v_cache), mass


def window_attention(q: jax.Array, k: jax.Array, seen: jax.Array, isa: str = "best") -> jax.Array:
  """As in api.py; k is float16 or float32. A `seen` that falls is an error."""
  b, w, n, h = q.shape
  call = jax.ffi.ffi_call(
    "q4jax_window_attention", jax.ShapeDtypeStruct((b, n, w, k.shape[2]), jnp.float32)
  )
  return call(
    q.astype(jnp.float32),
    k,
    seen,
    scale=np.float32(h**-0.5),
    isa=np.int64(ffi.ISA_IDS[isa]),
  )
