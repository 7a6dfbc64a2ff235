"""One door to attention over the compressed cache: checks once, then picks an implementation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from q4jax_kernels.paged_attention import cpu, reference
from q4jax_kernels.paged_attention.paged import Mass, Paged

IMPLEMENTATIONS = ("reference", "cpu", "pallas_tpu", "mosaic_gpu")


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
  implementation: str | None = None,
) -> tuple[jax.Array, Paged, Mass | None]:
  """Appends one token a row to one layer of the cache, then attends to all of its live slots.

  The ring must have room for it: see `paged.spill`. Logits are scaled by H^-1/2; everything is
  computed in float32, but that CPUs round what meets packed codes to int8 (cpu.py).

  Args:
    q: float32[B, 1, N, H], RoPE applied; N is a multiple of K.
    k, v: float32[B, 1, K, H].
    cache: donated where possible.
    length: int32[B], tokens seen before: the position of this one.
    spilled: int32[B], of which so many have left the ring, a multiple of bs.
    active: bool[B]; other rows change nothing, and their output and mass are zero.
    layer: which of the L.
    scores: whether to return the mass.
    implementation: one of IMPLEMENTATIONS, which then runs or raises; None takes the device's: the
      native kernel for pages in layout x16, on TPUs and Hopper GPUs theirs for codes in rows, else
      the reference.

  Returns:
    float32[B, 1, N, H], the updated cache, and the mass that each slot got, or None.

  Raises:
    ValueError: shapes or types that do not fit each other, or an unknown implementation.
    NotImplementedError: the named implementation does not read these pages.
  """
  _check(q, k, v, cache, length, spilled, active, layer)
  arguments = (q, k, v, cache, length, spilled, active)
  if implementation not in (None, *IMPLEMENTATIONS):
    names = ", ".join(IMPLEMENTATIONS)
    raise ValueError(f"implementation '{implementation}' is not one of {names}.")

  def bind(attend: Callable[..., Any]) -> Callable[..., Any]:
    return partial(attend, layer=layer, scores=scores)

  portable = bind(reference.decode_attention)
  native = bind(cpu.decode_attention)
  if implementation == "reference":
    return portable(*arguments)
  if implementation == "cpu" or (implementation is None and cpu.supports(cache)):
    return native(*arguments)  # The layout x16 is made for CPUs alone.
  if implementation is None and not _in_rows(cache):
    return portable(*arguments)
  # Pallas is slow to import, so only where the pages may be for it.
  from q4jax_kernels.paged_attention import mosaic_gpu, pallas_tpu

  tpu = bind(pallas_tpu.decode_attention)
  gpu = bind(mosaic_gpu.decode_attention)
  if implementation is not None:
    return {"pallas_tpu": tpu, "mosaic_gpu": gpu}[implementation](*arguments)
  kernels = {}
  if pallas_tpu.supports(cache):
    kernels["tpu"] = tpu
  if mosaic_gpu.supports(cache, q.shape[2] // k.shape[2]):
    kernels["cuda"] = gpu
  return jax.lax.platform_dependent(*arguments, default=portable, **kernels)


def _in_rows(cache: Paged) -> bool:
  return cache.key_pages.layout == cache.value_pages.layout == "rows"


def _check(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache: Paged,
  length: jax.Array,
  spilled: jax.Array,
  active: jax.Array,
  layer: int,
) -> None:
  if cache.k.ndim != 5 or cache.block_table.ndim != 3:
    raise ValueError(
      f"k of the cache has shape {list(cache.k.shape)} and block_table "
      f"{list(cache.block_table.shape)}; they must be [L, B, K, D, H] and [L, B, P]."
    )
  layers, b, kv_heads, dense, h = cache.k.shape
  pages = {"key": cache.key_pages, "value": cache.value_pages}
  nb, bs = cache.key_pages.num_blocks, cache.block_size
  for kind, side in pages.items():
    found = (side.kind, side.num_blocks, side.kv_heads, side.block_size, side.head_dim)
    if found != (kind, nb, kv_heads, bs, h):
      raise ValueError(
        f"{kind}_pages have (kind, blocks, KV heads, block size, head_dim) = {found}; they must "
        f"be {(kind, nb, kv_heads, bs, h)}, as the cache's k and its other pages are."
      )
  if cache.sink < 0 or cache.recent < 0 or dense != cache.sink + cache.recent + bs:
    raise ValueError(
      f"the dense part has {dense} slots; it must have sink + recent + block_size = "
      f"{cache.sink} + {cache.recent} + {bs}."
    )
  if q.ndim != 4 or q.shape[0] != b or q.shape[1] != 1 or q.shape[3] != h or q.shape[2] % kv_heads:
    raise ValueError(
      f"q has shape {list(q.shape)}; it must be [{b}, 1, N, {h}] with N a multiple of {kv_heads}."
    )
  if isinstance(layer, int) and not 0 <= layer < layers:
    raise ValueError(f"layer={layer} is none of the cache's {layers} layers.")
  blocks = cache.block_table.shape[2]
  expected = [
    ("q", q, q.shape, jnp.float32),
    ("k", k, (b, 1, kv_heads, h), jnp.float32),
    ("v", v, (b, 1, kv_heads, h), jnp.float32),
    ("v of the cache", cache.v, cache.k.shape, cache.k.dtype),
    ("slot_pos", cache.slot_pos, (nb, bs), jnp.int32),
    ("block_table", cache.block_table, (layers, b, blocks), jnp.int32),
    ("num_blocks", cache.num_blocks, (layers, b), jnp.int32),
    ("length", length, (b,), jnp.int32),
    ("spilled", spilled, (b,), jnp.int32),
    ("active", active, (b,), jnp.bool_),
  ]
  for name, a, shape, dtype in expected:
    wanted = jnp.dtype(dtype)
    if (a.shape, a.dtype) != (shape, wanted):
      raise ValueError(
        f"{name} is {a.dtype}{list(a.shape)}; it must be {wanted}{list(shape)} beside k "
        f"[L, B, K, D, H] = {list(cache.k.shape)} of the cache."
      )
