"""The measures of error against their formulas, and their parts."""

import json

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from q4jax.errors import ConfigError
from q4jax.quant import kquants, rtn
from q4jax.quant.error import weight_error
from q4jax.quant.grid import RULES, Grid, GroupArray, Parameters, quantize


def test_by_hand():
  # Steps of 1: -8..7. 9 is clipped to 7 (miss 2), 0.25 rounded to 0, the rest exact.
  w = np.array([[9.0, 0.25, -8.0, 1.0]], np.float32)
  grid = Grid(4, 4, "signed")
  q = quantize(w, grid, Parameters(np.ones((1, 1), np.float16)))
  e = weight_error(w, q)
  assert (e.relative, e.mse, e.largest) == (2.25 / 18.25, 4.0625 / 4, 2.0)
  assert (e.clipping, e.rounding, e.bpw) == (1.0, 0.0625 / 4, 8.0)
  np.testing.assert_allclose(e.relative_l2, np.sqrt(4.0625 / 146.0625))
  np.testing.assert_allclose(e.snr_db, 10 * np.log10(146.0625 / 4.0625))


def test_a_negative_scale_clips_at_the_other_end():
  w = np.array([[8.0, -9.0, 0.0, 1.0]], np.float32)  # scale -1: 8..-7.
  q = quantize(w, Grid(4, 4, "signed"), Parameters(-np.ones((1, 1), np.float16)))
  assert q.dequantize().tolist() == [[8.0, -7.0, 0.0, 1.0]]
  assert weight_error(w, q).clipping == 1.0


@given(
  st.integers(2, 8),
  st.sampled_from([8, 64, "channel", "tensor"]),
  st.sampled_from(RULES),
  st.floats(0.3, 1.2),
)
def test_parts_are_those_of_a_grid_without_ends(bits, group, rule, shrink):
  w = np.random.default_rng(bits).standard_normal((5, 128)).astype(np.float32)
  grid = Grid(bits, group, rule, "float32")
  p = rtn.of_range(grid.split(w).min(-1) * shrink, grid.split(w).max(-1) * shrink, grid)
  e = weight_error(w, quantize(w, grid, p))
  np.testing.assert_allclose(e.clipping + e.rounding, e.mse)
  # Where the nearest point of an endless grid is on the real one, the error is rounding.
  scale = p.scale.astype(np.float64)[..., None]
  x = grid.split(w) / scale
  zero = 0 if p.minimum is None else p.minimum[..., None] / scale
  code = np.rint(x + zero)
  if grid.symmetric:
    code += 2 ** (bits - 1)
  elif p.zero_point is not None:
    code += p.zero_point[..., None]
  inside = (code >= 0) & (code <= 2**bits - 1)
  miss = grid.split(w - quantize(w, grid, p).dequantize()).astype(np.float64)
  np.testing.assert_allclose(e.rounding, np.square(miss[inside]).sum() / w.size, rtol=1e-3)


def test_decoded_blocks_of_any_format():
  w = np.random.default_rng(0).standard_normal((600, 512)).astype(np.float32)
  blocks = kquants.quantize(w, "q4_k")
  y = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K)
  e = weight_error(w, y, bits_per_weight=4.5)
  np.testing.assert_allclose(e.mse, np.square(y.astype(np.float64) - w).mean())
  np.testing.assert_allclose(e.relative, np.abs(y - w).mean() / np.abs(w).mean(), rtol=1e-5)
  assert e.clipping is None and e.rounding is None and e.bpw == 4.5


def test_nothing_lost_and_json():
  w = np.ones((2, 32), np.float32)
  e = weight_error(w, w)
  assert e.snr_db == np.inf and e.mse == e.largest == 0
  assert json.loads(json.dumps(e.to_json(), allow_nan=False))["snr_db"] is None


def test_wrong_arguments_are_named():
  w = np.ones((2, 32), np.float32)
  with pytest.raises(ConfigError, match=r"\[2, 32\] and what it became \[2, 16\]"):
    weight_error(w, w[:, :16])
  with pytest.raises(ConfigError, match="no relative error"):
    weight_error(0 * w, w)
  q = GroupArray(np.zeros((2, 32), np.uint8), Parameters(np.ones((2, 1), np.float16)), Grid(4, 32))
  assert weight_error(w, q).largest == 9
