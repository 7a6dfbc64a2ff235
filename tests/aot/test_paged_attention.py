"""Paged attention at the shapes of Llama 3, through the compilers of the TPU and of the GPU."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from aot.devices import device, figures, float_sizes, on
from q4jax_kernels.kv_format import KVFormat
from q4jax_kernels.kv_pages import Pages
from q4jax_kernels.paged_attention import Paged, decode_attention, mosaic_gpu, pallas_tpu, reference

LAYERS, SINK, RECENT, BLOCKS = 2, 4, 64, 1024
HEADS = {"8B": (32, 8, 128), "1B": (32, 8, 64)}  # query heads, KV heads, head_dim
SPILLS = 352  # bytes of a thread whose 255 registers do not do: as it is, not as it should be
VMEM = 32 << 20  # what the compiler allows on v6e, for its own fusions too


def arguments(model: str, key: KVFormat, value: KVFormat, b: int, bs: int = 32) -> tuple:
  """Of a step: b sequences that share a pool of BLOCKS blocks."""
  n, kv_heads, h = HEADS[model]
  row = jax.ShapeDtypeStruct((b,), jnp.int32)
  make = partial(Pages.zeros, BLOCKS, kv_heads, h, block_size=bs)
  dense = jax.ShapeDtypeStruct((LAYERS, b, kv_heads, SINK + RECENT + bs, h), jnp.float16)
  cache = Paged(
    dense,
    dense,
    jax.eval_shape(lambda: make(key, kind="key")),
    jax.eval_shape(lambda: make(value, kind="value")),
    jax.ShapeDtypeStruct((BLOCKS, bs), jnp.int32),
    jax.ShapeDtypeStruct((LAYERS, b, BLOCKS // b), jnp.int32),
    jax.ShapeDtypeStruct((LAYERS, b), jnp.int32),
    SINK,
    RECENT,
  )
  q, k = (jax.ShapeDtypeStruct((b, 1, heads, h), jnp.float32) for heads in (n, kv_heads))
  return q, k, k, cache, row, row, jax.ShapeDtypeStruct((b,), jnp.bool_)


def compile_for(target: str, attend: Callable, arguments: tuple) -> jax.stages.Compiled:
  return jax.jit(attend, donate_argnums=3).lower(*on(arguments, target)).compile()


@pytest.mark.parametrize(
  ("model", "key", "value", "b", "bs", "scores"),
  [
    ("8B", KVFormat(4, 32), KVFormat(4, 32), 1, 32, True),
    ("1B", KVFormat(8, 32), KVFormat(4, 32), 8, 32, False),
    ("8B", KVFormat(4, 8), KVFormat(4, 128), 2, 64, False),
    ("1B", KVFormat(4), KVFormat(8, symmetric=True), 4, 16, True),
    ("1B", KVFormat(4, 32), KVFormat(4, 8, symmetric=True), 1, 128, False),
  ],
)
@pytest.mark.parametrize("tpu", ["v5e", "v6e"])
def test_shapes(
  tpu: str,
  model: str,
  key: KVFormat,
  value: KVFormat,
  b: int,
  bs: int,
  scores: bool,
  record_property: Callable,
) -> None:
  device(tpu)  # skips
  step = partial(pallas_tpu.decode_attention, layer=1, scores=scores)
  compiled = compile_for(tpu, step, arguments(model, key, value, b, bs))
  _, kv_heads, h = HEADS[model]
  found = figures(compiled)
  assert "paged_attention" in compiled.as_text()
  assert max(float_sizes(compiled)) < BLOCKS * kv_heads * bs * h, "a float copy of the pages"
  assert 0 < found["vmem"] <= VMEM
  row = {"TPU": tpu, "model": model, "B": b, "bs": bs, "key": key.bits, "value": value.bits}
  row |= {"groups": f"{key.group_size}, {value.group_size}", "scores": scores}
  record_property("aot", row | {n: found[n] for n in ("vmem", "temp", "code", "flops", "bytes")})


def test_sees_a_float_copy() -> None:
  """What the test above looks for is found where it is."""
  key = KVFormat(4, 32)
  step = partial(reference.decode_attention, layer=1, scores=False)
  compiled = compile_for("v5e", step, arguments("8B", key, key, 1))
  assert max(float_sizes(compiled)) >= BLOCKS * 8 * 32 * 128


@pytest.mark.parametrize(
  ("model", "key", "value", "b", "bs", "scores"),
  [
    ("8B", KVFormat(4, 32), KVFormat(4, 32), 1, 32, False),
    ("8B", KVFormat(8, 32), KVFormat(4), 8, 64, False),
    ("8B", KVFormat(8), KVFormat(8, symmetric=True), 1, 128, True),
    ("1B", KVFormat(4), KVFormat(8, 16, symmetric=True), 4, 16, True),
    ("1B", KVFormat(4, 16), KVFormat(4, 64), 1, 32, False),
  ],
)
def test_hopper(
  model: str,
  key: KVFormat,
  value: KVFormat,
  b: int,
  bs: int,
  scores: bool,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  record_property: Callable,
) -> None:
  """Down to ptxas: few registers are spilled, and no float copy of the pages is made."""
  device("h200")  # skips
  monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  step = partial(mosaic_gpu.decode_attention, layer=1, scores=scores)
  compiled = compile_for("h200", step, arguments(model, key, value, b, bs))
  [ptxas] = tmp_path.glob("*.ptxas")
  said = ptxas.read_text()
  spills = [int(count) for count in re.findall(r"(\d+) bytes spill", said)]
  assert max(spills, default=0) <= SPILLS, said
  assert "serialized" not in said, said
  _, kv_heads, h = HEADS[model]
  assert max(float_sizes(compiled)) < BLOCKS * kv_heads * bs * h, "a float copy of the pages"
  row = {"GPU": "h200", "model": model, "B": b, "bs": bs, "key": key.bits, "value": value.bits}
  row |= {"groups": f"{key.group_size}, {value.group_size}", "scores": scores}
  row["registers"] = int(re.findall(r"Used (\d+) registers", said)[-1])
  row["spilled bytes"] = max(spills, default=0)
  record_property("aot", row | {"temp": compiled.memory_analysis().temp_size_in_bytes})


@pytest.mark.parametrize(("target", "kernel"), [("v6e", "paged_attention"), ("h200", "mosaic_gpu")])
def test_door(target: str, kernel: str) -> None:
  """Lowered for a device, the door takes its kernel by itself."""
  device(target)  # skips
  step = partial(decode_attention, layer=1, scores=False)
  compiled = compile_for(target, step, arguments("1B", KVFormat(4), KVFormat(4), 1))
  assert kernel in compiled.as_text()
