"""Attention over the dense cache for Hopper GPUs (Pallas, Mosaic GPU): scores stay on the chip.

A thread block has 128 queries, which are tokens times the query heads that share a KV head, 64 for
each of two warpgroups; a third one brings tiles of slots (TMA), up to the last that any of these
queries sees. Both products are `wgmma`'s, of 16 bits, with the probabilities as an operand in
registers; the softmax is online (arXiv:1805.02867, arXiv:2205.14135). Only tiles with slots that
some query must not see are masked, and values of slots that were never written are overwritten.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

HEAD_DIMS = (64, 128)
SLOTS = 128  # of a tile
_DTYPES = (jnp.float16, jnp.bfloat16)
_WARPGROUPS = 2
_QUERIES = 64  # of a warpgroup: the rows of a `wgmma`
_STAGES = 2  # tiles in flight
_NONE = -1e30  # the logit of a slot that is not seen
_LOG2_E = 1.4426950408889634

_LAYOUT, _EACH_ROW = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)


def supports(head_dim: int, slots: int, dtype: jnp.dtype) -> bool:
  """Whether the kernel takes a cache [..., S, H] of this type, and the GPU, if there is one, has
  `wgmma`.
  """
  fits = head_dim in HEAD_DIMS and slots % SLOTS == 0 and dtype in _DTYPES
  return fits and _may_be_hopper()


def _may_be_hopper() -> bool:
  """Whether this process may compile for compute capability 9.0, the only one with `wgmma`."""
  if jax.default_backend() != "gpu":
    return True  # Lowering is for another machine, and its business.
  return jax.devices()[0].compute_capability == "9.0"


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
  interpret: Any = None,
) -> jax.Array:
  """See kernel.py; products take the cache's type and add in float32, as the softmax does.

  Args:
    interpret: a `plgpu.InterpretGPUParams` runs on any device (jax 0.11.2 and newer).

  Raises:
    NotImplementedError: what `supports` refuses.
  """
  (b, t, n, h), (layers, _, kv_heads, slots, _) = q.shape, k.shape
  if not supports(h, slots, k.dtype):
    raise NotImplementedError(
      f"The Hopper kernel takes heads of {HEAD_DIMS}, a multiple of {SLOTS} slots and a cache in "
      f"float16 or bfloat16; got heads of {h}, {slots} slots and {k.dtype}, or a GPU that is no "
      "Hopper."
    )
  heads, block = n // kv_heads, _WARPGROUPS * _QUERIES
  # Query row t * R + r of a KV head: token t, head r.
  query = (
    (q.astype(jnp.float32) * (h**-0.5 * _LOG2_E)).astype(k.dtype).reshape(b, t, kv_heads, heads, h)
  )
  query = query.swapaxes(1, 2).reshape(b * kv_heads, t * heads, h)
  query = jnp.pad(query, ((0, 0), (0, -t * heads % block), (0, 0)))
  k, v = (a.reshape(layers * b * kv_heads, slots, h) for a in (k, v))
  scratch: list[Any] = [
    plgpu.SMEM((_WARPGROUPS, _QUERIES, h), k.dtype, transforms=_SWIZZLED),
    plgpu.Barrier(num_barriers=_WARPGROUPS),
    plgpu.Barrier(num_arrivals=_WARPGROUPS),
  ]
  options = {}
  if interpret is not None:  # which multiplies from shared memory only
    scratch.append(plgpu.SMEM((_WARPGROUPS, _QUERIES, SLOTS), k.dtype))
    options = {"interpret": interpret}

  def kernel(*refs: Any) -> None:
    _Body(heads, kv_heads, b, *refs).run()

  out = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(query.shape, jnp.float32),
    scratch_types=scratch,
    grid=(query.shape[1] // block, b * kv_heads),
    grid_names=("tile", "row"),
    num_threads=_WARPGROUPS + 1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(approx_math=True),
    **options,
  )(jnp.full(1, layer, jnp.int32), start, length, query, k, v)
  out = out[:, : t * heads].reshape(b, kv_heads, t, heads, h)
  return out.swapaxes(1, 2).reshape(b, t, n, h)


_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


class _Body:
  """What a thread block does: references to memory, and where its queries stand."""

  def __init__(
    self,
    heads: int,
    kv_heads: int,
    batch: int,
    layer: Any,  # int32[1]
    start: Any,  # int32[B]
    length: Any,  # int32[B]
    q: Any,  # [B * K, rows, H]
    k: Any,  # [L * B * K, S, H]
    v: Any,
    out: Any,  # float32[B * K, rows, H]
    q_smem: Any,  # [_WARPGROUPS, _QUERIES, H]
    q_came: Any,  # barriers
    cleaned: Any,
    p_smem: Any = None,  # [_WARPGROUPS, _QUERIES, SLOTS]
  ) -> None:
    self._row, self._warpgroup = lax.axis_index("row"), lax.axis_index("warpgroup")
    sequence = lax.div(self._row, jnp.int32(kv_heads))
    self._heads, self._start, self._length = heads, start[sequence], length[sequence]
    self._end = self._start + self._length
    self._first = lax.axis_index("tile") * (_WARPGROUPS * _QUERIES)  # query row
    self._own = self._first + self._warpgroup * _QUERIES  # of this warpgroup
    at = layer[0] * (batch * kv_heads) + self._row
    self._q, self._k, self._v, self._out = q, k.at[at], v.at[at], out
    self._q_smem, self._q_came, self._cleaned = q_smem.at[self._warpgroup], q_came, cleaned
    self._p_smem = None if p_smem is None else p_smem.at[self._warpgroup]

  def run(self) -> None:
    h = self._q.shape[-1]
    spec = plgpu.BlockSpec((SLOTS, h), lambda i: (i, 0), transforms=_SWIZZLED)
    plgpu.emit_pipeline_warp_specialized(
      self._step,
      grid=(self._steps(),),
      memory_registers=40,
      in_specs=[spec, spec],
      wg_axis="warpgroup",
      num_compute_wgs=_WARPGROUPS,
      max_concurrent_steps=_STAGES,
      compute_context=self._compute,
    )(self._k, self._v)

  def _token(self, row: Any) -> Any:
    return lax.div(row, jnp.int32(self._heads))

  def _steps(self) -> jax.Array:
    """Tiles that this thread block's real tokens see."""
    token = self._token(self._first + (_WARPGROUPS * _QUERIES - 1))
    last = self._start + jnp.minimum(token + 1, self._length) - 1
    real = self._first < self._length * self._heads
    return jnp.where(real, lax.div(last, jnp.int32(SLOTS)) + 1, 0)

  def _compute(self, pipeline: Callable[[Any], Any]) -> None:
    h, came = self._q.shape[-1], self._q_came.at[self._warpgroup]
    rows = pl.ds(self._own, _QUERIES)
    plgpu.copy_gmem_to_smem(self._q.at[self._row, rows], self._q_smem, came)
    plgpu.barrier_wait(came)
    zero = _full((_QUERIES, h), 0.0, _LAYOUT)
    start = zero, _full((_QUERIES,), _NONE, _EACH_ROW), _full((_QUERIES,), 0.0, _EACH_ROW)
    sums, _, total = pipeline(start)
    row = plgpu.broadcasted_iota(jnp.int32, sums.shape, 0, layout=_LAYOUT) + self._own
    out = jnp.where(row < self._length * self._heads, sums / _down(total, h), 0.0)
    self._out[self._row, rows] = out

  def _step(self, indices: Any, k: Any, v: Any, carry: Any) -> Any:
    """One tile's part of the sums of p * value, largest logits and sums of p."""
    [tile], (sums, before, total) = indices, carry

    def products(acc: Any) -> jax.Array:
      plgpu.wgmma(acc, self._q_smem, k.T)
      return acc[...]

    logits = _accumulated(products, (_QUERIES, SLOTS))
    behind = (tile + 1) * SLOTS  # the first slot behind the tile
    whole = behind <= self._start + self._token(self._first) + 1  # The first token sees all.
    logits = lax.cond(whole, lambda x: x, partial(self._masked, tile * SLOTS), logits)
    pl.when(behind > self._end)(partial(self._clean, tile * SLOTS, v))
    top = jnp.maximum(before, logits.max(axis=1))
    p, fade = jnp.exp2(logits - _down(top, SLOTS)), jnp.exp2(before - top)
    total = total * fade + p.sum(axis=1)
    p = p.astype(v.dtype)
    if self._p_smem is not None:
      self._p_smem[...] = p
      plgpu.commit_smem()
      p = self._p_smem

    def weighted(acc: Any) -> jax.Array:
      plgpu.wgmma(acc, p, v)
      return acc[...]

    sums = sums * _down(fade, sums.shape[1]) + _accumulated(weighted, (_QUERIES, sums.shape[1]))
    # The next copies go by another path to memory (the async proxy), which must not overtake what
    # was read and cleaned.
    plgpu.commit_smem()
    return sums, top, total

  def _masked(self, first_slot: Any, logits: jax.Array) -> jax.Array:
    """Of query row t * R + r, slots up to start + t are seen: no need to divide."""
    row = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=_LAYOUT) + self._own
    slot = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=_LAYOUT)
    seen = (slot + (first_slot - self._start)) * self._heads <= row
    return jnp.where(seen, logits, _NONE)

  def _clean(self, first_slot: Any, v: Any) -> None:
    """Slots that were never written may hold anything, NaN included, and 0 * NaN is NaN.

    The warpgroups share the values: each cleans its half, and waits for the other.
    """
    rows = pl.ds(self._warpgroup * _QUERIES, _QUERIES)
    half = plgpu.layout_cast(v[rows, :], _LAYOUT)
    slot = plgpu.broadcasted_iota(jnp.int32, half.shape, 0, layout=_LAYOUT)
    written = slot + (first_slot + self._warpgroup * _QUERIES) < self._end
    v[rows, :] = jnp.where(written, half, jnp.zeros((), half.dtype))
    plgpu.commit_smem()
    plgpu.barrier_arrive(self._cleaned)
    plgpu.barrier_wait(self._cleaned)


def _accumulated(body: Callable[[Any], jax.Array], shape: tuple[int, int]) -> jax.Array:
  return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _down(rows: jax.Array, columns: int) -> jax.Array:
  """A value of each row, for every column."""
  return lax.broadcast_in_dim(rows, (rows.shape[0], columns), [0])
