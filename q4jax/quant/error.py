"""How far quantised weights are from the original: measures of one matrix, by one function."""

import dataclasses
from typing import Any

import numpy as np

from q4jax.errors import ConfigError
from q4jax.quant.grid import Floats, Grid, GroupArray
from q4jax.quant.rows import CHUNK


@dataclasses.dataclass(frozen=True)
class WeightError:
  """Of w' against w, in float64.

  Attributes:
    relative: mean |w - w'| / mean |w|.
    relative_l2: |w - w'| / |w|.
    snr_db: 10 log10(|w|^2 / |w - w'|^2); inf where nothing was lost.
    mse: mean (w - w')^2.
    clipping: the part of mse from weights beyond the ends of their group's grid by more than half
      a step: a wider range would have lowered it. None where the grid is not known.
    rounding: the rest of mse; None likewise.
    largest: max |w - w'|.
    bpw: bits a weight, all metadata counted; None where it is not known.
  """

  relative: float
  relative_l2: float
  snr_db: float
  mse: float
  clipping: float | None
  rounding: float | None
  largest: float
  bpw: float | None

  def to_json(self) -> dict[str, Any]:
    """Of JSON's types; an SNR without end is None."""
    out = dataclasses.asdict(self)
    out["snr_db"] = self.snr_db if np.isfinite(self.snr_db) else None
    return out


def weight_error(
  w: Floats, quantised: Floats | GroupArray, *, bits_per_weight: float | None = None
) -> WeightError:
  """The error of a matrix.

  Args:
    w: float[N, K], the original.
    quantised: a matrix on a grid; or float[N, K] that any other format decodes to, such as
      kquants.quantize's blocks.
    bits_per_weight: of decoded weights, to be passed on.

  Raises:
    ConfigError: other shapes, or weights that are all 0 (which have no relative error).
  """
  if w.shape != quantised.shape or w.ndim != 2 or 0 in w.shape:
    raise ConfigError(
      f"the original is {list(w.shape)} and what it became {list(quantised.shape)}; they must be "
      "the same matrix [N, K]."
    )
  grid = quantised.grid if isinstance(quantised, GroupArray) else None
  total = np.zeros(5)  # |miss|, |w|, miss^2, w^2, clipped miss^2
  largest = 0.0
  rows = max(1, CHUNK // w.shape[1])
  for start in range(0, len(w), rows):
    x = w[start : start + rows].astype(np.float64)
    if isinstance(quantised, GroupArray):
      part = GroupArray(
        quantised.codes[start : start + rows],
        quantised.parameters.rows(start, start + rows),
        quantised.grid,
      )
      miss = x - part.dequantize()
      clipped = float(np.square(miss[_is_clipped(miss, part)]).sum())
    else:
      miss, clipped = x - quantised[start : start + rows], 0.0
    size = np.abs(miss)
    total += [
      size.sum(),
      np.abs(x).sum(),
      np.square(miss).sum(),
      np.square(x).sum(),
      clipped,
    ]
    largest = max(largest, float(size.max()))
  miss_1, w_1, miss_2, w_2, clipped_2 = total.tolist()
  if w_1 == 0:
    raise ConfigError("all weights are 0: they have no relative error.")
  with np.errstate(divide="ignore"):
    snr = 10 * float(np.log10(np.float64(w_2) / np.float64(miss_2)))
  if isinstance(quantised, GroupArray):
    bits_per_weight = quantised.bits_per_weight
  return WeightError(
    relative=miss_1 / w_1,
    relative_l2=float(np.sqrt(miss_2 / w_2)),
    snr_db=snr,
    mse=miss_2 / w.size,
    clipping=None if grid is None else clipped_2 / w.size,
    rounding=None if grid is None else (miss_2 - clipped_2) / w.size,
    largest=largest,
    bpw=bits_per_weight,
  )


def _is_clipped(miss: np.ndarray, part: GroupArray) -> np.ndarray:
  """Where a weight has an end code and is beyond it, by more than rounding explains."""
  grid: Grid = part.grid
  scale = np.repeat(part.scale.astype(np.float64), part.shape[1] // part.scale.shape[1], axis=1)
  # In steps, and in the direction in which codes grow, which a negative scale turns.
  steps = np.divide(miss, scale, out=np.zeros_like(miss), where=scale != 0)
  above = (part.codes == grid.top) & (steps > 0.5)
  below = (part.codes == 0) & (steps < -0.5)
  return np.asarray(above | below)
