"""Attention over the dense cache at the shapes of Llama 3, through the compilers of TPU and GPU."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from aot.devices import device, figures, float_sizes, on
from q4jax_kernels.attention import cached_attention, causal_attention, reference

LAYERS = 2
HEADS = {"8B": (32, 8, 128), "1B": (32, 8, 64), "Gemma's": (8, 4, 256)}  # heads, KV heads, dims
TPU = partial(cached_attention, layer=1, implementation="pallas_tpu")
GPU = partial(cached_attention, layer=1, implementation="mosaic_gpu")
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
  found = re.findall(rf"(%\S+ = \w+\[(?:{sizes})\]\S* [\w-]+)\(", compiled.as_text())
  harmless = re.compile("dynamic.update.slice| (parameter|bitcast|get-tuple-element)$")
  return [made for made in found if not harmless.search(made)]


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


@pytest.mark.parametrize(
  ("model", "b", "t", "s", "dtype"),
  [
    ("8B", 1, 512, 32768, "bfloat16"),
    ("8B", 8, 512, 8192, "float16"),
    ("1B", 1, 512, 32768, "float16"),
    ("1B", 8, 64, 8192, "bfloat16"),
    ("8B", 3, 7, 40960, "bfloat16"),
  ],
)
def test_hopper(
  model: str,
  b: int,
  t: int,
  s: int,
  dtype: str,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  record_property: Callable,
) -> None:
  """Down to ptxas: no register is spilled, no product waits for another."""
  device("h200")  # skips
  monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  given = arguments(model, b, t, s, dtype)
  compiled = compile_for("h200", GPU, given)
  [ptx], [ptxas] = tmp_path.glob("*.ptx"), tmp_path.glob("*.ptxas")
  said, products = ptxas.read_text(), ptx.read_text().count("wgmma.mma_async")
  spills = [int(count) for count in re.findall(r"(\d+) bytes spill", said)]
  assert spills and not any(spills), said
  assert "serialized" not in said and "sm_90a" in said, said
  assert not copies(compiled, given[3][0])
  assert b * HEADS[model][0] * t * s not in float_sizes(compiled), "a matrix of scores"
  temp, (n, kv_heads, h) = compiled.memory_analysis().temp_size_in_bytes, HEADS[model]
  tiles = -(-t * n // kv_heads // 128)
  assert temp <= (2 + 4 + 4) * b * kv_heads * 128 * tiles * h + (1 << 20), "queries and outputs"
  row = {"GPU": "h200", "model": model, "B": b, "T": t, "S": s, "cache": dtype, "wgmma": products}
  row["registers"] = int(re.findall(r"Used (\d+) registers", said)[-1])
  row |= {"spills": sum(spills), "blocks": tiles * b * kv_heads, "temp": temp}
  record_property("aot", row)


@pytest.mark.parametrize(
  ("target", "kernel_name"), [("v6e", "flash_attention"), ("h200", "mosaic_gpu")]
)
def test_door(target: str, kernel_name: str) -> None:
  """Lowered for a device, the door takes its kernel by itself; with gradients too."""
  device(target)  # skips
  given, door = arguments("1B", 1, 64, 768, "bfloat16"), partial(cached_attention, layer=1)
  assert kernel_name in compile_for(target, door, given).as_text()
  q, k = (jax.ShapeDtypeStruct(a.shape, jnp.bfloat16) for a in given[:2])
  plain = jax.jit(jax.value_and_grad(lambda *qkv: causal_attention(*qkv).sum(dtype=jnp.float32)))
  assert kernel_name in plain.lower(*on((q, k, k), target)).compile().as_text()


def test_decoding_on_a_gpu_is_left_to_xla() -> None:
  """One query a head does not fill the tiles of `wgmma`, nor the GPU's thread blocks."""
  device("h200")  # skips
  given, door = arguments("1B", 1, 1, 768, "bfloat16"), partial(cached_attention, layer=1)
  assert "mosaic_gpu" not in compile_for("h200", door, given).as_text()
