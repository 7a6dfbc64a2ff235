"""Decode attention for TPUs (Pallas, Mosaic): packed codes stream from HBM through the block table.

One grid step takes one block of one sequence, of all KV heads, and unpacks its codes in VMEM. They
are never multiplied by their scales: for slot t and group g, with scale s, minimum m and codes n,

  logit_t = sum_g s_tg (q_g . n_tg) - m_tg sum(q_g)     out_g = sum_t p_t (s_tg n_tg - m_tg)

so q is repeated once per group, zero outside of it, for one product to give all the groups' sums,
and so are the probabilities, of which each group's dims are kept. The softmax is online
(arXiv:1805.02867). The dense part, a few tokens, is XLA's (join.py).
Scales and positions are gathered by XLA too: an odd few lanes a slot, in a type Mosaic has not.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from q4jax_kernels.kv_pages import Pages
from q4jax_kernels.paged_attention.join import NONE, Partial, join
from q4jax_kernels.paged_attention.paged import Mass, Paged, append, live_paged

_SUBLANES = 8  # query heads of a KV head are padded to whole tiles
_EXACT = jax.lax.Precision.HIGHEST


class _Side(NamedTuple):
  """Keys or values as the kernel takes them: arrays, or block specs, or refs."""

  codes: Any  # uint8[NB, K, bs, H * bits / 8]
  scale: Any  # float32[B, P, K, G, bs], zero where a slot is not seen
  minimum: Any  # as scale


def supports(cache: Paged) -> bool:
  """Whether the kernel reads these pages: codes in rows."""
  sides = (cache.key_pages, cache.value_pages)
  return all(not s.format.is_float and s.layout == "rows" for s in sides)


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
  interpret: Any = False,
) -> tuple[jax.Array, Paged, Mass | None]:
  """Shapes as in api.py; `interpret` as of `pl.pallas_call`.

  Raises:
    NotImplementedError: pages that `supports` refuses.
  """
  if not supports(cache):
    raise NotImplementedError(
      f"The TPU kernel reads codes in layout 'rows'; got keys in {cache.key_pages.format}, values "
      f"in {cache.value_pages.format}, in layout '{cache.key_pages.layout}'."
    )
  cache = append(k, v, cache, length, active, layer)
  b, _, _, h = q.shape
  query = q.reshape(b, k.shape[2], -1, h) * h**-0.5
  pages = _paged(query, cache, layer, active, scores, interpret)
  out, mass = join(query, pages, cache, length, spilled, active, layer)
  return out, cache, mass


def _paged(
  query: jax.Array, cache: Paged, layer: int, active: jax.Array, scores: bool, interpret: Any
) -> Partial:
  """The pages' part of the softmax, for scaled queries [B, K, R, H]."""
  heads = query.shape[2]
  query = jnp.pad(query, ((0, 0), (0, 0), (0, -heads % _SUBLANES), (0, 0)))
  (b, kv_heads, r, h), bs = query.shape, cache.block_size
  table, count = cache.block_table[layer], jnp.where(active, cache.num_blocks[layer], 0)
  width = table.shape[1]
  live = live_paged(cache, layer, active)[:, :, None]  # [B, P, 1, bs]
  sides = [_side(pages, table, live) for pages in (cache.key_pages, cache.value_pages)]
  q, q_sum = _by_group(query, cache.key_pages)

  def row(*shape: int) -> pl.BlockSpec:  # the same at every step of a row
    return pl.BlockSpec((None, *shape), lambda i, p, *_: (i, *(0 for _ in shape)))

  def step(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, *shape), lambda i, p, *_: (i, p, *(0 for _ in shape)))

  def block(codes: jax.Array) -> pl.BlockSpec:
    # Past a row's blocks the last one again, which brings nothing anew.
    def at(i: Any, p: Any, table: Any, count: Any) -> tuple:
      return table[i, jnp.minimum(p, jnp.maximum(count[i] - 1, 0))], 0, 0, 0

    return pl.BlockSpec((None, *codes.shape[1:]), at)

  specs = [_Side(block(s.codes), *(step(*a.shape[2:]) for a in s[1:])) for s in sides]
  value = cache.value_pages
  bytes_of = [b * width * s.codes[0].size + 8 * s.scale.size for s in sides]
  shapes = [(b, kv_heads, r, h), (b, kv_heads, r, 1), (b, kv_heads, r, 1)]
  outputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  out_specs = [row(*s[1:]) for s in shapes]
  parts = _parts(value)
  outputs[0] = jax.ShapeDtypeStruct((b, kv_heads, parts, r, h // parts), jnp.float32)
  out_specs[0] = row(kv_heads, parts, r, h // parts)
  if scores:
    outputs.append(jax.ShapeDtypeStruct((b, width, kv_heads, r, bs), jnp.float32))
    out_specs.append(step(kv_heads, r, bs))
  call = pl.pallas_call(
    partial(_kernel, group=h // value.format.groups(h)),
    out_shape=outputs,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(b, width),
      in_specs=[row(*q.shape[1:]), row(*q_sum.shape[1:]), *specs, step(1, bs)],
      out_specs=out_specs,
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    cost_estimate=pl.CostEstimate(
      flops=4 * b * width * bs * kv_heads * r * h,
      bytes_accessed=sum(bytes_of),
      transcendentals=b * width * bs * kv_heads * r,
    ),
    interpret=interpret,
    name="paged_attention",
  )
  o, top, total, *logits = call(table, count, q, q_sum, *sides, live.astype(jnp.float32))
  o = o.swapaxes(2, 3).reshape(query.shape)
  out = Partial(*(a[:, :, :heads] for a in (o, top, total)))
  if scores:
    found = logits[0].transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, r, width * bs)
    out = out._replace(logits=found[:, :, :heads])
  return out


def _side(pages: Pages, table: jax.Array, live: jax.Array) -> _Side:
  scale = pages.scale[table].astype(jnp.float32)  # type: ignore[index]
  if pages.minimum is None:
    minimum = scale * pages.format.offset
  else:
    minimum = pages.minimum[table].astype(jnp.float32)
  seen = live[:, :, :, None]
  # A slot that holds no token may have NaN for a scale, and 0 * NaN is NaN.
  found = (jnp.where(seen, a.swapaxes(-1, -2), 0.0) for a in (scale, minimum))
  return _Side(pages.codes, *found)


def _parts(pages: Pages) -> int:
  """Codes of a byte."""
  return 8 // pages.format.bits


def _by_group(query: jax.Array, keys: Pages) -> tuple[jax.Array, jax.Array]:
  """Queries [B, K, R, H] once per group of the keys, zero outside of it, and their sums.

  Returns:
    [B, K, parts, G * R, H / parts], a part for each nibble of a byte, and [B, K, G * R, 1].
  """
  b, kv_heads, r, h = query.shape
  groups, parts = keys.format.groups(h), _parts(keys)
  inside = jnp.arange(h)[None] // (h // groups) == jnp.arange(groups)[:, None]
  q = jnp.where(inside[None, None, :, None], query[:, :, None], 0.0)
  q = q.reshape(b, kv_heads, groups * r, h)
  halves = q.reshape(b, kv_heads, groups * r, parts, h // parts).swapaxes(2, 3)
  return halves, q.sum(-1, keepdims=True)


def _kernel(
  table_ref: Any,  # int32[B, P], unused here: the block specs read it
  count_ref: Any,  # int32[B]
  q_ref: Any,  # [K, parts, G * R, H / parts]
  q_sum_ref: Any,  # [K, G * R, 1]
  keys: _Side,  # codes [K, bs, H / parts], scale and minimum [K, G, bs]
  values: _Side,
  live_ref: Any,  # [1, bs], 1.0 where a slot is seen
  o_ref: Any,  # [K, parts, R, H / parts]
  top_ref: Any,  # [K, R, 1]
  total_ref: Any,  # [K, R, 1]
  logits_ref: Any = None,  # [K, R, bs]
  *,
  group: int,  # of the values: dims
) -> None:
  step = pl.program_id(1)
  kv_heads, r = top_ref.shape[:2]

  @pl.when(step == 0)
  def _() -> None:
    o_ref[...] = jnp.zeros_like(o_ref)
    top_ref[...] = jnp.full_like(top_ref, NONE)
    total_ref[...] = jnp.zeros_like(total_ref)

  seen = step < count_ref[pl.program_id(0)]
  if logits_ref is not None:

    @pl.when(jnp.logical_not(seen))
    def unseen() -> None:
      logits_ref[...] = jnp.full_like(logits_ref, NONE)

  @pl.when(seen)
  def _() -> None:
    live = live_ref[...] > 0
    for kv in range(kv_heads):
      logits = _logits(q_ref[kv], q_sum_ref[kv], keys, kv, r)
      logits = jnp.where(live, logits, NONE)
      if logits_ref is not None:
        logits_ref[kv] = logits
      before = top_ref[kv]
      top = jnp.maximum(before, logits.max(-1, keepdims=True))
      p = jnp.where(live, jnp.exp(logits - top), 0.0)
      fade = jnp.exp(before - top)
      top_ref[kv] = top
      total_ref[kv] = total_ref[kv] * fade + p.sum(-1, keepdims=True)
      for part, sums in enumerate(_weighted(p, values, kv, group)):
        o_ref[kv, part] = o_ref[kv, part] * fade + sums


def _logits(q: jax.Array, q_sum: jax.Array, keys: _Side, kv: int, r: int) -> jax.Array:
  """[R, bs]."""
  scale, minimum = keys.scale[kv], keys.minimum[kv]
  groups, bs = scale.shape
  dots = jnp.zeros((groups * r, bs), jnp.float32)
  for i, n in enumerate(_codes(keys.codes[kv], q.shape[0])):
    dots += jax.lax.dot_general(q[i], n, (((1,), (1,)), ((), ())), precision=_EXACT)
  by_group = dots.reshape(groups, r, bs) * scale[:, None, :]
  by_group -= q_sum.reshape(groups, r, 1) * minimum[:, None, :]
  return by_group.sum(0)


def _weighted(p: jax.Array, values: _Side, kv: int, group: int) -> list[jax.Array]:
  """p [R, bs] times the values, [R, H / parts] for each part."""
  scale, minimum = values.scale[kv], values.minimum[kv]
  (groups, bs), r = scale.shape, p.shape[0]
  weight = (p[None] * scale[:, None, :]).reshape(groups * r, bs)
  less = (p[None] * minimum[:, None, :]).sum(-1, keepdims=True)  # [G, R, 1]
  width = values.codes.shape[-1]
  sums = []
  for i, n in enumerate(_codes(values.codes[kv], groups * group // width)):
    by_group = jnp.dot(weight, n, precision=_EXACT).reshape(groups, r, width) - less
    dim = jax.lax.broadcasted_iota(jnp.int32, by_group.shape, 2) + i * width
    first = jax.lax.broadcasted_iota(jnp.int32, by_group.shape, 0) * group
    inside = (dim >= first) & (dim < first + group)
    sums.append(jnp.where(inside, by_group, 0.0).sum(0))
  return sums


def _codes(packed: jax.Array, parts: int) -> list[jax.Array]:
  """uint8[bs, H / parts] as float32 of the low and, of two parts, the high nibbles."""
  words = packed.astype(jnp.int32)
  if parts == 1:
    return [words.astype(jnp.float32)]
  return [(words & 15).astype(jnp.float32), (words >> 4).astype(jnp.float32)]
