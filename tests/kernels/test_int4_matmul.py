"""The int4 matmul against float64 sums over gguf-py's weights, on every instruction set."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import random_blocks
from q4jax_kernels import ffi
from q4jax_kernels.block_array import FIELDS, ROWS, BlockArray, block_shape, interleave_tile
from q4jax_kernels.int4_matmul import IMPLEMENTATIONS, cpu, int4_matmul, take_rows
from q4jax_kernels.q4_formats import Q4_FORMATS
from random_blocks import FLOATS, FORMATS

BLOCK_FORMATS = [name for name in FORMATS if name not in FLOATS]
ROUNDING = ("cpu", "cpu_scalar", "cpu_avx2", "cpu_avx512", "cpu_neon")
OF_BLOCKS = ("reference", "xla", *ROUNDING, "cpu_exact")
ISAS = ("scalar", "avx2", "avx512", "neon")
# Decode, small batches, both sides of every row count that a kernel treats apart, two sweeps.
BATCHES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 17, 130)
TOLERANCE = 2e-6  # of the sum of magnitudes: float32's rounding, not a wrong scale or code


def needs(isa: str) -> None:
  if ffi.isa_name(isa) is None:
    pytest.skip(f"this processor, or this build, has no {isa}")


def runnable(implementation: str) -> str:
  if implementation.startswith("cpu"):
    isa = implementation.removeprefix("cpu").removeprefix("_")
    needs("best" if isa in ("", "exact") else isa)
  return implementation


def rows_array(rows: np.ndarray, format: str) -> BlockArray:
  return BlockArray(jnp.asarray(rows), format, len(rows))


def tiles_array(rows: np.ndarray, format: str) -> BlockArray:
  tiles = -(-len(rows) // ROWS)
  out = np.empty((tiles, ROWS * rows.shape[1]), np.uint8)
  for i in range(tiles):
    interleave_tile(rows[i * ROWS : (i + 1) * ROWS], format, out[i])
  return BlockArray(jnp.asarray(out), format, len(rows), "x16")


def half(x: np.ndarray) -> np.ndarray:
  """float32 rounded to float16, but for what float16 has no normal number for."""
  normal = (np.abs(x) >= np.finfo(np.float16).tiny) & (np.abs(x) < 65520)
  return np.where(normal, np.where(normal, x, 0).astype(np.float16).astype(np.float32), x)


def rounded(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
  """What the kernels multiply quantised weights by, as float64.

  Blockwise int8 codes, d = max|x| / 127, round half to even. In blocks of 32 d is float16, and so
  is d * sum(codes), which multiplies the minimum of q4_1 and q5_1 (ggml's block_q8_1).

  Returns:
    float64[M, K], and float64[M, K / block]: how far the float16 sum is above the sum of these.
  """
  blocks = x.astype(np.float32).reshape(len(x), x.shape[1] // block, block)
  largest = np.abs(blocks).max(axis=-1, keepdims=True)
  inverse = np.where(largest > 1e-36, np.float32(127) / np.maximum(largest, 1e-36), np.float32(0))
  codes = np.rint(blocks * inverse.astype(np.float32))
  assert np.abs(codes).max(initial=0) <= 127
  scale = largest / np.float32(127)
  d = half(scale) if block == 32 else scale
  values = codes.astype(np.float64) * d
  total = codes.sum(-1, keepdims=True)
  normal = (d >= np.finfo(np.float16).tiny) & (d < 65520)
  excess = np.where(normal, half(np.where(normal, scale, 0) * total) - total * np.float64(d), 0.0)
  return values.reshape(x.shape), excess[..., 0]


def minimums(rows: np.ndarray, format: str) -> np.ndarray:
  """float64[N, K / 32] of q4_1 and q5_1: what a weight of code 0 is."""
  blocks = rows.reshape(-1, block_shape(format)[1]).copy()
  blocks[:, 4:] = 0
  return random_blocks.dequantize(blocks.reshape(rows.shape), format)[:, ::32].astype(np.float64)


def expected(x: np.ndarray, rows: np.ndarray, format: str, implementation: str) -> np.ndarray:
  """float64[M, N]; the native kernels round x, the others do not."""
  w = random_blocks.dequantize(rows, format).astype(np.float64)
  block, _ = block_shape(format)
  if implementation not in ROUNDING or format in ("f32", "bf16"):
    return x.astype(np.float64) @ w.T
  if format == "f16":
    return half(x).astype(np.float64) @ w.T
  values, excess = rounded(x, block)
  if format in ("q4_1", "q5_1"):
    return values @ w.T + excess @ minimums(rows, format).T
  return values @ w.T


def magnitude(x: np.ndarray, rows: np.ndarray, format: str) -> np.ndarray:
  """float64[M, N]: the sum over k of |x| times the largest weight of the block."""
  w = np.abs(random_blocks.dequantize(rows, format).astype(np.float64))
  block, _ = block_shape(format)
  blocks = w.shape[1] // block
  top = w.reshape(len(w), blocks, block).max(axis=-1)
  return np.abs(x.astype(np.float64)).reshape(len(x), blocks, block).sum(-1) @ top.T


def check(x: np.ndarray, weights: dict[str, np.ndarray], implementation: str) -> None:
  """Multiplies x by all weights in one call and compares each with the oracle."""
  make = tiles_array if implementation.startswith("cpu") else rows_array
  ws = [make(rows, format) for format, rows in weights.items()]
  ys = jax.jit(int4_matmul, static_argnums=2)(x, ws, implementation)
  assert len(ys) == len(ws)
  for y, (format, rows) in zip(ys, weights.items(), strict=True):
    assert y.dtype == jnp.float32 and y.shape == (len(x), len(rows))
    error = np.abs(np.asarray(y) - expected(x, rows, format, implementation))
    bound = TOLERANCE * magnitude(x, rows, format) + 1e-36
    assert (error <= bound).all(), f"{format}: {(error / bound).max()} times the bound"


# Each shape compiles a program, so a failure is reported as it was found, not shrunk.
@pytest.mark.parametrize("implementation", OF_BLOCKS)
@settings(max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_any_shape(implementation: str, data: st.DataObject) -> None:
  runnable(implementation)
  rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
  formats = data.draw(st.lists(st.sampled_from(FORMATS), min_size=1, max_size=3, unique=True))
  step = max(block_shape(format)[0] for format in formats)
  k = data.draw(st.integers(1, 3), "blocks") * (step if step > 1 else 32)
  m = data.draw(st.sampled_from(BATCHES), "M")
  ns = {format: data.draw(st.sampled_from((1, 15, 16, 17, 40, 83)), "N") for format in formats}
  weights = {f: random_blocks.random_rows(rng, f, n, k) for f, n in ns.items()}
  x = rng.normal(size=(m, k)).astype(np.float32)
  x[rng.random(m) < 0.1] = 0.0
  check(x, weights, implementation)


@pytest.mark.parametrize("implementation", OF_BLOCKS)
def test_all_formats_in_one_call(implementation: str) -> None:
  runnable(implementation)
  rng = np.random.default_rng(1)
  weights = {f: random_blocks.random_rows(rng, f, 16 + i, 512) for i, f in enumerate(FORMATS)}
  check(rng.normal(size=(3, 512)).astype(np.float32), weights, implementation)


@pytest.mark.parametrize("implementation", ["cpu_scalar", "cpu_avx2", "cpu_avx512", "cpu_neon"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 3e-3, 1.0, 1e4, 3e6, 1e20, 1e30])
def test_scales_of_x(implementation: str, scale: float) -> None:
  """About 3e-3 a block's scale begins to be float16's, about 1e4 its sum ends, about 3e6 itself."""
  runnable(implementation)
  rng = np.random.default_rng(2)
  weights = {f: random_blocks.random_rows(rng, f, 16, 256) for f in FORMATS}
  check((scale * rng.normal(size=(5, 256))).astype(np.float32), weights, implementation)


@pytest.mark.parametrize("implementation", OF_BLOCKS)
@pytest.mark.parametrize("value", [0.0, 6e-8, 6.1e-5, 65504.0])
def test_scales_of_w(implementation: str, value: float) -> None:
  """Zero, the smallest subnormal and normal, and the largest float16 as every block's factors."""
  runnable(implementation)
  rng = np.random.default_rng(3)
  weights = {
    f: random_blocks.set_halves(random_blocks.random_rows(rng, f, 16, 256), f, value)
    for f in BLOCK_FORMATS
  }
  check(rng.normal(size=(5, 256)).astype(np.float32), weights, implementation)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38])
def test_subnormal_x_gives_nothing_large(isa: str, value: float) -> None:
  """Too small for the scale's reciprocal: such a block counts as zero, or is exact."""
  needs(isa)
  rng = np.random.default_rng(4)
  x = np.full((2, 256), value, np.float32)
  for format in FORMATS:
    rows = random_blocks.random_rows(rng, format, 16, 256)
    (y,) = cpu.int4_matmul(jnp.asarray(x), [tiles_array(rows, format)], isa)
    assert np.isfinite(y).all()
    assert (np.abs(y) <= 1.01 * magnitude(x, rows, format) + 1e-40).all(), format


@pytest.mark.parametrize("isa", ISAS)
def test_ties_round_to_even(isa: str) -> None:
  """With 127 the largest of a block, 0.5, 1.5 and 2.5 are ties: 0, 2 and 2."""
  needs(isa)
  for block, format in ((32, "q8_0"), (256, "q6_k")):
    x = np.zeros((1, block), np.float32)
    x[0, :7] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    picks = np.zeros((7, block), np.float32)
    picks[np.arange(7), np.arange(7)] = 1
    rows = random_blocks.random_rows(np.random.default_rng(5), format, 16, block)
    w = random_blocks.dequantize(rows, format).astype(np.float64)
    (y,) = cpu.int4_matmul(jnp.asarray(x), [tiles_array(rows, format)], isa)
    codes = np.zeros(block)
    codes[:7] = [127, 0, 2, 2, 0, -2, -2]
    np.testing.assert_allclose(y[0], codes @ w.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("m", [1, 2, 4, 9, 17])
def test_nan_and_infinity_stay_in_their_row(isa: str, bad: float, m: int) -> None:
  needs(isa)
  rng = np.random.default_rng(6)
  x = rng.normal(size=(m, 512)).astype(np.float32)
  ws = [tiles_array(random_blocks.random_rows(rng, f, 20, 512), f) for f in BLOCK_FORMATS]
  clean = cpu.int4_matmul(jnp.asarray(x), ws, isa)
  row = m // 2
  for at in (0, 31, 300, 511):
    dirty = x.copy()
    dirty[row, at] = bad
    for before, after in zip(clean, cpu.int4_matmul(jnp.asarray(dirty), ws, isa), strict=True):
      others = np.arange(m) != row
      assert np.isnan(after[row]).all()
      np.testing.assert_array_equal(np.asarray(after)[others], np.asarray(before)[others])


@pytest.fixture(scope="module")
def products() -> Callable[[str, int], list[np.ndarray]]:
  """(isa, M) -> the product of the first M rows of one x with a weight of every format."""
  rng = np.random.default_rng(7)
  x = rng.normal(size=(max(BATCHES), 512)).astype(np.float32)
  ws = [
    tiles_array(random_blocks.random_rows(rng, f, 37 + i, 512), f) for i, f in enumerate(FORMATS)
  ]

  def product(isa: str, m: int) -> list[np.ndarray]:
    return [np.asarray(y) for y in cpu.int4_matmul(jnp.asarray(x[:m]), ws, isa)]

  return product


@pytest.mark.parametrize("isa", ISAS)
def test_batch_invariant_to_the_bit(isa: str, products: Callable[[str, int], list]) -> None:
  needs(isa)
  whole = products(isa, max(BATCHES))
  for m in BATCHES:
    for format, some, all_rows in zip(FORMATS, products(isa, m), whole, strict=True):
      np.testing.assert_array_equal(some, all_rows[:m], err_msg=f"{format} M={m}")


def test_rows_alone(products: Callable[[str, int], list]) -> None:
  """Any row, not only the first, is what it would be alone."""
  needs("best")
  rng = np.random.default_rng(8)
  x = jnp.asarray(rng.normal(size=(11, 512)).astype(np.float32))
  ws = [tiles_array(random_blocks.random_rows(rng, f, 20, 512), f) for f in FORMATS]
  whole = cpu.int4_matmul(x, ws)
  for m in range(11):
    for one, every in zip(cpu.int4_matmul(x[m : m + 1], ws), whole, strict=True):
      np.testing.assert_array_equal(one[0], every[m])


@pytest.mark.parametrize("m", BATCHES)
def test_avx512_is_avx2_to_the_bit(m: int, products: Callable[[str, int], list]) -> None:
  needs("avx2")
  needs("avx512")
  for format, a, b in zip(FORMATS, products("avx2", m), products("avx512", m), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=format)


def test_any_leading_axes_and_dtype() -> None:
  rng = np.random.default_rng(9)
  w = tiles_array(random_blocks.random_rows(rng, "q4_k", 20, 256), "q4_k")
  x = jnp.asarray(rng.normal(size=(2, 3, 256)).astype(np.float32))
  (y,) = int4_matmul(x, [w])
  assert y.shape == (2, 3, 20)
  np.testing.assert_array_equal(y[1, 2], int4_matmul(x[1, 2], [w])[0])
  for dtype in (jnp.bfloat16, jnp.float16):
    (low,) = int4_matmul(x.astype(dtype), [w])
    assert low.dtype == dtype
    np.testing.assert_array_equal(
      low, int4_matmul(x.astype(dtype).astype(jnp.float32), [w])[0].astype(dtype)
    )
  for shape in ((0, 256), (2, 0, 256)):
    assert int4_matmul(jnp.zeros(shape), [w])[0].shape == (*shape[:-1], 20)


def test_layouts_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
  """In C and in numpy the same tiles, and back again; the last tile is padded with zeros."""
  rng = np.random.default_rng(10)
  rows = {f: random_blocks.random_rows(rng, f, 35, 512) for f in FORMATS}
  ws = [tiles_array(r, f) for f, r in rows.items()]
  padded = [BlockArray(w.data, w.format, 48, "x16") for w in ws]
  plain = jax.jit(lambda ws: [w.rows().data for w in ws])(padded)
  monkeypatch.setattr(ffi, "to_tiles", lambda *args: False)
  for w, found, (format, expected_rows) in zip(ws, plain, rows.items(), strict=True):
    assert w.shape == (35, 512)
    np.testing.assert_array_equal(w.data, tiles_array(expected_rows, format).data, err_msg=format)
    np.testing.assert_array_equal(found[:35], expected_rows, err_msg=format)
    assert not np.asarray(found[35:]).any()
  assert ws[0].rows().data.shape == (35, 2048)


def test_x16_by_hand() -> None:
  """Rows of q8_0: byte b of row r is 16 b + r for b = 0, 1 (d), then words of four codes."""
  rows = np.arange(16 * 34, dtype=np.uint16).reshape(16, 34).astype(np.uint8)
  tile = np.asarray(tiles_array(rows, "q8_0").data)[0]
  assert tile[:4].tolist() == [*rows[0, :2], *rows[1, :2]]  # d of row 0, d of row 1
  assert tile[32:40].tolist() == [*rows[0, 2:6], *rows[1, 2:6]]  # codes 0..3 of rows 0 and 1
  assert tile[32 + 64 : 32 + 68].tolist() == rows[0, 6:10].tolist()  # codes 4..7 of row 0


@pytest.mark.parametrize("isa", ISAS)
def test_layout_by_hand(isa: str) -> None:
  """One byte 0xF1 with d = 0.5: weight 0 is 0.5 * (1 - 8), weight 16 is 0.5 * (15 - 8)."""
  needs(isa)
  row = np.array([[0x00, 0x38, 0xF1, *[0x88] * 15]], np.uint8)
  w = tiles_array(row, "q4_0")
  for at, weight in ((0, -3.5), (16, 3.5), (1, 0.0)):
    x = np.zeros((1, 32), np.float32)
    x[0, at] = 127.0  # Its block's scale is 1.
    (y,) = cpu.int4_matmul(jnp.asarray(x), [w], isa)
    np.testing.assert_allclose(y, [[127 * weight]], rtol=1e-6)
  assert np.flatnonzero(cpu.take_rows(w, jnp.zeros(1, jnp.int32), isa)).tolist() == [0, 16]


def test_q6_k_by_hand() -> None:
  """d, the scales, then the words that a step of the kernel reads together."""
  rows = np.arange(16 * 210, dtype=np.uint32).reshape(16, 210).astype(np.uint8)
  tile = np.asarray(tiles_array(rows, "q6_k").data)[0]
  assert tile[:4].tolist() == [*rows[0, 208:], *rows[1, 208:]]
  assert tile[32:34].tolist() == [rows[0, 192], rows[1, 192]]
  words = tile[288:].reshape(2, 2, 4, 3, 16, 4)  # half, part of 16 bytes, word, of three, row, byte
  for half, part, word, row in ((0, 0, 0, 0), (0, 1, 3, 7), (1, 0, 2, 15), (1, 1, 1, 1)):
    at = 16 * part + 4 * word
    for byte in range(4):
      high, low, next_low = (
        int(rows[row, first + at + byte]) for first in (128 + 32 * half, 64 * half, 64 * half + 32)
      )
      # ggml-quants.c, dequantize_row_q6_K: q1 .. q4 of one l.
      codes = [low & 15, next_low & 15, low >> 4, next_low >> 4]
      codes = [code | (high >> 2 * i & 3) << 4 for i, code in enumerate(codes)]
      x, y, z = words[half, part, word, :, row, byte].tolist()
      assert [x & 63, y & 63, z & 63, (x >> 6) << 4 | (y >> 6) << 2 | z >> 6] == codes


def test_fields_fill_their_blocks() -> None:
  assert tuple(FIELDS) == (*FORMATS, *Q4_FORMATS), (
    "the native kernels number the formats in this order"
  )
  for format in FORMATS:
    assert block_shape(format) == random_blocks.block_sizes(format)
    assert sum(size for size, _ in FIELDS[format]) == block_shape(format)[1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_take_rows_is_bit_equal(isa: str, format: str) -> None:
  needs(isa)
  rng = np.random.default_rng(11)
  rows = random_blocks.random_rows(rng, format, 37, 512)
  odd = random_blocks.random_rows(rng, format, 3, 512)
  if format not in FLOATS:
    for i, half in enumerate((-0.0, 6e-8, 65504.0)):
      odd[i : i + 1] = random_blocks.set_halves(odd[i : i + 1], format, half)
  rows = np.concatenate([rows, odd])
  ids = np.array([39, 0, 15, 16, 38, 5, 5, 31, 32, 37], np.int32)
  found = np.asarray(cpu.take_rows(tiles_array(rows, format), jnp.asarray(ids), isa))
  oracle = random_blocks.dequantize(rows, format)[ids]
  np.testing.assert_array_equal(found.view(np.uint32), oracle.view(np.uint32))


@pytest.mark.parametrize("make", [rows_array, tiles_array])
def test_take_rows_without_the_library(
  make: Callable[[np.ndarray, str], BlockArray], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(ffi, "library", lambda: None)
  rng = np.random.default_rng(12)
  rows = {f: random_blocks.random_rows(rng, f, 20, 256) for f in FORMATS}
  ids = np.array([[3, 19], [0, 3]], np.int32)
  ws = [make(r, f) for f, r in rows.items()]
  taken = jax.jit(lambda ws: [take_rows(w, jnp.asarray(ids)) for w in ws])(ws)
  for found, (format, r) in zip(taken, rows.items(), strict=True):
    assert found.shape == (2, 2, 256) and found.dtype == jnp.float32
    oracle = random_blocks.dequantize(r, format)
    np.testing.assert_allclose(found, oracle[ids], rtol=1e-5, atol=1e-6, err_msg=format)


@pytest.mark.parametrize("bad", [-1, 20, 31, 2**31 - 1, -(2**31)])
def test_an_id_outside_is_an_error(bad: int) -> None:
  """20..31 lie in the padding of the last tile: no row either."""
  needs("best")
  rng = np.random.default_rng(13)
  w = tiles_array(random_blocks.random_rows(rng, "q4_k", 20, 256), "q4_k")
  with pytest.raises(jax.errors.JaxRuntimeError, match=f"row {bad} is outside"):
    take_rows(w, jnp.array([0, bad], jnp.int32)).block_until_ready()


def test_an_id_outside_takes_the_nearest_row_elsewhere() -> None:
  rows = random_blocks.random_rows(np.random.default_rng(14), "q4_k", 20, 256)
  dense = jnp.asarray(random_blocks.dequantize(rows, "q4_k"))
  ids = jnp.array([-1, -(2**31), 20, 2**31 - 1, 0, 19], jnp.int32)
  for w in (rows_array(rows, "q4_k"), dense):
    low, lower, high, higher, first, last = jax.jit(take_rows)(w, ids)
    for found, nearest in ((low, first), (lower, first), (high, last), (higher, last)):
      np.testing.assert_array_equal(found, nearest)


def test_a_named_implementation_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
  rng = np.random.default_rng(15)
  rows = random_blocks.random_rows(rng, "q4_k", 16, 256)
  x = jnp.zeros((1, 256))
  for name in IMPLEMENTATIONS[2:]:
    with pytest.raises(NotImplementedError, match=name):
      int4_matmul(x, [rows_array(rows, "q4_k")], name)
  tiles = tiles_array(rows, "q4_k")
  with monkeypatch.context() as patch:
    patch.setattr(ffi, "isa_name", lambda isa: None if isa == "avx512" else isa)
    with pytest.raises(NotImplementedError, match="cpu_avx512"):
      int4_matmul(x, [tiles], "cpu_avx512")
  with monkeypatch.context() as patch:
    patch.setattr(ffi, "library", lambda: None)
    with pytest.raises(NotImplementedError, match="cpu_avx2"):
      int4_matmul(x, [tiles], "cpu_avx2")
    assert int4_matmul(x, [tiles])[0].shape == (1, 16)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_misuse(implementation: str | None) -> None:
  w = rows_array(np.zeros((16, 144), np.uint8), "q4_k")
  for k in (0, 255, 512):
    with pytest.raises(ValueError, match=f"x has {k} columns"):
      int4_matmul(jnp.zeros((1, k)), [w], implementation)
  with pytest.raises(ValueError, match="'fast' is not one of"):
    int4_matmul(jnp.zeros((1, 256)), [w], "fast")


def raw_matmul(
  x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...], **attributes
) -> np.ndarray:
  call = jax.ffi.ffi_call("q4jax_matmul", [jax.ShapeDtypeStruct(y, jnp.float32)])
  defaults = {"formats": np.array([10], np.int64), "exact": False, "isa": np.int64(0)}
  return np.asarray(call(jnp.ones(x), jnp.zeros(w, jnp.uint8), **{**defaults, **attributes})[0])


def test_the_handler_takes_what_fits() -> None:
  """Weights of zero bytes are zeros."""
  needs("best")
  assert raw_matmul((1, 256), (1, 16 * 144), (1, 16)).tolist() == [[0.0] * 16]


@pytest.mark.parametrize(
  ("says", "arguments"),
  [
    ("2303 bytes, expected 2304", {"w": (2303,)}),
    ("0 bytes, expected 2304", {"w": (0,)}),
    ("2304 bytes, expected 4608", {"y": (1, 17)}),
    ("2304 bytes, expected 4608", {"x": (1, 512)}),
    ("not a multiple", {"x": (1, 128)}),
    ("two dimensions", {"x": (256,)}),
    ("wrong shape", {"y": (2, 16)}),
    ("wrong shape", {"y": (16,)}),
    ("unknown format id 39", {"formats": np.array([39], np.int64)}),
    ("unknown format id -1", {"formats": np.array([-1], np.int64)}),
    ("differ in number", {"formats": np.array([10, 10], np.int64)}),
    ("instruction set", {"isa": np.int64(9)}),
  ],
)
def test_the_handler_refuses_what_does_not_fit(says: str, arguments: dict) -> None:
  """The last line of defence: an error, not a read past the end."""
  needs("best")
  good = {"x": (1, 256), "w": (1, 16 * 144), "y": (1, 16)}
  with pytest.raises(jax.errors.JaxRuntimeError, match=says):
    raw_matmul(**{**good, **arguments})


@pytest.mark.parametrize(
  ("says", "k", "attributes"),
  [
    ("expected 4608", 512, {}),
    ("expected 4608", 256, {"num_rows": np.int64(17)}),
    ("expected 0", 256, {"num_rows": np.int64(-5)}),
    ("unknown format id 99", 256, {"format": np.int64(99)}),
    ("not a multiple", 100, {}),
    ("instruction set", 256, {"isa": np.int64(4)}),
  ],
)
def test_take_rows_handler_refuses_what_does_not_fit(says: str, k: int, attributes: dict) -> None:
  needs("best")
  call = jax.ffi.ffi_call("q4jax_take_rows", jax.ShapeDtypeStruct((1, k), jnp.float32))
  given = {"format": np.int64(10), "num_rows": np.int64(16), "isa": np.int64(0), **attributes}
  with pytest.raises(jax.errors.JaxRuntimeError, match=says):
    call(jnp.zeros(1, jnp.int32), jnp.zeros(16 * 144, jnp.uint8), **given).block_until_ready()


@pytest.mark.parametrize("m", [1, 8, 64])
def test_no_float_copy_of_the_weight(m: int) -> None:
  """The native path needs no temporary; XLA's own needs the whole matrix, which shows the test."""
  needs("best")
  n, k = 2048, 4096
  x = jax.ShapeDtypeStruct((m, k), jnp.float32)

  def temporaries(implementation: str | None) -> int:
    data = jax.ShapeDtypeStruct((n // ROWS, ROWS * k // 256 * 144), jnp.uint8)
    w = BlockArray(data, "q4_k", n, "x16")  # type: ignore[arg-type]  # stands for the array
    lowered = jax.jit(lambda x, w: int4_matmul(x, [w], implementation)).lower(x, w)
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes

  assert temporaries(None) <= 1 << 16
  assert temporaries("xla") >= 4 * n * k
