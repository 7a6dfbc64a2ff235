"""HQQ: parameters of groups without any data, robust to outliers, by half-quadratic splitting.

  minimise sum |e|^p + beta / 2 sum (e - (W - W'))^2        over e and the minimums, p < 1

W' = scale * code - minimum, with scales as the start has them. Three steps are repeated, none of
which raises the objective: codes are the nearest; e is W - W' shrunk by the proximal operator of
|e|^p / beta, which leaves large errors (outliers) alone; and the minimum moves by the mean of what
is left, e - (W - W'). So it falls monotonically. Badri & Shaji (mobiusml.github.io/hqq_blog, 2023)
instead grow beta each round and shrink by a generalised soft threshold, |e| - |e|^(p-1) / beta: the
first step of the iteration that finds the proximal operator here.

For the rule "minimum" alone: what moves is a real zero point.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from q4jax.errors import ConfigError
from q4jax.quant import rtn
from q4jax.quant.grid import Floats, Grid, Parameters, decode, encode, stored
from q4jax.quant.rows import by_rows


@dataclasses.dataclass(frozen=True)
class HQQ:
  """How hard to try.

  Attributes:
    p: of the norm, 0 < p < 1: the smaller, the less outliers count.
    beta: of the splitting, in units of each group's scale: errors below about beta^(-1/(2-p)) of
      a step are shrunk to 0.
    rounds: at most; a group stops moving when its objective does.
  """

  p: float = 0.7
  beta: float = 10.0
  rounds: int = 20

  def __post_init__(self) -> None:
    if not (0 < self.p < 1 and self.beta > 0 and self.rounds > 0):
      raise ConfigError(f"{self} needs 0 < p < 1, beta > 0 and rounds > 0.")


def fit(
  w: Floats, grid: Grid, importance: Floats | None = None, *, how: HQQ | None = None
) -> Parameters:
  """Parameters of float[N, K]; importance is not used.

  Raises:
    ConfigError: another rule than "minimum", or as rtn.fit.
  """
  how = how or HQQ()
  start = rtn.fit(w, grid)
  if start.minimum is None:
    raise ConfigError(f"HQQ moves real minimums: rule={grid.rule!r} must be 'minimum'.")
  if grid.group_size == "tensor":
    w = w.reshape(1, -1)
  groups = start.scale.shape[1]

  def chunk(first: int, last: int) -> NDArray:
    x = np.ascontiguousarray(w[first:last], np.float32).reshape(last - first, groups, -1)
    minimum, _ = solve(x, grid, start.rows(first, last), how)
    return minimum

  return stored(grid, start.scale, by_rows(chunk, w.shape))


def solve(
  x: Floats, grid: Grid, start: Parameters, how: HQQ
) -> tuple[Floats, list[NDArray[np.float64]]]:
  """Minimums [n, G] of groups x [n, G, L], float32, and the objective [n, G] after each round.

  The objective is in units of the scale, |e / scale|. It is that before minimums are rounded to
  their stored type.
  """
  assert start.minimum is not None
  scale = start.scale.astype(np.float32)
  step = np.where(scale == 0, 1, scale)[..., None]
  minimum = start.minimum.astype(np.float32)
  best, least = minimum, np.full(minimum.shape, np.inf)
  history = []
  for _ in range(how.rounds):
    p = Parameters(scale[..., None], minimum[..., None])
    miss = np.asarray((x - decode(encode(x, grid, p), grid, p)) / step, np.float32)
    e = shrink(miss, how.p, how.beta)
    rest = e - miss
    value = _power(np.abs(e), how.p).sum(axis=-1, dtype=np.float64)
    value += how.beta / 2 * np.square(rest).sum(axis=-1, dtype=np.float64)
    better = value < least
    best, least = np.where(better, minimum, best), np.minimum(value, least)
    history.append(value)
    if not better.any():
      break
    minimum = (minimum + rest.mean(axis=-1) * step[..., 0]).astype(np.float32)
  return best, history


def shrink(x: Floats, p: float, beta: float) -> Floats:
  """The e that minimises |e|^p + beta / 2 (e - x)^2, elementwise: 0, or the larger root.

  0 where |x| is at most t = (2 - p) / (2 (1 - p)) * (2 (1 - p) / beta)^(1 / (2 - p)); beyond it the
  root of e - |x| + p / beta e^(p-1), which is convex and grows: Newton's steps come down from |x|.
  """
  least = (2 * (1 - p) / beta) ** (1 / (2 - p))  # The smallest e that is not 0.
  threshold = least + p / beta * least ** (p - 1)
  beyond = np.abs(x) > threshold
  size = np.abs(x[beyond])
  e = size
  for _ in range(4):
    pull = np.float32(p / beta) * _power(e, p - 1)
    e = np.maximum(e - (e - size + pull) / (1 - np.float32(1 - p) * pull / e), np.float32(least))
  out = np.zeros_like(x)
  out[beyond] = np.copysign(e, x[beyond])
  return out


def _power(x: Floats, p: float) -> Floats:
  """x^p for x >= 0; 0^p is 0 for p > 0. exp and log are several times as fast as NumPy's power."""
  with np.errstate(divide="ignore"):
    return np.asarray(np.exp(np.float32(p) * np.log(x)))
