"""The TPU kernel in interpret mode, against float64 sums over weights that it did not dequantise.

With groups' sums scaled, the result is exact but for float32's rounding of sums; with weights
scaled, each is rounded to bfloat16 once, by at most 2^-9 of itself. x is bfloat16 on both sides.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import random_blocks
from q4_weights import numpy_weights, random_q4
from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.int4_matmul import pallas_tpu
from q4jax_kernels.int4_matmul.pallas_tpu import Config
from q4jax_kernels.int4_matmul.pallas_tpu_chunk import Law
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.q4_array import Q4Array

FORMATS = ("q4_0", "q4_1", "q4_k", "q5_k", "q6_k", "q8_0")
SUMS, WEIGHTS = 2e-6, 2**-9 + 2e-6  # of the sum of magnitudes
SMALL = Config(block_m=16, block_n=128, block_k=256)


def from_blocks(format: str, n: int, k: int, seed: int = 0) -> tuple[PlanarArray, np.ndarray]:
  rows = random_blocks.random_rows(np.random.default_rng(seed), format, n, k)
  planar = PlanarArray.from_blocks(BlockArray(jnp.asarray(rows), format, n))
  return planar, random_blocks.dequantize(rows, format)


def from_q4(group: int | str, symmetric: bool, n: int, k: int) -> tuple[PlanarArray, np.ndarray]:
  w = random_q4(np.random.default_rng(1), n, k, group, symmetric)
  return PlanarArray.from_q4(w), numpy_weights(w)


def draw(m: int, k: int) -> np.ndarray:
  """x that bfloat16 holds, as float32."""
  x = np.random.default_rng(m).normal(0, 1, (m, k))
  return x.astype(jnp.bfloat16).astype(np.float32)


def check(
  x: np.ndarray,
  w: PlanarArray,
  weights: np.ndarray,
  config: Config | None = None,
  interpret: bool | pltpu.InterpretParams = True,
) -> str:
  """Asserts the bound; returns which of the two ways it was."""
  [y] = pallas_tpu.int4_matmul(jnp.asarray(x), [w], config, interpret)
  exact = x.astype(np.float64) @ weights.T.astype(np.float64)
  size = np.abs(x).astype(np.float64) @ np.abs(weights.T).astype(np.float64)
  config = config or Config.choose(pallas_tpu._padded_rows(len(x)), w, 4)
  way = "sums" if Law.of(w).on_sums(config.block_m) else "weights"
  assert y.dtype == x.dtype and y.shape == exact.shape
  np.testing.assert_array_less(
    np.abs(np.asarray(y, np.float64) - exact) - {"sums": SUMS, "weights": WEIGHTS}[way] * size,
    1e-30,
  )
  return way


@pytest.mark.parametrize(("m", "way"), [(1, "sums"), (40, "weights")])
@pytest.mark.parametrize("format", FORMATS)
def test_formats(format: str, m: int, way: str) -> None:
  w, weights = from_blocks(format, 130, 512)
  assert check(draw(m, 512), w, weights) == way


@pytest.mark.parametrize(("m", "symmetric"), [(1, True), (24, False)])
@pytest.mark.parametrize("group", [8, 16, 32, 64, 128, 256, "row", "tensor"])
def test_groups(group: int | str, symmetric: bool, m: int) -> None:
  w, weights = from_q4(group, symmetric, 130, 512)
  check(draw(m, 512), w, weights)


# Between the two ways, tiles that end past M, N and K, and many steps of each.
@pytest.mark.parametrize("group", [16, 128, "row"])
@pytest.mark.parametrize("m", [3, 35])
def test_tiles(m: int, group: int | str) -> None:
  config = dataclasses.replace(SMALL, block_m=8 if m < 8 else 16, block_k=1024)
  w, weights = from_q4(group, False, 300, 2432)
  check(draw(m, 2432), w, weights, config)


@pytest.mark.parametrize("format", ["q4_k", "q6_k"])
def test_tiles_of_super_blocks(format: str) -> None:
  w, weights = from_blocks(format, 130, 2048 + 768)
  check(draw(2, 2048 + 768), w, weights)


@pytest.mark.parametrize(("group", "k"), [(8, 24), (32, 32), (32, 288), (64, 576), ("row", 6)])
def test_k_of_no_whole_chunk(group: int | str, k: int) -> None:
  w, weights = from_q4(group, False, 5, k)
  check(draw(2, k), w, weights)


def test_one_super_block() -> None:
  w, weights = from_blocks("q5_k", 7, 256)
  check(draw(1, 256), w, weights)


@pytest.mark.parametrize(("m", "group"), [(2, 32), (32, 16), (2, "row")])
def test_as_a_tpu_would(m: int, group: int | str, capfd: pytest.CaptureFixture) -> None:
  """With buffers, copies and memory that starts as NaN simulated, races looked for."""
  w, weights = from_q4(group, False, 200, 800)
  config = dataclasses.replace(SMALL, block_m=8 if m < 8 else 16)
  simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  check(draw(m, 800), w, weights, config, simulated)
  assert "RACE DETECTED" not in capfd.readouterr().out


def test_x_is_rounded_to_bfloat16() -> None:
  w, _ = from_blocks("q4_k", 16, 256)
  x = jax.random.normal(jax.random.key(0), (2, 256))
  [y] = pallas_tpu.int4_matmul(x, [w], interpret=True)
  [rounded] = pallas_tpu.int4_matmul(x.astype(jnp.bfloat16), [w], interpret=True)
  assert y.dtype == jnp.float32 and rounded.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y.astype(jnp.bfloat16), rounded)


def test_several_weights_under_jit() -> None:
  (a, a_weights), (b, b_weights) = from_blocks("q4_k", 16, 256), from_blocks("q6_k", 40, 256)
  x = draw(3, 256)
  ys = jax.jit(lambda x, *ws: pallas_tpu.int4_matmul(x, ws, interpret=True))(x, a, b)
  for y, weights in zip(ys, (a_weights, b_weights), strict=True):
    np.testing.assert_allclose(y, x @ weights.T, atol=1e-5 * np.abs(x @ weights.T).max())


@pytest.mark.parametrize("m", [2, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_stays_in_its_row(bad: float, m: int) -> None:
  w, _ = from_blocks("q4_0", 16, 512)
  x = draw(m, 512)
  x[1, 300] = bad
  [y] = pallas_tpu.int4_matmul(jnp.asarray(x), [w], interpret=True)
  finite = np.isfinite(np.asarray(y))
  assert not finite[1].any() and finite[0].all() and finite[2:].all()


def test_no_rows() -> None:
  w, _ = from_blocks("q4_0", 16, 64)
  [y] = pallas_tpu.int4_matmul(jnp.zeros((0, 64), jnp.bfloat16), [w])
  assert y.shape == (0, 16) and y.dtype == jnp.bfloat16


def test_refuses_other_groups() -> None:
  w, _ = from_q4(48, True, 8, 96)
  assert not pallas_tpu.supports(w)
  with pytest.raises(NotImplementedError, match="groups of 48"):
    pallas_tpu.int4_matmul(jnp.zeros((1, 96)), [w], interpret=True)


@pytest.mark.parametrize("config", [Config(1, 100, 256), Config(1, 128, 128), Config(8, 128, 256)])
def test_refuses_tiles_that_cut_the_memorys(config: Config) -> None:
  w, _ = from_blocks("q4_k", 16, 512)
  with pytest.raises(NotImplementedError, match="cuts a tile"):
    pallas_tpu.int4_matmul(jnp.zeros((1, 512)), [w], config, interpret=True)


@pytest.mark.parametrize("group", [8, 32, 128, "row"])
@pytest.mark.parametrize("m", [1, 8, 512, 2048])
def test_tiles_fit_the_memory(m: int, group: int | str) -> None:
  n, k = 14336, 4096
  groups = 1 if group == "row" else k // int(group)
  scale = jax.ShapeDtypeStruct((n, groups), jnp.float16)
  q4 = Q4Array(jax.ShapeDtypeStruct((n, k // 2), jnp.uint8), scale, scale)
  w = jax.eval_shape(PlanarArray.from_q4, q4)
  config = Config.choose(m, w, 4)
  assert config.vmem_bytes(w, 4) <= pallas_tpu._VMEM_BUDGET
  assert config.block_k == 2048 and config.block_n >= 512
