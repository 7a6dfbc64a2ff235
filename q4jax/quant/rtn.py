"""Round to nearest: each group's parameters from its smallest and largest weight."""

import numpy as np

from q4jax.quant.grid import Floats, Grid, GroupArray, Parameters, checked, quantize, stored


def fit(w: Floats, grid: Grid, importance: Floats | None = None) -> Parameters:
  """Min-max parameters of float[N, K] by the grid's rule (see grid.py); importance is not used.

  Raises:
    ConfigError: weights that are not finite, too large, or of another shape than the grid's groups.
  """
  checked(w)
  groups = grid.split(w)
  return of_range(groups.min(axis=-1), groups.max(axis=-1), grid)


def of_range(low: Floats, high: Floats, grid: Grid) -> Parameters:
  """Parameters of groups whose weights lie in low..high."""
  low, high = low.astype(np.float32), high.astype(np.float32)
  if grid.rule == "signed":
    largest = np.where(-low > high, low, high)
    return stored(grid, largest / np.float32(-grid.half))
  if grid.rule == "absmax":
    return stored(grid, np.maximum(-low, high) / np.float32(grid.half - 1))
  top = np.float32(grid.top)
  # Halves, because the difference of two floats may be beyond float32's range.
  if grid.rule == "minimum":
    narrow = stored(grid, np.zeros_like(low), -low).minimum
    assert narrow is not None
    span = (high / 2 + narrow.astype(np.float32) / 2).clip(0)
    return stored(grid, span / (top / 2), -low)
  low, high = np.minimum(low, 0), np.maximum(high, 0)
  scale = stored(grid, (high / 2 - low / 2) / (top / 2)).scale
  step = scale.astype(np.float32)
  zero = np.rint(-low / np.where(step == 0, np.inf, step))
  return stored(grid, step, zero_point=zero)


def quantize_rtn(w: Floats, grid: Grid) -> GroupArray:
  """float[N, K] on the min-max grid."""
  return quantize(w, grid, fit(w, grid))
