"""Attention over the dense cache at the shapes of Llama 3, through the compilers of TPU and GPU."""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from aot.devices import device, figures, float_sizes, on
from q4jax_kernels.attention import cached_attention, causal_attention, reference

LAYERS = 2
HEADS = {"8B": (32, 8, 128), "1B": (32, 8, 64), "Gemma's": (8, 4, 256)}  # heads, KV heads, dims
TPU = partial(cached_attention, layer=1, implementation="pallas_tpu")
VMEM = 32 << 20  # what the compiler allows on v6e, for its own fusions too


def arguments(model: str, b: int, t: int, s: int, dtype: str) -> tuple:
  n, kv_heads, h = HEADS[model]
  q, k = (jax.ShapeDtypeStruct((b, t, heads, h), jnp.float32) for heads in (n, kv_heads))
  side = jax.ShapeDtypeStruct((LAYERS, b, kv_heads, s, h), dtype)
  row = jax.ShapeDtypeStruct((b,), jnp.int32)
  return q, k, k, (side, side), row, row


def compile_for(target: str, attend: Callable, arguments: tuple) -> jax.stages.Compiled:
  return jax.jit(attend, donate_argnums=3).lower(*on(arguments, target)).compile()


def copies(compiled: jax.stages.Compiled, side: jax.ShapeDtypeStruct) -> list[str]:
  """Instructions that make an array of a cache's or a layer's size, but for writing tokens."""
  sizes = "|".join(",".join(map(str, shape)) for shape in (side.shape, side.shape[1:]))
  found = re.findall(rf"= \w+\[(?:{sizes})\]\S* ([\w-]+)\(", compiled.as_text())
  return [
    op
    for op in found
    if op not in ("parameter", "dynamic-update-slice", "bitcast", "get-tuple-element")
  ]


@pytest.mark.parametrize(
  ("model", "b", "t", "s", "dtype"),
  [
    ("8B", 1, 512, 32768, "bfloat16"),
    ("8B", 1, 1, 32768, "bfloat16"),
    ("8B", 1, 512, 32768, "float32"),
    ("1B", 8, 512, 8192, "bfloat16"),
    ("1B", 8, 1, 8192, "bfloat16"),
    ("8B", 8, 1, 8192, "bfloat16"),
    ("1B", 3, 100, 40960, "bfloat16"),
    ("Gemma's", 1, 512, 32768, "bfloat16"),
  ],
)
@pytest.mark.parametrize("tpu", ["v5e", "v6e"])
def test_tpu(
  tpu: str, model: str, b: int, t: int, s: int, dtype: str, record_property: Callable
) -> None:
  device(tpu)  # skips
  given = arguments(model, b, t, s, dtype)
  compiled = compile_for(tpu, TPU, given)
  found = figures(compiled)
  assert "flash_attention" in compiled.as_text()
  assert not copies(compiled, given[3][0])
  assert b * HEADS[model][0] * t * s not in float_sizes(compiled), "a matrix of scores"
  assert 0 < found["vmem"] <= VMEM
  row = {"TPU": tpu, "model": model, "B": b, "T": t, "S": s, "cache": dtype}
  record_property("aot", row | {n: found[n] for n in ("vmem", "temp", "code", "flops", "bytes")})


def test_tpu_float16() -> None:
  """Of which Mosaic has none: XLA converts a layer, no more."""
  device("v6e")  # skips
  given = arguments("8B", 1, 512, 32768, "float16")
  compiled = compile_for("v6e", TPU, given)
  side = given[3][0]
  assert compiled.memory_analysis().temp_size_in_bytes <= 2 * 2 * side.size // LAYERS + (32 << 20)


def test_sees_scores_and_copies() -> None:
  """What the tests above look for is found where it is."""
  device("v6e")  # skips
  given = arguments("8B", 1, 512, 32768, "bfloat16")
  compiled = compile_for("v6e", partial(reference.cached_attention, layer=1), given)
  assert 32 * 512 * 32768 in float_sizes(compiled)
  assert copies(compiled, given[3][0])


@pytest.mark.parametrize(("target", "kernel_name"), [("v6e", "flash_attention")])
def test_door(target: str, kernel_name: str) -> None:
  """Lowered for a device, the door takes its kernel by itself; with gradients too."""
  device(target)  # skips
  given = arguments("1B", 1, 64, 768, "bfloat16")
  compiled = compile_for(target, partial(cached_attention, layer=1), given)
  assert kernel_name in compiled.as_text()
  q, k = (jax.ShapeDtypeStruct(a.shape, jnp.bfloat16) for a in given[:2])
  plain = jax.jit(jax.value_and_grad(lambda *qkv: causal_attention(*qkv).sum(dtype=jnp.float32)))
  assert kernel_name in plain.lower(*on((q, k, k), target)).compile().as_text()
