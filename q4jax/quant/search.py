"""Clip search: each group's parameters of least squared error, weighted by importance.

  E = sum importance * (w - w')^2

over a group. The range of the min-max start is shrunk (or stretched) by each of a few factors;
weights outside it are clipped. The codes that a range gives then get the scale (and minimum) that
least squares finds best for them, and the weights get new codes. Whatever is tried is rounded to
its stored type first and its E is that of the decoded weights, so that the result is never worse
than the start (rtn.fit). The least squares step is that of the k-quants (see kquants.py).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from q4jax.errors import ConfigError
from q4jax.quant import rtn
from q4jax.quant.grid import Floats, Grid, Parameters, checked, decode, encode, stored
from q4jax.quant.rows import by_rows

# The range shrinks to this at most: the fewer the codes, the more clipping pays.
_SMALLEST = {2: 0.3, 3: 0.5, 4: 0.65, 5: 0.75, 6: 0.8, 7: 0.85, 8: 0.9}
_STEPS = 10
# E is summed in float32: a difference below its rounding is no improvement.
_MARGIN = np.float32(1 - 1e-5)


def fit(
  w: Floats, grid: Grid, importance: Floats | None = None, *, steps: int = _STEPS, refits: int = 1
) -> Parameters:
  """Parameters of float[N, K] of locally least weighted error.

  Args:
    w: float[N, K].
    grid: its groups divide K.
    importance: float[K] >= 0, e.g. the mean squared activation; equal weights when None.
    steps: ranges that are tried; time grows in proportion.
    refits: least squares steps for each.

  Raises:
    ConfigError: as rtn.fit; or an importance that is not K finite values >= 0.
  """
  checked(w)
  _, groups = grid.groups(w.shape)
  weight = checked_importance(importance, w.shape[1])
  if grid.group_size == "tensor":
    weight, w = np.tile(weight, len(w)), w.reshape(1, -1)
  weight = weight.reshape(groups, -1)
  factors = np.linspace(1.05, _SMALLEST[grid.bits], steps, dtype=np.float32)

  def chunk(start: int, stop: int) -> NDArray:
    # Contiguous: sums round otherwise in another order.
    x = np.ascontiguousarray(w[start:stop], np.float32).reshape(stop - start, groups, -1)
    return _pack(_search(x, weight, grid, factors, refits))

  return _unpack(by_rows(chunk, w.shape), grid)


def checked_importance(importance: Floats | None, k: int) -> Floats:
  """float32[K] with mean 1 (all 1 for None); ConfigError for other shapes and values."""
  if importance is None:
    return np.ones(k, np.float32)
  if importance.shape != (k,) or not np.isfinite(importance).all() or (importance < 0).any():
    raise ConfigError(
      f"importance must be {k} finite values >= 0, one for each input; found shape "
      f"{list(importance.shape)}, lowest {importance.min(initial=np.inf):.3g}."
    )
  mean = float(importance.mean(dtype=np.float64))
  return (importance.astype(np.float64) / (mean or 1)).astype(np.float32)


def _search(x: Floats, weight: Floats, grid: Grid, factors: Floats, refits: int) -> Parameters:
  """Of groups x [n, G, L], weight [G, L]: parameters [n, G]."""
  low, high = x.min(axis=-1), x.max(axis=-1)
  best = rtn.of_range(low, high, grid)
  error, _ = _evaluate(x, weight, grid, best)
  for start in _starts(low, high, grid, factors):
    p = start
    for attempt in range(1 + refits):
      new_error, codes = _evaluate(x, weight, grid, p)
      better = new_error < error * _MARGIN
      best = _where(better, p, best)
      error = np.where(better, new_error, error)
      if attempt < refits:
        p = _refit(x, weight, grid, p, codes)
  return best


def _starts(low: Floats, high: Floats, grid: Grid, factors: Floats) -> Iterator[Parameters]:
  """Parameters of ranges that are `factors` as wide."""
  for f in factors:
    if grid.rule == "minimum":
      # About the middle; halves first, for a sum of two floats may overflow.
      middle, half = low / 2 + high / 2, (high / 2 - low / 2) * f
      yield rtn.of_range(middle - half, middle + half, grid)
    elif grid.rule == "zero_point":
      p = rtn.of_range(low * f, high * f, grid)
      yield p
      # The other neighbour: the end that matters more may be the one that rounding left out.
      assert p.zero_point is not None
      step = p.scale.astype(np.float32)
      real = -np.minimum(low * f, 0) / np.where(step == 0, np.inf, step)
      other = p.zero_point + np.where(real > p.zero_point, 1, -1)
      yield Parameters(p.scale, zero_point=other.clip(0, grid.top).astype(np.uint8))
    else:
      yield rtn.of_range(low * f, high * f, grid)
      if grid.rule == "signed":  # Or the other way: the largest weight at the shorter side.
        largest = np.where(-low > high, low, high)
        yield stored(grid, largest * f / np.float32(grid.half - 1))


def _evaluate(x: Floats, weight: Floats, grid: Grid, p: Parameters) -> tuple[Floats, Floats]:
  """E of each group [n, G], and the codes as floats [n, G, L]."""
  p = p.map(lambda part: part[..., None])
  codes = encode(x, grid, p)
  miss = decode(codes, grid, p)
  miss -= x
  with np.errstate(over="ignore"):
    np.square(miss, out=miss)
    return _total(miss, weight), codes


def _refit(x: Floats, weight: Floats, grid: Grid, p: Parameters, codes: Floats) -> Parameters:
  """Least squares of x on the codes; where it has no solution, p."""
  with np.errstate(over="ignore", invalid="ignore"):
    if grid.rule != "minimum":
      zero = np.float32(grid.half) if p.zero_point is None else p.zero_point[..., None]
      q = codes - zero.astype(np.float32)
      wq = weight * q
      scale = _divide(_total(wq, x), _total(wq, q))
      return stored(grid, _usable(scale, p.scale), zero_point=p.zero_point)
    assert p.minimum is not None
    old = p.minimum.astype(np.float32)
    # About the old minimum: the sums then do not cancel where weights lie far from 0.
    from_old = x + old[..., None]
    wq, wx = weight * codes, weight * from_old
    total, sum_q, sum_x = weight.sum(axis=-1), wq.sum(axis=-1), wx.sum(axis=-1)
    det = total * _total(wq, codes) - sum_q * sum_q
    scale = _divide(total * _total(wq, from_old) - sum_x * sum_q, det)
    usable = np.isfinite(scale) & (scale > 0)
    minimum = np.where(usable, _divide(scale * sum_q - sum_x, total) + old, old)
  return stored(grid, _usable(np.where(usable, scale, 0), p.scale), minimum)


def _usable(scale: NDArray, old: NDArray) -> NDArray:
  return np.where(np.isfinite(scale) & (scale != 0), scale, old.astype(np.float32))


def _total(a: Floats, b: Floats) -> Floats:
  """The sum of a * b over the last axis."""
  # A long sum in float32 would err by more than the margin.
  dtype = np.float64 if a.shape[-1] > 4096 else np.float32
  return np.asarray(np.einsum("...l,...l->...", a, b, dtype=dtype).astype(np.float32))


def _divide(a: Floats, b: Floats) -> Floats:
  """a / b, and 0 where b is 0."""
  return np.divide(
    a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0
  )


def _where(better: NDArray, new: Parameters, old: Parameters) -> Parameters:
  def pick(a: NDArray | None, b: NDArray | None) -> NDArray | None:
    return None if a is None or b is None else np.where(better, a, b)

  scale = np.where(better, new.scale, old.scale)
  return Parameters(scale, pick(new.minimum, old.minimum), pick(new.zero_point, old.zero_point))


def _pack(p: Parameters) -> NDArray:
  """As one array [n, 3, G], for `by_rows`."""
  none = np.zeros_like(p.scale, np.float32)
  parts = (p.scale, p.minimum, p.zero_point)
  return np.stack([none if q is None else q.astype(np.float32) for q in parts], axis=1)


def _unpack(packed: NDArray, grid: Grid) -> Parameters:
  scale, minimum, zero = packed.transpose(1, 0, 2)
  return stored(
    grid,
    scale,
    minimum if grid.rule == "minimum" else None,
    zero if grid.rule == "zero_point" else None,
  )
