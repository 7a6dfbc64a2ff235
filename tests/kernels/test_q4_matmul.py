"""Products with group-wise weights against float64, for every implementation that takes them.

The native kernels round x to int8 in blocks of 32 (groups up to 32) or 256 weights with
d = max|x| / 127, so |error| <= sum over blocks of (d / 2) * sum|w|. Where x is d times an integer
that rounding is exact, and only float32's is left.
"""

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from q4_weights import GROUP_SIZES, Q4_KINDS, numpy_weights, random_q4
from q4jax_kernels import ffi
from q4jax_kernels.block_array import block_shape
from q4jax_kernels.int4_matmul import dispatch, int4_matmul
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.q4_array import Q4Array
from q4jax_kernels.q4_blocks import to_blocks

CPU = ("cpu_scalar", "cpu_avx2", "cpu_avx512", "cpu_neon")
IMPLEMENTATIONS = ("reference", "xla", *CPU)
FLOAT32 = 2e-6  # of the sum of magnitudes


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
  return runnable(request.param)


@pytest.fixture(params=CPU)
def native(request: pytest.FixtureRequest) -> str:
  return runnable(request.param)


def runnable(implementation: str) -> str:
  isa = implementation.removeprefix("cpu_")
  if isa in ffi.ISA_IDS and ffi.isa_name(isa) is None:
    pytest.skip(f"this processor, or this build, has no {isa}")
  return implementation


def multiply(x: np.ndarray, ws: list[Q4Array], implementation: str) -> list[np.ndarray]:
  native = implementation.startswith("cpu")
  prepared = [to_blocks(w).tiles() if native else jax.tree.map(jnp.asarray, w) for w in ws]
  ys = jax.jit(int4_matmul, static_argnums=2)(x, prepared, implementation)
  return [np.asarray(y, np.float64) for y in ys]


def whole(rng: np.random.Generator, m: int, k: int) -> np.ndarray:
  """float32[m, k] that int8 holds exactly: integers times 1/64, 127 in every block of 32."""
  x = rng.integers(-127, 128, (m, k)).astype(np.float32)
  x[:, ::32] = 127
  return x / 64


def largest_weights(w: Q4Array) -> np.ndarray:
  """float64[N, K]: bounds every partial sum's weight, 15 |scale| + |minimum|."""
  factors = 15 * np.abs(np.asarray(w.scale, np.float64))
  if w.minimum is not None:
    factors = factors + np.abs(np.asarray(w.minimum, np.float64))
  n, k = w.shape
  return np.broadcast_to(np.repeat(factors, k // factors.shape[1], axis=1), (n, k))


def check_exact(x: np.ndarray, ws: list[Q4Array], implementation: str) -> None:
  """For x of `whole`: float32's rounding is all that may be off."""
  for y, w in zip(multiply(x, ws, implementation), ws, strict=True):
    expected = x.astype(np.float64) @ numpy_weights(w).astype(np.float64).T
    bound = FLOAT32 * np.abs(x.astype(np.float64)) @ largest_weights(w).T + 1e-37
    assert y.shape == expected.shape
    assert (np.abs(y - expected) <= bound).all(), (w.group_size, w.scale.dtype)


# Each shape compiles a program, so a failure is reported as it was found, not shrunk.
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_any_shape(implementation: str, data: st.DataObject) -> None:
  runnable(implementation)
  rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
  kind = st.sampled_from(Q4_KINDS)
  kinds = data.draw(st.lists(kind, min_size=1, max_size=4), "group, symmetric, dtype")
  # K of one group, or of several; a multiple of each group and of 32.
  k = max(32, *(kind[0] for kind in kinds if isinstance(kind[0], int)), 0)
  k *= data.draw(st.integers(1, 3), "groups")
  m = data.draw(st.sampled_from((0, 1, 2, 3, 4, 5, 9, 17)), "M")
  n = data.draw(st.sampled_from((1, 15, 16, 33)), "N")
  check_exact(whole(rng, m, k), [random_q4(rng, n, k, *kind) for kind in kinds], implementation)


@pytest.mark.parametrize("m", [1, 5])
def test_every_kind_in_one_call(implementation: str, m: int) -> None:
  rng = np.random.default_rng(1)
  ws = [random_q4(rng, 17 + i, 512, *kind) for i, kind in enumerate(Q4_KINDS)]
  check_exact(whole(rng, m, 512), ws, implementation)


def test_rounding_of_x_is_as_stated(native: str) -> None:
  rng = np.random.default_rng(2)
  x = rng.normal(size=(5, 512)).astype(np.float32)
  ws = [random_q4(rng, 20, 512, *kind) for kind in Q4_KINDS]
  for y, w in zip(multiply(x, ws, native), ws, strict=True):
    weights = numpy_weights(w).astype(np.float64)
    block, _ = block_shape(to_blocks(w).format)
    half_step = np.abs(x.reshape(5, -1, block)).max(-1) / 127 / 2
    sums = np.abs(weights).reshape(20, -1, block).sum(-1)
    rounding = FLOAT32 * np.abs(x) @ largest_weights(w).T
    error = np.abs(y - x.astype(np.float64) @ weights.T)
    assert (error <= half_step @ sums.T * (1 + 1e-5) + rounding).all()
    assert error.max() > 0.01 * (half_step @ sums.T).max(), "the bound says nothing"


@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-30, -1.0, 6e4, 1e30])
def test_extreme_scales(implementation: str, scale: float) -> None:
  rng = np.random.default_rng(3)
  ws = []
  for group in GROUP_SIZES:
    for symmetric in (True, False):
      w = random_q4(rng, 17, 256, group, symmetric, "float32")
      shape = w.scale.shape
      mixed = np.where(rng.random(shape) < 0.5, np.float32(scale), 0).astype(np.float32)
      ws.append(Q4Array(w.packed, mixed, None if symmetric else mixed[::-1].copy()))
  check_exact(whole(rng, 3, 256), ws, implementation)


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38])
def test_subnormal_x_gives_nothing_large(native: str, value: float) -> None:
  """Too small for int8's scale: such a block counts as zero, or is nearly exact."""
  rng = np.random.default_rng(4)
  x = np.full((2, 256), value, np.float32)
  ws = [random_q4(rng, 16, 256, group, s) for group in GROUP_SIZES for s in (True, False)]
  for y, w in zip(multiply(x, ws, native), ws, strict=True):
    assert (np.abs(y) <= 1.01 * np.abs(x.astype(np.float64)) @ largest_weights(w).T + 1e-40).all()


@pytest.mark.parametrize("m", [1, 2, 5, 9])
def test_nan_and_infinity_stay_in_their_row(native: str, m: int) -> None:
  rng = np.random.default_rng(5)
  x = rng.normal(size=(m, 512)).astype(np.float32)
  ws = [random_q4(rng, 20, 512, *kind) for kind in Q4_KINDS]
  clean, row = multiply(x, ws, native), m // 2
  others = np.arange(m) != row
  for bad, at in ((np.nan, 0), (np.inf, 300), (-np.inf, 511)):
    dirty = x.copy()
    dirty[row, at] = bad
    for before, after in zip(clean, multiply(dirty, ws, native), strict=True):
      assert np.isnan(after[row]).all()
      np.testing.assert_array_equal(after[others], before[others])


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
  """glibc fills what it hands out with 0xFE: as float32 -1.7e38."""
  libc = ctypes.CDLL(None)
  if not hasattr(libc, "mallopt"):
    pytest.skip("only glibc can poison what it allocates")
  m_perturb = -6
  libc.mallopt(m_perturb, 0x01)
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  fresh = libc.malloc(4096)
  assert ctypes.string_at(fresh, 4096)[64:] == b"\xfe" * 4032
  yield
  libc.mallopt(m_perturb, 0)


@pytest.mark.parametrize("m", [1, 2, 7])
def test_every_output_is_written(native: str, m: int, poisoned_memory: None) -> None:
  rng = np.random.default_rng(6)
  for n in (1, 17, 31):
    check_exact(whole(rng, m, 256), [random_q4(rng, n, 256, g, True) for g in (8, 32, 256)], native)


def test_types_mix_in_one_call() -> None:
  """Without a name each weight goes where it is best, and the outputs keep the weights' order."""
  rng = np.random.default_rng(7)
  ws = [random_q4(rng, 16 + i, 256, 32, i % 2 == 0) for i in range(4)]
  x = whole(rng, 3, 256)
  mixed = [ws[0], to_blocks(ws[1]).tiles(), PlanarArray.from_q4(ws[2]), to_blocks(ws[3])]
  dispatch._say_xla.cache_clear()  # It is said once.
  with pytest.warns(UserWarning, match="no kernel for this PlanarArray on cpu"):
    ys = int4_matmul(jnp.asarray(x), mixed)
  for y, w in zip(ys, ws, strict=True):
    np.testing.assert_allclose(y, x @ numpy_weights(w).T, rtol=1e-4, atol=1e-4)


def test_planes_go_to_the_platforms_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
  """A stand-in for the kernel of "cpu" gets the planes that it supports, XLA the others."""
  kernel = SimpleNamespace(
    int4_matmul=lambda x, ws: [jnp.full((x.shape[0], w.num_rows), 7, x.dtype) for w in ws],
    supports=lambda w: w.group_size == 32,
  )
  monkeypatch.setattr(dispatch, "_KERNELS", {"cpu": "stand_in", "tpu": "none"})
  monkeypatch.setattr(
    dispatch, "_kernel_or_none", lambda name: kernel if name == "stand_in" else None
  )
  rng = np.random.default_rng(8)
  ws = [random_q4(rng, 16, 256, group, True) for group in (32, 64)]
  x = whole(rng, 2, 256)
  dispatch._say_xla.cache_clear()
  with pytest.warns(UserWarning, match="no kernel for this PlanarArray on cpu"):
    mine, other = jax.jit(int4_matmul)(x, [PlanarArray.from_q4(w) for w in ws])
  assert (np.asarray(mine) == 7).all()
  np.testing.assert_allclose(other, x @ numpy_weights(ws[1]).T, rtol=1e-4, atol=1e-4)


def test_misuse() -> None:
  w = random_q4(np.random.default_rng(8), 16, 256, 32, True)
  x = jnp.zeros((1, 256))
  with pytest.raises(ValueError, match="x is int32; it must be float32, bfloat16 or float16"):
    int4_matmul(x.astype(jnp.int32), [w])
  with pytest.raises(ValueError, match="x has 255 columns where the Q4Array has 256"):
    int4_matmul(x[:, 1:], [w])
  with pytest.raises(ValueError, match="x has 255 columns where the PlanarArray has 256"):
    int4_matmul(x[:, 1:], [PlanarArray.from_q4(w)])
  with pytest.raises(ValueError, match="x has 255 columns where the q4s32_f16 weight has 256"):
    int4_matmul(x[:, 1:], [to_blocks(w)])
  with pytest.raises(ValueError, match="K=256 does not divide into the 3 groups"):
    int4_matmul(x, [Q4Array(w.packed, np.ones((16, 3), np.float32))])
  for name in (*CPU, "cpu", "pallas_tpu", "mosaic_gpu"):
    with pytest.raises(NotImplementedError, match=f"'{name}'"):
      int4_matmul(x, [w], name)
