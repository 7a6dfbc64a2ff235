"""The Hopper kernel in GPU interpret mode, looking for races, against float64 sums.

The weights of the sums are gguf-py's, or NumPy's loops. With groups' sums scaled, the result is
exact but for float32's rounding of sums; with weights scaled, each is rounded to bfloat16 once, by
at most 2^-9 of itself. x is bfloat16 on both sides.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import random_blocks
from q4_weights import numpy_weights, random_q4
from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.int4_matmul import mosaic_gpu
from q4jax_kernels.int4_matmul.mosaic_gpu import Config
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.row_planar_array import RowPlanarArray

FORMATS = ("q4_0", "q4_1", "q4_k", "q5_k", "q6_k", "q8_0")
SUMS, WEIGHTS = 2e-6, 2**-9 + 2e-6  # of the sum of magnitudes


@pytest.fixture
def interpret() -> Any:
  if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip(f"jax {jax.__version__} cannot interpret Mosaic GPU kernels; 0.11.2 can")
  return plgpu.InterpretGPUParams(detect_races=True)


def from_blocks(format: str, n: int, k: int) -> tuple[PlanarArray, np.ndarray]:
  rows = random_blocks.random_rows(np.random.default_rng(0), format, n, k)
  planar = PlanarArray.from_blocks(BlockArray(jnp.asarray(rows), format, n))
  return planar, random_blocks.dequantize(rows, format)


def from_q4(group: int | str, symmetric: bool, n: int, k: int) -> tuple[PlanarArray, np.ndarray]:
  w = random_q4(np.random.default_rng(1), n, k, group, symmetric)
  return PlanarArray.from_q4(w), numpy_weights(w)


def check(
  m: int, w: tuple[PlanarArray, np.ndarray], config: Config, interpret: Any, capsys: Any
) -> None:
  """Asserts the bound, and that no race was seen."""
  planar, weights = w
  x = np.random.default_rng(m).normal(0, 1, (m, weights.shape[1]))
  x = x.astype(jnp.bfloat16).astype(np.float32)
  rows = RowPlanarArray.from_planar(planar)
  [y] = mosaic_gpu.int4_matmul(jnp.asarray(x), [rows], config, interpret)
  exact = x.astype(np.float64) @ weights.T.astype(np.float64)
  size = np.abs(x).astype(np.float64) @ np.abs(weights.T).astype(np.float64)
  bound = SUMS if config.on_sums or rows.num_groups == 1 else WEIGHTS
  assert y.dtype == x.dtype and y.shape == exact.shape
  np.testing.assert_array_less(np.abs(np.asarray(y, np.float64) - exact), bound * size + 1e-30)
  assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize("format", FORMATS)
def test_sums(format: str, interpret: Any, capsys: pytest.CaptureFixture) -> None:
  check(3, from_blocks(format, 64, 256), Config(8, 1, 256, 1, 1, True), interpret, capsys)


@pytest.mark.parametrize("format", FORMATS)
def test_weights(format: str, interpret: Any, capsys: pytest.CaptureFixture) -> None:
  block_k = 256 if format in ("q5_k", "q6_k") else 64
  check(9, from_blocks(format, 64, 256), Config(16, 1, block_k, 1, 1, False), interpret, capsys)


@pytest.mark.parametrize("on_sums", [True, False])
def test_pipeline(on_sums: bool, interpret: Any, capsys: pytest.CaptureFixture) -> None:
  """Two warpgroups, blocks along N and M, and more steps than stages: slots are used again."""
  w = from_q4(64, False, 256, 64 * 6)
  config = Config(8, 2, 64, 2 if on_sums else 1, 2, on_sums)
  check(11, w, config, interpret, capsys)


@pytest.mark.parametrize("group", [16, 128, 256, "row", "tensor"])
def test_groups(group: int | str, interpret: Any, capsys: pytest.CaptureFixture) -> None:
  w = from_q4(group, group == 16, 64, 256)
  check(1, w, Config(8, 1, 256, 1, 1, True), interpret, capsys)


def test_no_rows() -> None:
  rows = RowPlanarArray.from_planar(from_q4(32, True, 64, 256)[0])
  [y] = mosaic_gpu.int4_matmul(jnp.zeros((0, 256)), [rows])
  assert y.shape == (0, 64)


@pytest.mark.parametrize(
  ("w", "takes"),
  [
    (from_q4(32, True, 64, 256), True),
    (from_q4(8, True, 64, 256), False),  # a product has 16 inputs
    (from_q4(32, True, 96, 256), False),  # and 64 outputs
    (from_q4(32, True, 64, 96), False),
    (from_q4("row", False, 64, 320), True),
  ],
)
def test_supports(w: tuple[PlanarArray, np.ndarray], takes: bool) -> None:
  rows = RowPlanarArray.from_planar(w[0])
  assert mosaic_gpu.supports(rows) == takes
  if not takes:
    with pytest.raises(NotImplementedError, match=rf"N = {rows.shape[0]}, K = {rows.shape[1]}"):
      mosaic_gpu.int4_matmul(jnp.zeros((1, rows.shape[1])), [rows])


@pytest.mark.parametrize("m", [1, 8, 16, 40, 64, 100, 512, 2048])
def test_configs_fit(m: int) -> None:
  """What is chosen cuts K and N evenly and fits the memory of a thread block."""
  for n, k in ((14336, 4096), (4096, 14336), (64, 64), (512, 2048), (192, 320)):
    scale = jax.ShapeDtypeStruct((k // 32, n), jnp.float16)
    codes = jax.ShapeDtypeStruct((n, k), jnp.int4)
    w = RowPlanarArray((codes,), scale, None, None, None, (4,), 8, "q4_0")
    config = Config.choose(m, w)
    assert n % config.block_n == 0 and k % (config.block_k * config.splits) == 0
    assert config.stages * config.stage_bytes(w) <= 227 << 10
    assert config.block_m >= min(m, 64) and config.on_sums == (m <= 64)
