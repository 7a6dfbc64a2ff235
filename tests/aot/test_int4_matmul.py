"""The TPU kernel at the shapes of Llama 3, through the TPU's own compiler. Nothing runs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from aot.devices import device, figures, float_sizes, on
from aot.weights import blocks, q4
from q4jax_kernels.int4_matmul import pallas_tpu
from q4jax_kernels.planar_array import PlanarArray

TPUS = ("v5e", "v6e")
ROWS = (1, 8, 512)  # one token, a small batch, a prompt
SHAPES = {  # K, N
  "8B gate": (4096, 14336),
  "8B down": (14336, 4096),
  "8B head": (4096, 128256),
  "1B gate": (2048, 8192),
  "1B down": (8192, 2048),
}
VMEM = 32 << 20  # the kernel's limit
TEMP = 64 << 10


def compile_for(tpu: str, matmul: Callable, m: int, w: PlanarArray) -> jax.stages.Compiled:
  x = jax.ShapeDtypeStruct((m, w.shape[1]), jnp.float32)
  return jax.jit(matmul).lower(*on((x, w), tpu)).compile()


def kernel(x: jax.Array, w: PlanarArray) -> jax.Array:
  return pallas_tpu.int4_matmul(x, [w])[0]


def check(tpu: str, name: str, format: str, m: int, w: PlanarArray, record: Callable) -> None:
  device(tpu)  # skips
  compiled = compile_for(tpu, kernel, m, w)
  n, k = w.shape
  found = figures(compiled)
  assert "int4_matmul" in compiled.as_text()
  assert max(float_sizes(compiled)) < n * k, "a float copy of the weight"
  assert found["temp"] <= TEMP
  assert 0 < found["vmem"] <= VMEM
  assert found["flops"] >= 2 * m * n * k
  assert found["bytes"] >= sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(w))
  row = {"TPU": tpu, "weight": name, "K": k, "N": n, "format": format, "M": m}
  record("aot", row | {key: found[key] for key in ("vmem", "temp", "code", "flops", "bytes")})


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tpu", TPUS)
def test_shapes(tpu: str, name: str, m: int, record_property: Callable) -> None:
  check(tpu, name, "q4_k", m, blocks("q4_k", *SHAPES[name]), record_property)


@pytest.mark.parametrize(("tpu", "m"), [("v5e", 1), ("v6e", 8), ("v5e", 512)])
@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q5_k", "q6_k", "q8_0"])
def test_formats(tpu: str, format: str, m: int, record_property: Callable) -> None:
  name = "1B down"
  check(tpu, name, format, m, blocks(format, *SHAPES[name]), record_property)


@pytest.mark.parametrize(("tpu", "m"), [("v5e", 1), ("v6e", 512)])
@pytest.mark.parametrize("group_size", (8, 16, 32, 64, 128, 256, None))
def test_groups(tpu: str, group_size: int | None, m: int, record_property: Callable) -> None:
  name = "1B down"
  symmetric = group_size in (8, 64, 256)
  format = f"groups of {group_size or 'K'}, {'symmetric' if symmetric else 'minimums'}"
  check(tpu, name, format, m, q4(group_size, symmetric, *SHAPES[name]), record_property)


@pytest.mark.parametrize(("m", "k", "n"), [(3, 288, 200), (700, 11008, 5000), (1, 64, 32)])
def test_ragged(m: int, k: int, n: int) -> None:
  compiled = compile_for("v5e", kernel, m, q4(32, False, k, n))
  assert "tpu_custom_call" in compiled.as_text()


def test_sees_a_float_copy() -> None:
  """What the other tests look for is found where it is."""
  w = blocks("q4_k", *SHAPES["1B down"])
  compiled = compile_for("v5e", lambda x, w: x @ w.dequantize().T, 8, w)
  assert max(float_sizes(compiled)) >= w.shape[0] * w.shape[1]
