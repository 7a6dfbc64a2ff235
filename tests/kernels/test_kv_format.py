"""The grids of the KV cache, against loops over groups in float64 and NumPy's own float16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from q4jax_kernels.kv_format import KVFormat, dequantize, quantize, to_float

HEAD_DIM = 128
GROUPS = (8, 32, 64, 128, None)


def oracle(
  x: np.ndarray, bits: int, size: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Codes [H], scale and minimum [G] of one head x [H], group by group."""
  codes = np.zeros(len(x), np.uint8)
  scale, minimum = np.zeros((2, len(x) // size), np.float16)
  for g in range(len(x) // size):
    group = np.clip(x[g * size : (g + 1) * size], -65504, 65504).astype(np.float32)
    if symmetric:
      scale[g] = np.float32(max(abs(group))) * np.float32(1 / (2 ** (bits - 1) - 1))
    else:
      scale[g] = np.float32(max(group) - min(group)) * np.float32(1 / (2**bits - 1))
      minimum[g] = -min(group)
    for i, value in enumerate(group):
      shifted = value if symmetric else value + np.float32(minimum[g])
      code = round(float(shifted / np.float32(scale[g]))) if scale[g] > 0 else 0
      code += 2 ** (bits - 1) if symmetric else 0
      codes[g * size + i] = min(max(code, 0), 2**bits - 1)
  return codes, scale, minimum


def check(x: np.ndarray, format: KVFormat) -> np.ndarray:
  """x [n, H] against the oracle, code by code; the numbers they stand for, float64[n, H]."""
  codes, scale, minimum = jax.jit(quantize, static_argnums=1)(x, format)
  found = dequantize(codes, scale, minimum, format)
  size = format.group_size or x.shape[1]
  assert codes.dtype == jnp.uint8 and scale.dtype == jnp.float16
  assert scale.shape == (len(x), x.shape[1] // size) and (minimum is None) == format.symmetric
  law = np.zeros(x.shape)
  for i, row in enumerate(x):
    with np.errstate(over="ignore"):
      expected = oracle(row, format.bits, size, format.symmetric)
    np.testing.assert_array_equal(codes[i], expected[0])
    np.testing.assert_array_equal(scale[i], expected[1])
    if minimum is not None:
      np.testing.assert_array_equal(minimum[i], expected[2])
    for j, code in enumerate(expected[0]):
      s, m = float(expected[1][j // size]), float(expected[2][j // size])
      law[i, j] = s * (int(code) - 2 ** (format.bits - 1)) if format.symmetric else s * code - m
  np.testing.assert_array_equal(found, law.astype(np.float32))
  return law


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_codes(bits: int, group: int | None, symmetric: bool) -> None:
  x = np.random.default_rng(0).normal(size=(6, HEAD_DIM)).astype(np.float32)
  x *= np.array([[1], [1e-6], [1e-3], [100], [1e4], [1]], np.float32)
  x[5] += 20  # Far from zero: the minimum's own rounding shows.
  format = KVFormat(bits, group, symmetric)
  found = check(x, format)
  groups = x.reshape(6, -1, group or HEAD_DIM).astype(np.float64)
  # Half a step; the largest may lose what rounding the scale and the minimum to float16 took.
  largest = abs(groups).max(-1, keepdims=True)
  levels = 2**bits - 1
  step = 2 * largest / (levels - 1) if symmetric else np.ptp(groups, -1, keepdims=True) / levels
  bound = step * (0.5 + 1e-3) + largest * 2**-9 + 2**bits * 2.0**-25
  assert (abs(found.reshape(groups.shape) - groups) <= bound).all()


NUMBERS = st.one_of(
  st.floats(-10, 10, width=32),
  st.floats(width=32, allow_nan=False, allow_infinity=True),
  st.sampled_from([0.0, -0.0, 65504.0, 65520.0, -1e38, 3e38, 2.0**-24, 2.0**-25, 1e-45]),
)


@given(
  st.lists(NUMBERS, min_size=16, max_size=16), st.sampled_from([4, 8]), st.booleans(), st.booleans()
)
def test_any_number(x: list[float], bits: int, symmetric: bool, whole: bool) -> None:
  x32 = np.array([x], np.float32)
  x32[abs(x32) < 1e-37] = 0  # XLA may flush what float32 holds below its normal range.
  found = check(x32, KVFormat(bits, None if whole else 8, symmetric))
  assert np.isfinite(found).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_equal_values_are_their_minimum(bits: int) -> None:
  values = np.array([0, 1.2345, -7, 1e-7, 1e30, -np.inf], np.float32)
  x = np.repeat(values, 8).reshape(1, -1)
  found = check(x, KVFormat(bits, 8))
  expected = np.clip(values, -65504, 65504).astype(np.float16)
  np.testing.assert_array_equal(found[0, ::8], expected.astype(np.float64))


@pytest.mark.parametrize("symmetric", [False, True])
def test_nan_stays_in_its_group(symmetric: bool) -> None:
  x = np.ones((1, 32), np.float32)
  x[0, 9] = np.nan
  format = KVFormat(4, 8, symmetric)
  found = np.asarray(dequantize(*quantize(x, format), format))
  assert np.isnan(found[0, 8:16]).all() and np.isfinite(np.delete(found[0], range(8, 16))).all()


def test_leading_axes_change_nothing() -> None:
  x = np.random.default_rng(1).normal(size=(2, 3, 4, 16)).astype(np.float32)
  format = KVFormat(4, 8)
  whole = dequantize(*quantize(x, format), format)
  for at in np.ndindex(2, 3, 4):
    np.testing.assert_array_equal(whole[at], dequantize(*quantize(x[at], format), format))


@pytest.mark.parametrize(
  ("format", "bits"),
  [
    (KVFormat(4, 8), 8.0),
    (KVFormat(4, 32), 5.0),
    (KVFormat(4, 128), 4.25),
    (KVFormat(4), 4.25),
    (KVFormat(4, 8, symmetric=True), 6.0),
    (KVFormat(4, 32, symmetric=True), 4.5),
    (KVFormat(8, 32), 9.0),
    (KVFormat(16, bfloat16=True), 16.0),
    (KVFormat(32), 32.0),
  ],
)
def test_bits_per_value(format: KVFormat, bits: float) -> None:
  assert format.bits_per_value(HEAD_DIM) == bits
  if not format.is_float:
    parts = quantize(jnp.ones((2, HEAD_DIM)), format)
    codes = parts[0].size * format.bits  # in whole bytes until packed
    scales = sum(8 * a.nbytes for a in parts[1:] if a is not None)
    assert codes + scales == bits * 2 * HEAD_DIM


def test_floats() -> None:
  x = jnp.array([1.0, 65519.0, 1e30, -jnp.inf, 1e-9])
  np.testing.assert_array_equal(to_float(x, KVFormat(16)), [1, 65504, 65504, -65504, 0])
  np.testing.assert_array_equal(to_float(x, KVFormat(32)), x)
  np.testing.assert_array_equal(to_float(x, KVFormat(16, bfloat16=True)), x.astype(jnp.bfloat16))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"bits": 5}, "bits=5"),
    ({"bits": 8, "bfloat16": True}, "got bits=8"),
    ({"bits": 4, "group_size": 0}, "group_size=0 must be positive"),
    ({"bits": 16, "group_size": 32}, "group_size=32 and symmetric=False"),
    ({"bits": 32, "symmetric": True}, "symmetric=True"),
  ],
)
def test_refuses_what_is_no_format(arguments: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    KVFormat(**arguments)


def test_refuses_heads_that_do_not_fit() -> None:
  with pytest.raises(ValueError, match="group_size=32 does not divide head_dim=48"):
    quantize(jnp.ones((1, 48)), KVFormat(4, 32))
  with pytest.raises(ValueError, match="head_dim=7 of 4 bits"):
    quantize(jnp.ones((1, 7)), KVFormat(4))
  with pytest.raises(ValueError, match="has no codes"):
    quantize(jnp.ones((1, 8)), KVFormat(16))
