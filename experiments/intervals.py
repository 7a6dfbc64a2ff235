"""Intervals of a mean by the bootstrap (Efron 1979): which means would other samples have given."""

import math
from collections.abc import Sequence

import numpy as np


def bootstrap(
  values: Sequence[float], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
  """The percentile interval of the mean of independent values; (nan, nan) of fewer than two."""
  x = np.asarray(values, np.float64)
  if x.size < 2:
    return math.nan, math.nan
  drawn = np.random.default_rng(seed).integers(0, x.size, (resamples, x.size))
  low, high = np.quantile(x[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)
