"""Decode attention for Hopper GPUs: packed codes come from HBM through the block table.

A thread block has one (sequence, KV head) and a share of its kv blocks, so that all SMs read, and
leaves an unfinished softmax; XLA adds those up (join.py). The kernel is in mosaic_gpu_kernel.py.

Scales are gathered by XLA, in float16, for a copy of a tile's few bytes would be too small for the
GPU's copy engine; that makes about 1.4 times the traffic at 4 bits in groups of 32.
"""

from typing import Any

import jax
import jax.numpy as jnp

from q4jax_kernels.kv_pages import Pages
from q4jax_kernels.paged_attention import mosaic_gpu_kernel
from q4jax_kernels.paged_attention.join import NONE, Partial, join, merge
from q4jax_kernels.paged_attention.mosaic_gpu_kernel import ROWS, SLOTS, Inputs, Plan, Side
from q4jax_kernels.paged_attention.paged import Mass, Paged, append, live_paged

HEAD_DIMS = (64, 128)
_SMS = 132  # of an H100 SXM, H200 or GH200: what splitting aims at


def supports(cache: Paged, heads: int) -> bool:
  """Whether the kernel reads these pages, and the GPU, if there is one, has `wgmma`.

  Args:
    heads: query heads of a KV head.
  """
  readable = all(map(_readable, (cache.key_pages, cache.value_pages)))
  return readable and heads <= ROWS and _may_be_hopper()


def _readable(pages: Pages) -> bool:
  codes = not pages.format.is_float and pages.layout == "rows"
  blocks = SLOTS % pages.block_size == 0 or pages.block_size % SLOTS == 0
  groups = codes and (pages.format.group_size or pages.head_dim) % 16 == 0
  return groups and blocks and pages.head_dim in HEAD_DIMS


def _may_be_hopper() -> bool:
  """Whether this process may compile for compute capability 9.0, the only one with `wgmma`."""
  if jax.default_backend() != "gpu":
    return True  # Lowering is for another machine, and its business.
  return jax.devices()[0].compute_capability == "9.0"


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
  splits: int | None = None,
  interpret: Any = None,
) -> tuple[jax.Array, Paged, Mass | None]:
  """Shapes as in api.py.

  Args:
    splits: thread blocks that share a KV head's blocks; by default enough for all SMs.
    interpret: a `plgpu.InterpretGPUParams` runs on any device (jax 0.11.2 and newer).

  Raises:
    NotImplementedError: what `supports` refuses.
  """
  b, _, n, h = q.shape
  kv_heads = k.shape[2]
  if not supports(cache, n // kv_heads):
    raise NotImplementedError(
      f"The Hopper kernel reads codes in layout 'rows' in groups of a multiple of 16, heads of "
      f"{HEAD_DIMS}, blocks that divide {SLOTS} or are a multiple of it, at most {ROWS} query "
      f"heads a KV head; got keys in {cache.key_pages.format}, values in "
      f"{cache.value_pages.format}, in layout '{cache.key_pages.layout}', heads of {h}, blocks of "
      f"{cache.block_size}, {n // kv_heads} query heads a KV head, or a GPU that is no Hopper."
    )
  cache = append(k, v, cache, length, active, layer)
  query = q.astype(jnp.float32).reshape(b, kv_heads, -1, h) * h**-0.5
  pages = _paged(query, cache, layer, active, scores, splits, interpret)
  out, mass = join(query, pages, cache, length, spilled, active, layer)
  return out, cache, mass


def _paged(
  query: jax.Array,
  cache: Paged,
  layer: int,
  active: jax.Array,
  scores: bool,
  splits: int | None,
  interpret: Any,
) -> Partial:
  """The pages' part of the softmax for scaled queries [B, K, R, H]."""
  (b, kv_heads, r, h), bs = query.shape, cache.block_size
  table, live = cache.block_table[layer], live_paged(cache, layer, active)
  # Tables and what is gathered through them, to whole tiles; block 0 is dead.
  wide = -table.shape[1] % max(1, SLOTS // bs)
  table, live = jnp.pad(table, ((0, 0), (0, wide))), jnp.pad(live, ((0, 0), (0, wide), (0, 0)))
  slots = table.shape[1] * bs
  tiles = -(-jnp.where(active, cache.num_blocks[layer], 0) * bs // SLOTS)
  keys, values = cache.key_pages, cache.value_pages
  plan = Plan(
    splits=splits or min(slots // SLOTS, max(1, -(-2 * _SMS // (b * kv_heads)))),
    rows=r + -r % 8,
    kv_heads=kv_heads,
    head_dim=h,
    block_size=bs,
    key=keys.format,
    value=values.format,
  )
  inputs = Inputs(
    table,
    tiles.astype(jnp.int32),
    *_queries(query, keys, plan.rows),
    jnp.where(live, 0.0, NONE).reshape(b, slots),
    *(_side(pages, table, live) for pages in (keys, values)),
  )
  o, top, total, *logits = mosaic_gpu_kernel.call(inputs, plan, scores, interpret)
  shape = (b, kv_heads, plan.splits)
  parts = (a.reshape(*shape, *a.shape[2:]) for a in (o, top[..., None], total[..., None]))
  out = merge(Partial(*(a[..., :r, :] for a in parts)), axis=2)
  if scores:
    seen = logits[0].reshape(b, kv_heads, plan.rows, slots)[:, :, :r, : slots - wide * bs]
    out = out._replace(logits=seen)
  return out


def _queries(query: jax.Array, keys: Pages, rows: int) -> tuple[jax.Array, jax.Array]:
  """Queries as two bfloat16 that add up to them, and their sums over the keys' groups.

  Returns:
    bfloat16[B * K, 2, rows, H] and float32[B * K, G, ROWS].
  """
  b, kv_heads, r, h = query.shape
  query = query.reshape(b * kv_heads, r, h)
  sums = query.reshape(b * kv_heads, r, keys.format.groups(h), -1).sum(-1).swapaxes(1, 2)
  high = jax.lax.reduce_precision(query, exponent_bits=8, mantissa_bits=7)
  pieces = jnp.stack([high, query - high], axis=1).astype(jnp.bfloat16)
  pad = [(0, 0), (0, 0)]
  return jnp.pad(pieces, [*pad, (0, rows - r), (0, 0)]), jnp.pad(sums, [*pad, (0, ROWS - r)])


def _side(pages: Pages, table: jax.Array, live: jax.Array) -> Side:
  """A slot that holds no token may have NaN for a scale, and 0 * NaN is NaN: it gets 0."""

  def gather(a: jax.Array | None) -> jax.Array | None:
    if a is None:
      return None
    found = jnp.where(live[:, :, None, :, None], a[table], 0)  # [B, P, K, bs, G]
    b, blocks, kv_heads, bs, groups = found.shape
    return found.transpose(0, 2, 4, 1, 3).reshape(b * kv_heads, groups, blocks * bs)

  return Side(pages.codes, gather(pages.scale), gather(pages.minimum))
