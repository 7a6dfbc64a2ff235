"""One door to attention: plain causal attention, and attention over a contiguous KV cache."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from q4jax_kernels import ffi
from q4jax_kernels.attention import cpu, kernel, reference

# Keys and values of all layers, [L, B, K, S, H] each; slot s holds position s. One pair for the
# whole model: every array that passes the jit boundary costs time at each token (docs/adr/0006).
Cache = tuple[jax.Array, jax.Array]

IMPLEMENTATIONS = ("reference", "cpu", "pallas_tpu", "mosaic_gpu")


def causal_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, implementation: str | None = None
) -> jax.Array:
  """Causal grouped-query attention, the queries being the last T of the S positions.

  Products take their operands in q's dtype, or bfloat16 in the TPU's kernel, and accumulate in
  float32, as does the softmax. The gradient, in reverse mode, is the reference's.

  Args:
    q: [B, T, N, H], N a multiple of K.
    k, v: [B, S, K, H] in q's dtype.
    implementation: one of IMPLEMENTATIONS but "cpu", which then runs or raises; None takes the
      device's kernel for bfloat16 and float16 where it has one, else the reference.

  Returns:
    [B, T, N, H] in q's dtype.

  Raises:
    ValueError: an unknown implementation.
    NotImplementedError: the named implementation does not take these heads or types.
  """
  _check(implementation, [name for name in IMPLEMENTATIONS if name != "cpu"])
  if implementation == "reference" or (implementation is None and q.dtype == jnp.float32):
    return reference.causal_attention(q, k, v)
  kernels = _kernels(q.shape, kernel.padded(k.shape[1]), q.dtype, implementation)
  branches = {
    platform: functools.partial(kernel.causal_attention, module.attend)
    for platform, module in kernels.items()
  }
  if implementation is not None:
    [attend] = branches.values()
    return attend(q, k, v)
  return jax.lax.platform_dependent(q, k, v, **branches, default=reference.causal_attention)


def cached_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache: Cache,
  start: jax.Array,
  length: jax.Array,
  layer: int,
  implementation: str | None = None,
) -> tuple[jax.Array, Cache]:
  """Appends keys and values to one layer of the cache, then attends causally to its filled slots.

  Args:
    q: float32[B, T, N, H], RoPE applied; k, v: float32[B, T, K, H], N a multiple of K.
    cache: keys and values [L, B, K, S, H] in float16, bfloat16 or float32; donated where possible.
    start: int32[B], slots already filled; the new tokens take slots start .. start + length - 1.
    length: int32[B], real tokens among the T; the rest is padding: not stored, output zero.
    layer: which of the L is appended to and read; the others stay as they are.
    implementation: one of IMPLEMENTATIONS, which then runs or raises; None takes the device's
      kernel where it has one for these heads and types (for GPUs if T > 1), else the reference,
      which is said once on a GPU or TPU. A process on a CPU looks for kernels for bfloat16 alone:
      to compile there for another device and type, name the kernel.

  Returns:
    float32[B, T, N, H] and the updated cache. start + length <= S is the caller's to ensure.

  Raises:
    ValueError: an unknown implementation.
    NotImplementedError: the named implementation does not take these heads or types.
  """
  _check(implementation)
  arguments, dtype = (q, k, v, cache, start, length), cache[0].dtype

  def bind(attend: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(attend, layer=layer)

  portable = bind(reference.cached_attention)
  if implementation == "reference":
    return portable(*arguments)
  branches, native = {}, _native(cache[0])
  if implementation == "cpu":
    if not native:
      raise NotImplementedError(
        f"'cpu' needs the native library and a cache in float16 or float32; got {dtype}."
      )
    return bind(cpu.cached_attention)(*arguments)
  if native and implementation is None:
    branches["cpu"] = bind(cpu.cached_attention)
  if implementation is not None or dtype == jnp.bfloat16 or jax.default_backend() != "cpu":
    kernels = _kernels(q.shape, cache[0].shape[3], dtype, implementation)
    branches |= {
      platform: bind(functools.partial(kernel.cached_attention, module.attend))
      for platform, module in kernels.items()
    }
  if implementation is not None:
    [attend] = branches.values()
    return attend(*arguments)
  if not branches:
    return portable(*arguments)
  return jax.lax.platform_dependent(*arguments, **branches, default=portable)


def scored_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache: Cache,
  mass: jax.Array,
  start: jax.Array,
  length: jax.Array,
  layer: int,
) -> tuple[jax.Array, Cache, jax.Array]:
  """`cached_attention`, which also adds up how much attention each slot gets.

  GPUs and TPUs run the reference, which has all scores of queries with slots at once.

  Args:
    mass: float32[L, B, K, S], donated where possible. To the layer's slots is added the softmax of
      all T queries, its mean over the query heads of the slot's KV head.

  Returns:
    float32[B, T, N, H], the updated cache, the updated mass.
  """
  arguments = (q, k, v, cache, mass, start, length)
  portable = functools.partial(reference.scored_attention, layer=layer)
  if not _native(cache[0]):
    return portable(*arguments)
  native = functools.partial(cpu.scored_attention, layer=layer)
  return jax.lax.platform_dependent(*arguments, cpu=native, default=portable)


def window_attention(
  q: jax.Array, k: jax.Array, seen: jax.Array, implementation: str | None = None
) -> jax.Array:
  """The probabilities themselves: what a few queries pay to every slot.

  Args:
    q: float[B, W, N, H], RoPE applied.
    k: float[B, K, S, H], N a multiple of K.
    seen: int32[B, W], query w sees slots 0 .. seen[w] - 1; it must not fall as w grows.
    implementation: "reference" or "cpu", which then runs or raises; None takes "cpu" on a CPU for
      keys in float16 and float32. GPUs and TPUs run the reference: the result, which is to be in
      memory whole, is W times as large as the keys' share of it, so a kernel had little to save.

  Returns:
    float32[B, N, W, S], softmax of q . k / sqrt(H) over the slots that are seen; 0 in the others.

  Raises:
    ValueError: an unknown implementation.
    NotImplementedError: "cpu" does not take keys of this type, or the library is not here.
  """
  _check(implementation, ("reference", "cpu"))
  native = _native(k)
  if implementation == "cpu":
    if not native:
      raise NotImplementedError(
        f"'cpu' needs the native library and keys in float16 or float32; got {k.dtype}."
      )
    return cpu.window_attention(q, k, seen)
  if implementation == "reference" or not native:
    return reference.window_attention(q, k, seen)
  return jax.lax.platform_dependent(
    q, k, seen, cpu=cpu.window_attention, default=reference.window_attention
  )


def _native(keys: jax.Array) -> bool:
  return keys.dtype in (jnp.float16, jnp.float32) and ffi.available()


def _check(implementation: str | None, names: Sequence[str] = IMPLEMENTATIONS) -> None:
  if implementation not in (None, *names):
    raise ValueError(f"implementation '{implementation}' is not one of {', '.join(names)}.")


def _kernels(
  q: tuple[int, ...], slots: int, dtype: jnp.dtype, implementation: str | None
) -> dict[str, Any]:
  """The named kernel's module, or those that take q of this shape and such a cache, by platform."""
  from q4jax_kernels.attention import mosaic_gpu, pallas_tpu  # Pallas is slow to import.

  modules = {"tpu": pallas_tpu, "cuda": mosaic_gpu}
  if implementation is not None:
    return {p: m for p, m in modules.items() if m.__name__.endswith(implementation)}
  takes = {p: m for p, m in modules.items() if m.supports(q[3], slots, dtype)}
  here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
  if here in modules and here not in takes:
    _say_reference(here, q[3], slots, str(dtype))
  if q[1] == 1:  # One tile of queries a KV head would leave most of a GPU idle.
    takes.pop("cuda", None)
  return takes


@functools.cache
def _say_reference(platform: str, head_dim: int, slots: int, dtype: str) -> None:
  warnings.warn(
    f"q4jax: there is no attention kernel for heads of {head_dim}, {slots} slots and {dtype} on "
    f"this {platform} device; XLA computes all scores of queries with slots at once.",
    stacklevel=2,
  )
