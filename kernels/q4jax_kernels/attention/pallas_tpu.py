"""Attention over the dense cache for TPUs (Pallas, Mosaic): no matrix of scores leaves the chip.

One grid step multiplies a tile of tokens, of all query heads that share a KV head, with a block of
slots; the softmax is online (arXiv:1805.02867, arXiv:2205.14135). The grid ends with the last slot
that any row sees, a bound known only when it runs. Within it, blocks behind a tile's own last token
are neither brought nor computed, and only blocks that hold slots that some token must not see, or
that were never written, are masked.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

HEAD_DIMS = (64, 128, 256)
_ROWS = 512  # of a tile: tokens times query heads of a KV head
_SLOTS = 1024  # of a block
_TOKENS = 16  # a tile holds a multiple of so many: the rows of a bfloat16 register
_NONE = -1e30  # the logit of a slot that is not seen
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_LOG2_E = 1.4426950408889634


def supports(head_dim: int, slots: int, dtype: jnp.dtype) -> bool:
  """Whether the kernel takes a cache [..., S, H] of this type; any S will do."""
  return head_dim in HEAD_DIMS and dtype in _DTYPES


# A function of its own: the layers of a model share its trace.
@partial(jax.jit, static_argnames="interpret")
def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  start: jax.Array,
  length: jax.Array,
  layer: int | jax.Array,
  *,
  interpret: Any = False,
) -> jax.Array:
  """See kernel.py; products take bfloat16 and add in float32, as the softmax does.

  A layer of a float16 cache is converted before, all of its slots.

  Args:
    interpret: as of `pl.pallas_call`.

  Raises:
    NotImplementedError: what `supports` refuses.
  """
  if not supports(q.shape[-1], k.shape[3], k.dtype):
    raise NotImplementedError(
      f"The TPU kernel takes heads of {HEAD_DIMS} and a cache in bfloat16, float16 or float32; got "
      f"heads of {q.shape[-1]} and {k.dtype}."
    )
  (b, t, n, h), (_, _, kv_heads, slots, _) = q.shape, k.shape
  heads = n // kv_heads
  tokens = max(_TOKENS, _ROWS // heads // _TOKENS * _TOKENS)
  tokens = min(tokens, t + -t % _TOKENS)
  tiles, size = pl.cdiv(t, tokens), min(_SLOTS, slots)
  query = (q.astype(jnp.float32) * (h**-0.5 * _LOG2_E)).astype(jnp.bfloat16).swapaxes(1, 2)
  query = jnp.pad(query, ((0, 0), (0, 0), (0, tiles * tokens - t), (0, 0)))
  if k.dtype == jnp.float16:  # Mosaic has no such type.
    k, v = (jax.lax.dynamic_index_in_dim(a, layer).astype(jnp.bfloat16) for a in (k, v))
    layer = 0
  # Heads of less than a register's 128 lanes: XLA stores such a cache with the slots along the
  # lanes, and copies all of it for a kernel that wants them otherwise.
  across = h < 128
  if across:
    k, v = k.swapaxes(-1, -2), v.swapaxes(-1, -2)
  steps = pl.cdiv(jnp.max(jnp.where(length > 0, start + length, 1)), size)

  def tile(i: Any, kv: Any, t: Any, s: Any, *_: Any) -> tuple:
    return i, kv, t, 0

  def block(i: Any, kv: Any, t: Any, s: Any, layer: Any, start: Any, length: Any) -> tuple:
    # Behind a tile's last token the same block again, which brings nothing anew.
    last = jnp.maximum(_last(t, tokens, start[i], length[i]), 0)
    s = jnp.minimum(s, jax.lax.div(last, size))
    return layer[0], i, kv, *((0, s) if across else (s, 0))

  rows = heads * tokens
  kept = [pltpu.VMEM((rows, 1), jnp.float32)] * 2 + [pltpu.VMEM((rows, h), jnp.float32)]
  call = pl.pallas_call(
    partial(_kernel, across=across),
    out_shape=jax.ShapeDtypeStruct(query.shape, jnp.float32),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(b, kv_heads, tiles, steps),
      in_specs=[
        pl.BlockSpec((None, heads, tokens, h), tile),
        *[pl.BlockSpec((None, None, None, *((h, size) if across else (size, h))), block)] * 2,
      ],
      out_specs=pl.BlockSpec((None, heads, tokens, h), tile),
      scratch_shapes=kept,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
    ),
    cost_estimate=pl.CostEstimate(  # as if all slots were filled
      flops=4 * b * n * t * slots * h,
      bytes_accessed=6 * q.size + 2 * b * kv_heads * tiles * slots * h * k.dtype.itemsize,
      transcendentals=b * n * t * slots,
    ),
    interpret=interpret,
    name="flash_attention",
  )
  out = call(jnp.full(1, layer, jnp.int32), start, length, query, k, v)
  return out[:, :, :t].swapaxes(1, 2)


def _last(tile: Any, tokens: int, start: Any, length: Any) -> Any:
  """The position of a tile's last real token; that of a tile before it, if it has none."""
  return start + jnp.minimum((tile + 1) * tokens, length) - 1


def _kernel(
  layer_ref: Any,  # int32[1], unused here: the block specs read it
  start_ref: Any,  # int32[B]
  length_ref: Any,  # int32[B]
  q_ref: Any,  # [R, tokens, H] bfloat16, scaled for a softmax of base 2
  k_ref: Any,  # [size, H]
  v_ref: Any,
  o_ref: Any,  # [R, tokens, H] float32
  top_ref: Any,  # [R * tokens, 1], the largest logit
  total_ref: Any,  # [R * tokens, 1], sum of p
  sum_ref: Any,  # [R * tokens, H], sum of p * value
  *,
  across: bool,  # keys and values are [H, size]
) -> None:
  row, tile, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  heads, tokens, h = q_ref.shape
  dims, slots = (0, 1) if across else (1, 0)  # axes of keys and values
  size = k_ref.shape[slots]
  start, length = start_ref[row], length_ref[row]
  first, end = start + tile * tokens, start + length
  real = tile * tokens < length

  @pl.when(step == 0)
  def _() -> None:
    top_ref[...] = jnp.full_like(top_ref, _NONE)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  def add(masked: bool) -> None:
    q = q_ref[...].reshape(heads * tokens, h)
    k, v = (ref[...].astype(jnp.bfloat16) for ref in (k_ref, v_ref))
    logits = jax.lax.dot_general(
      q, k, (((1,), (dims,)), ((), ())), preferred_element_type=jnp.float32
    )
    if masked:
      shape = (heads, tokens, size)
      position = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
      slot = step * size + jax.lax.broadcasted_iota(jnp.int32, shape, 2)
      logits = jnp.where((slot <= position).reshape(logits.shape), logits, _NONE)
      # Slots that were never written may hold anything, NaN included, and 0 * NaN is NaN.
      slot = step * size + jax.lax.broadcasted_iota(jnp.int32, v.shape, slots)
      v = jnp.where(slot < end, v, jnp.zeros_like(v))
    before = top_ref[...]
    top = jnp.maximum(before, logits.max(-1, keepdims=True))
    p, fade = jnp.exp2(logits - top), jnp.exp2(before - top)
    top_ref[...] = top
    total_ref[...] = total_ref[...] * fade + p.sum(-1, keepdims=True)
    part = jax.lax.dot_general(
      p.astype(jnp.bfloat16), v, (((1,), (slots,)), ((), ())), preferred_element_type=jnp.float32
    )
    sum_ref[...] = sum_ref[...] * fade + part

  whole = (step + 1) * size <= first + 1  # Its first token sees all of the block.
  seen = step * size <= _last(tile, tokens, start, length)
  pl.when(real & whole)(partial(add, masked=False))
  pl.when(real & seen & jnp.logical_not(whole))(partial(add, masked=True))

  @pl.when(step == pl.num_programs(3) - 1)
  def _() -> None:
    out = (sum_ref[...] / total_ref[...]).reshape(heads, tokens, h)
    token = tile * tokens + jax.lax.broadcasted_iota(jnp.int32, out.shape, 1)
    o_ref[...] = jnp.where(token < length, out, 0.0)
