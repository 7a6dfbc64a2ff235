"""Grids against formulas in float64, written apart, weight by weight; their laws; their blocks."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from q4jax import records
from q4jax.errors import ConfigError
from q4jax.quant import rtn
from q4jax.quant.convert import from_record, to_blocks, to_q4_array, to_record
from q4jax.quant.grid import RULES, Grid, GroupArray, Parameters, dequantize, fake_quant, quantize

GROUPS = (8, 32, 64, 256, "channel", "tensor")
WEIGHTS = ("normal", "tailed", "positive", "tiny", "large", "sparse", "constant")


def matrix(kind, n=3, k=256, seed=0):
  rng = np.random.default_rng(seed)
  w = rng.standard_normal((n, k))
  if kind == "tailed":
    w = rng.standard_t(2, (n, k))
  elif kind == "positive":
    w = np.abs(w) + 3
  elif kind == "tiny":
    w = w * 1e-7
  elif kind == "large":
    w = w * 1e3
  elif kind == "sparse":
    w = w * (rng.random((n, k)) < 0.02)
  elif kind == "constant":
    w = np.repeat([[0.75], [-0.75], [0.0]], n // 3, axis=0) * np.ones((1, k))
  return w.astype(np.float32)


def members(grid, n, k):
  """The row and the columns of each group, as pairs of index arrays, in the parameters' order."""
  if grid.group_size == "tensor":
    return [(slice(None), slice(None))]
  size = k if grid.group_size == "channel" else grid.group_size
  return [(i, slice(j, j + size)) for i in range(n) for j in range(0, k, size)]


def reals(grid, p, g):
  """(scale, zero, minimum) of group g as Python floats."""
  scale = float(p.scale.reshape(-1)[g])
  minimum = 0.0 if p.minimum is None else float(p.minimum.reshape(-1)[g])
  zero = {"minimum": 0, "signed": grid.half, "absmax": grid.half}.get(grid.rule)
  return scale, int(p.zero_point.reshape(-1)[g]) if zero is None else zero, minimum


grids = st.builds(
  Grid,
  bits=st.integers(2, 8),
  group_size=st.sampled_from(GROUPS),
  rule=st.sampled_from(RULES),
  scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)


@settings(max_examples=150, deadline=None)
@given(grids, st.sampled_from(WEIGHTS), st.integers(0, 9))
def test_codes_are_the_nearest_points_of_the_stored_grid(grid, kind, seed):
  w = matrix(kind, seed=seed)
  q = quantize(w, grid, rtn.fit(w, grid))
  y = q.dequantize()
  assert q.codes.max() <= 2**grid.bits - 1 and q.scale.dtype == np.dtype(grid.scale_dtype)
  for g, index in enumerate(members(grid, *w.shape)):
    scale, zero, minimum = reals(grid, q.parameters, g)
    points = scale * (np.arange(2**grid.bits) - zero) - minimum
    x = w[index].astype(np.float64).reshape(-1)
    best = np.abs(x[:, None] - points).min(axis=1)
    ours = np.abs(x - y[index].reshape(-1))
    ulp = 1e-6 * np.abs(x).max() + 1e-12
    assert (ours <= best + ulp).all()
    np.testing.assert_allclose(y[index].reshape(-1), points[q.codes[index].reshape(-1)], atol=ulp)


@settings(max_examples=60, deadline=None)
@given(grids, st.sampled_from(["normal", "tailed", "positive"]))
def test_scales_are_those_of_the_rule(grid, kind):
  w = matrix(kind)
  p = rtn.fit(w, grid)
  tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6}[grid.scale_dtype]
  for g, index in enumerate(members(grid, *w.shape)):
    x = w[index].astype(np.float64).reshape(-1)
    scale, zero, minimum = reals(grid, p, g)
    largest = x[np.abs(x).argmax()]
    if grid.rule == "signed":
      expected = -largest / 2 ** (grid.bits - 1)
    elif grid.rule == "absmax":
      expected = abs(largest) / (2 ** (grid.bits - 1) - 1)
    elif grid.rule == "minimum":
      np.testing.assert_allclose(-minimum, x.min(), rtol=tolerance)
      expected = (x.max() + minimum) / (2**grid.bits - 1)
    else:
      low, high = min(x.min(), 0), max(x.max(), 0)
      expected = (high - low) / (2**grid.bits - 1)
      assert zero == round(-low / scale)
    np.testing.assert_allclose(scale, expected, rtol=tolerance)


def test_by_hand():
  w = np.array([[-4.0, 3.5, 1.0, 0.2, 8.0, -7.0, -0.5, 1.6]], np.float32)
  signed = quantize(w, Grid(4, 4, "signed"), rtn.fit(w, Grid(4, 4, "signed")))
  # Largest -4: scale 0.5. Largest 8 has code 0, so that scale is -1 and signs turn.
  assert signed.scale.tolist() == [[0.5, -1.0]]
  assert signed.codes.tolist() == [[0, 15, 10, 8, 0, 15, 8, 6]]
  assert signed.dequantize().tolist() == [[-4.0, 3.5, 1.0, 0.0, 8.0, -7.0, 0.0, 2.0]]
  w = np.array([[-1.0, 2.0, 0.1, 0.6]], np.float32)
  zero = quantize(w, Grid(2, 4, "zero_point"), rtn.fit(w, Grid(2, 4, "zero_point")))
  assert (zero.scale.tolist(), zero.zero_point.tolist()) == ([[1.0]], [[1]])
  assert zero.codes.tolist() == [[0, 3, 1, 2]]
  low = quantize(w + 4, Grid(2, 4, "minimum"), rtn.fit(w + 4, Grid(2, 4, "minimum")))
  assert (low.scale.tolist(), low.minimum.tolist()) == ([[1.0]], [[-3.0]])
  assert low.dequantize().tolist() == [[3.0, 6.0, 4.0, 5.0]]


def test_scales_are_rounded_before_codes_are_chosen():
  # 2051 / 2048 is no float16: 1 + 2/1024 or 1 + 1/1024 are its neighbours.
  grid = Grid(8, "channel", "absmax")
  w = np.linspace(-127, 127, 1024, dtype=np.float32)[None] * np.float32(1.0015)
  p = rtn.fit(w, grid)
  codes = quantize(w, grid, p).codes
  np.testing.assert_array_equal(codes, np.rint(w / np.float32(p.scale)).clip(-128, 127) + 128)
  assert (codes != np.rint(w / (np.abs(w).max() / np.float32(127))) + 128).any()


def test_groups_of_zeros_and_of_one_value():
  for rule in RULES:
    for bits in (2, 4, 8):
      grid = Grid(bits, 32, rule)
      w = np.zeros((2, 64), np.float32)
      w[1, 32:] = 0.75
      y = fake_quant(w, grid, rtn.fit(w, grid))
      np.testing.assert_allclose(y, w, rtol=1e-3)


def test_small_weights_keep_a_scale():
  w = np.full((1, 32), 1e-7, np.float32)
  w[0, 0] = -2e-7
  p = rtn.fit(w, Grid(4, 32, "signed"))
  assert p.scale.item() == np.float16(6e-8)  # Not 0: the smallest float16 that there is.
  assert np.abs(fake_quant(w, Grid(4, 32, "signed"), p) - w).max() <= 3.1e-8
  w = np.full((1, 32), 1e-40, np.float32)  # Subnormal even in float32.
  assert np.isfinite(fake_quant(w, Grid(4, 32), rtn.fit(w, Grid(4, 32)))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(bad):
  w = np.zeros((300, 1024), np.float32)
  w[290, 1000] = bad
  with pytest.raises(ConfigError, match=rf"weight \[290, 1000\] is {bad}"):
    rtn.fit(w, Grid(4, 32))
  with pytest.raises(ConfigError, match=rf"weight \[290, 1000\] is {bad}"):
    quantize(w, Grid(4, 32), rtn.fit(np.nan_to_num(w, posinf=0, neginf=0), Grid(4, 32)))


def test_wrong_arguments_are_named():
  w = np.ones((2, 96), np.float32)
  with pytest.raises(ConfigError, match="bits=9"):
    Grid(9)
  with pytest.raises(ConfigError, match="group_size=0"):
    Grid(4, 0)
  with pytest.raises(ConfigError, match="rule='round'"):
    Grid(4, 8, "round")
  with pytest.raises(ConfigError, match="scale_dtype='int8'"):
    Grid(4, 8, "signed", "int8")
  with pytest.raises(ConfigError, match="group_size=64 does not divide.*K=96"):
    rtn.fit(w, Grid(4, 64))
  with pytest.raises(ConfigError, match="too large: its float16 scale"):
    rtn.fit(w * 1e7, Grid(4, 32))
  with pytest.raises(ConfigError, match=r"matrix \[N, K\]"):
    rtn.fit(w[0], Grid(4, 32))
  with pytest.raises(ConfigError, match="needs minimum"):
    quantize(w, Grid(4, 32, "minimum"), rtn.fit(w, Grid(4, 32)))
  with pytest.raises(ConfigError, match=r"shape \[2, 3\].*needs \[2, 1\]"):
    quantize(w, Grid(4, "channel"), rtn.fit(w, Grid(4, 32)))


RUNS = [
  (bits, group, rule)
  for bits in range(2, 9)
  for group in (8, 16, 32, 128, 256, "channel", "tensor")
  for rule in RULES
]


@pytest.mark.parametrize("bits, group, rule", RUNS)
def test_blocks_decode_to_the_same_bits_or_are_refused(bits, group, rule):
  grid = Grid(bits, group, rule)
  w = matrix("tailed", n=5, k=512, seed=bits)
  q = quantize(w, grid, rtn.fit(w, grid))
  size = group if isinstance(group, int) else 512
  runs = bits <= 4 or (rule != "minimum" and size % 32 == 0) or (bits == 5 and size % 32 == 0)
  if not runs:
    with pytest.raises(ConfigError, match="q4: .*q5_0: .*q5_1: .*q6_k: .*q8_0: "):
      to_blocks(q)
    return
  if bits == 8 and rule == "zero_point" and not (q.zero_point == 128).all():
    with pytest.raises(ConfigError, match="beyond int8"):
      to_blocks(q)
    return
  blocks = to_blocks(q)
  expected = {2: "q4", 3: "q4", 4: "q4", 5: "q5_1" if rule == "minimum" else "q5_0"}.get(bits)
  if rule == "zero_point" and bits > 4:
    expected = "q8_0"
  elif bits == 6 and size % 256 == 0:
    expected = "q6_k"
  assert blocks.format.startswith(expected or "q8_0")
  y = np.asarray(blocks.dequantize())
  np.testing.assert_array_equal(y, fake_quant(w, grid, q.parameters))
  assert isinstance(blocks.data, np.ndarray)


def test_q4_array_by_hand():
  codes = np.array([[1, 2, 15, 0]], np.uint8)
  p = Parameters(np.array([[2.0]], np.float16))
  array = to_q4_array(GroupArray(codes, p, Grid(4, 4, "signed")))
  assert array.packed.tolist() == [[0x21, 0x0F]] and array.minimum is None
  three = GroupArray(codes % 8, p, Grid(3, 4, "signed"))  # Codes 1 2 7 0 stand for -3 -2 3 -4.
  assert to_q4_array(three).packed.tolist() == [[0x65, 0x4B]]
  assert np.asarray(to_q4_array(three).dequantize()).tolist() == [[-6.0, -4.0, 6.0, -8.0]]


def test_refused_conversions_say_what_they_need():
  w = matrix("normal")
  q = quantize(w, Grid(6, 32, "minimum"), rtn.fit(w, Grid(6, 32, "minimum")))
  with pytest.raises(ConfigError, match="at most 4 bits; this matrix has 6 bits, groups of 32"):
    to_q4_array(q)
  with pytest.raises(ConfigError, match="it holds no minimum"):
    to_blocks(q, "q8_0")
  with pytest.raises(ConfigError, match="format='q3_k' is none of q4, q5_0"):
    to_blocks(q, "q3_k")
  wide = Grid(5, 32, "signed", "float32")
  with pytest.raises(ConfigError, match="its scales are float16"):
    to_blocks(quantize(w, wide, rtn.fit(w, wide)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("group", [32, "channel", "tensor"])
def test_records_hold_the_contract(rule, group):
  grid = Grid(4, group, rule)
  w = matrix("normal", n=4)
  q = quantize(w, grid, rtn.fit(w, grid))
  size = 32 if group == 32 else 256
  record = to_record("blk.0.attn_q.weight", grid, q.parameters, group_size=size)
  [back], _ = records.loads(records.dumps([record], {}), "here")
  # The contract as records.py states it, on the record's own numbers.
  low, high = records.RANGES[back.dtype]
  x = w if back.axis is not None else w.reshape(1, -1)
  x = x.reshape(*(back.scale.shape if back.axis is not None else (1, 1)), -1).astype(np.float64)
  scale, zero = (
    np.asarray(part, np.float64).reshape(x.shape[0], x.shape[1], 1)
    for part in (back.scale, back.zero_point)
  )
  if back.minimum is None:
    codes = (np.rint(x / scale) + zero).clip(low, high)
    y = scale * (codes - zero)
  else:
    minimum = back.minimum.astype(np.float64).reshape(scale.shape)
    y = scale * np.rint((x + minimum) / scale).clip(low, high) - minimum
  miss = y.reshape(w.shape) != q.dequantize()
  assert miss.mean() < 0.01  # Ties alone, which float32 and float64 may break apart.
  new_grid, p = from_record(back)
  assert (new_grid.bits, new_grid.group_size, new_grid.symmetric) == (4, group, grid.symmetric)
  np.testing.assert_array_equal(dequantize(q.codes, new_grid, p), q.dequantize())


def test_records_that_are_no_grid_are_refused():
  p = rtn.fit(matrix("normal"), Grid(4, 32))
  record = to_record("w", Grid(4, 32), p, group_size=32)
  with pytest.raises(ConfigError, match="axis -2"):
    from_record(dataclasses.replace(record, axis=-2))
  with pytest.raises(ConfigError, match="float16 does not hold"):
    from_record(dataclasses.replace(record, scale=record.scale + np.float32(1e-7)))
  assert json.dumps(record.to_json())


def test_bits_per_weight_count_all_metadata():
  w = matrix("normal", n=4, k=512)
  for grid, expected in [
    (Grid(4, 32, "signed"), 4.5),
    (Grid(4, 32, "minimum"), 5.0),
    (Grid(4, 64, "zero_point"), 4 + 20 / 64),
    (Grid(3, "channel", "absmax", "float32"), 3 + 32 / 512),
    (Grid(8, "tensor", "absmax"), 8 + 16 / 2048),
  ]:
    assert quantize(w, grid, rtn.fit(w, grid)).bits_per_weight == pytest.approx(expected)


def test_rows_do_not_depend_on_how_many_there_are():
  w = matrix("normal", n=600, k=1024)  # More than two runs of by_rows.
  for group in (64, "channel"):
    grid = Grid(4, group, "minimum")
    part = quantize(w[590:], grid, rtn.fit(w[590:], grid))
    whole = quantize(w, grid, rtn.fit(w, grid))
    np.testing.assert_array_equal(part.codes, whole.codes[590:])
    np.testing.assert_array_equal(part.dequantize(), whole.dequantize()[590:])


def test_bfloat16_is_that_of_ml_dtypes():
  p = rtn.fit(matrix("normal"), Grid(4, 32, "signed", "bfloat16"))
  assert p.scale.dtype == ml_dtypes.bfloat16
