"""The Hopper kernel at the shapes of Llama 3, down to ptxas; what other GPUs get. Nothing runs.

ptxas says how many registers a thread has, what it spilled, and whether it had to make products
wait for each other; the PTX shows `wgmma`.
"""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from aot.devices import device, float_sizes, on
from aot.weights import blocks, q4
from q4jax_kernels.int4_matmul import int4_matmul, mosaic_gpu, xla
from q4jax_kernels.int4_matmul.mosaic_gpu import Config
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.row_planar_array import RowPlanarArray

ROWS = (1, 16, 512, 2048)  # up to 8 tokens, which is one kernel; a batch; prompts
SHAPES = {  # K, N
  "8B gate": (4096, 14336),
  "8B down": (14336, 4096),
  "8B head": (4096, 128256),
  "1B gate": (2048, 8192),
  "1B down": (8192, 2048),
  "1B k, v": (2048, 512),
}


@pytest.fixture
def dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """A folder for what Mosaic compiles. It does not compile, nor dump, the same kernel twice."""
  monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  return tmp_path


def compile_for(gpu: str, matmul: Callable, m: int, w: object) -> jax.stages.Compiled:
  x = jax.ShapeDtypeStruct((m, w.shape[1]), jnp.float32)
  return jax.jit(lambda x, w: matmul(x, [w])[0]).lower(*on((x, w), gpu)).compile()


def check(
  name: str, format: str, m: int, planar: PlanarArray, dumps: Path, record: Callable
) -> None:
  device("h200")  # skips
  w = jax.eval_shape(RowPlanarArray.from_planar, planar)
  config, (n, k) = Config.choose(m, w), w.shape
  compiled = compile_for("h200", mosaic_gpu.int4_matmul, m, w)
  memory = compiled.memory_analysis()
  [ptx], [ptxas] = dumps.glob("*.ptx"), dumps.glob("*.ptxas")
  said, products = ptxas.read_text(), ptx.read_text().count("wgmma.mma_async")
  spills = [int(count) for count in re.findall(r"(\d+) bytes spill", said)]
  assert products >= config.block_k // 64
  assert spills and not any(spills), said
  assert "serialized" not in said, said
  assert "sm_90a" in said
  # Arguments are the packed weight and x; beside them only x in bfloat16, its sums, and splits.
  padded = -(-m // config.block_m) * config.block_m
  assert memory.argument_size_in_bytes <= w.nbytes + 4 * m * k + 4096
  assert memory.temp_size_in_bytes <= padded * (4 * config.splits * n + 4 * k) + (64 << 10)
  assert padded >= min(n, k) or max(float_sizes(compiled)) < n * k, "a float copy of the weight"
  figures = {
    "registers": re.search(r"Used (\d+) registers", said)[1],
    "spills": sum(spills),
    "stages": config.stages,
    "shared memory": config.stages * config.stage_bytes(w),
    "wgmma": products,
    "splits": config.splits,
    "blocks": n // config.block_n * padded // config.block_m * config.splits,
    "temp": memory.temp_size_in_bytes,
  }
  record("aot", {"GPU": "h200", "weight": name, "K": k, "N": n, "format": format, "M": m} | figures)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, m: int, dumps: Path, record_property: Callable) -> None:
  check(name, "q4_k", m, blocks("q4_k", *SHAPES[name]), dumps, record_property)


@pytest.mark.parametrize("m", (1, 16, 64, 512))
@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q5_k", "q6_k", "q8_0"])
def test_formats(format: str, m: int, dumps: Path, record_property: Callable) -> None:
  name = "8B down"
  check(name, format, m, blocks(format, *SHAPES[name]), dumps, record_property)


@pytest.mark.parametrize("m", (1, 32, 512))  # Kernels of their own: each is dumped but once.
@pytest.mark.parametrize("group_size", (16, 32, 64, 128, 256, None))
def test_groups(group_size: int | None, m: int, dumps: Path, record_property: Callable) -> None:
  name, symmetric = "1B down", group_size in (64, 256)
  format = f"groups of {group_size or 'K'}, {'symmetric' if symmetric else 'minimums'}"
  check(name, format, m, q4(group_size, symmetric, *SHAPES[name]), dumps, record_property)


def test_door() -> None:
  """Lowered for a GPU, the door takes the kernel by itself."""
  device("h200")  # skips
  w = jax.eval_shape(RowPlanarArray.from_planar, blocks("q4_k", 512, 256))
  compiled = compile_for("h200", int4_matmul, 1, w)
  assert "mosaic_gpu" in compiled.as_text()


@pytest.mark.parametrize("m", (1, 512))
@pytest.mark.parametrize("gpu", ("h200", "a100", "t4"))
def test_xla_elsewhere(gpu: str, m: int, record_property: Callable) -> None:
  """Other GPUs dequantise: it compiles, and makes the copy that the kernel does without."""
  name = "1B down"
  w = blocks("q4_k", *SHAPES[name])
  compiled = compile_for(gpu, xla.int4_matmul, m, w)
  temp = compiled.memory_analysis().temp_size_in_bytes
  assert temp >= 2 * w.shape[0] * w.shape[1] or m == 1
  record_property("aot", {"GPU": gpu, "weight": name, "path": "XLA", "M": m, "temp": temp})
