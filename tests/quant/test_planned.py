"""A format that is promised before the weights are seen is the one they get, bit for bit."""

import itertools

import numpy as np
import pytest

from q4jax.errors import ConfigError
from q4jax.quant.convert import as_planned, block_format
from q4jax.quant.grid import RULES, Grid
from q4jax.quant.rtn import quantize_rtn
from q4jax_kernels.block_array import block_shape

SIZES = (8, 16, 32, 64, 96, 256, "channel", "tensor")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_is_promised_is_made(bits: int, rule: str) -> None:
  rng = np.random.default_rng(bits)
  made = 0
  for size, k, dtype in itertools.product(SIZES, (96, 256, 768), ("float16", "float32")):
    if isinstance(size, int) and k % size:
      continue
    grid = Grid(bits, size, rule, dtype)
    try:
      format = block_format(grid, k)
    except ConfigError as error:
      assert "Choose another" in str(error) or "Above 4 bits" in str(error)
      continue
    # Whole numbers: float16 would hold their scales, and the promise must not depend on that.
    w = rng.integers(-7, 8, (3, k)).astype(np.float32) * 32
    array = quantize_rtn(w, grid)
    blocks = as_planned(array)
    assert blocks.format == format
    assert blocks.data.shape == (3, k // block_shape(format)[0] * block_shape(format)[1])
    np.testing.assert_array_equal(blocks.dequantize(), array.dequantize())
    made += 1
  none = (bits > 5 and rule == "minimum") or (bits == 8 and rule == "zero_point")
  assert bool(made) != none
