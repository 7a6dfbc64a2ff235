"""A histogram of fixed size whose range doubles: percentiles and best ranges of what streams by.

`bins` counts over -2^e..2^e, bins of width 2^(e+1) / bins. Where a value is beyond, e grows, and
neighbouring bins join: a bin's ends are multiples of its width, a power of two, so that the result
is exactly that of a histogram that had the last e from the start. Hence neither the order of
updates nor that of merges matters, to the bit.

Memory: 8 bytes a bin (a count of 64 bits as two of 32) and 12: 16 KiB for 2048 bins, whatever K.

  percentile(q)   the range that holds the middle q% of the values, to a bin's width
  mse(bits)       of least squared error, rounding within and clipping outside (Banner et al.,
                  arXiv:1810.05723, by trial)
  kl(bits)        symmetric, of least KL divergence between what was seen, clipped, and its rounded
                  form (Migacz, "8-bit inference with TensorRT", GTC 2017)
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from q4jax.errors import ConfigError
from q4jax.quant.observers import Observer, checked_range, seen_count

Float64s = NDArray[np.float64]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Histogram(Observer):
  """Of all values of all channels. See `Observer` (observers.py) for how to use it."""

  counts: jax.Array  # uint32[2, bins], low and high words
  exponent: jax.Array  # int32: bins are of -2^exponent..2^exponent
  low: jax.Array  # float32, the smallest value
  high: jax.Array  # float32

  @classmethod
  def init(cls, k: int | None = None, bins: int = 2048) -> Self:
    """An empty one; K does not matter."""
    if bins < 4 or bins % 4:
      raise ConfigError(f"bins={bins} must be a multiple of 4: quarters of a histogram move.")
    counts = jnp.zeros((2, bins), jnp.uint32)
    return cls(counts, jnp.int32(-126), jnp.float32(jnp.inf), jnp.float32(-jnp.inf))

  def update(self, x: jax.Array, valid: jax.Array | None = None) -> Self:
    x = x.astype(jnp.float32)
    keep = jnp.ones(x.shape, bool)
    if valid is not None:
      keep = jnp.broadcast_to(valid[..., None], x.shape)
    largest = jnp.where(keep, jnp.abs(x), 0).max()
    _, exponent = jnp.frexp(largest)  # largest < 2^exponent
    wide = self._widened(jnp.maximum(exponent, self.exponent))
    bins = self.counts.shape[1]
    # Powers of two: the products are exact, and a bin does not depend on how it was reached.
    at = jnp.floor(jnp.ldexp(x, -wide.exponent) * (bins // 2)).astype(jnp.int32)
    at = jnp.where(x < 0, jnp.minimum(at, -1), at) + bins // 2  # Where the product underflowed.
    at = jnp.where(keep, at.clip(0, bins - 1), bins)
    new = jnp.zeros(bins + 1, jnp.uint32).at[at.reshape(-1)].add(jnp.uint32(1))[:bins]
    return type(self)(
      _add(wide.counts, jnp.stack([new, jnp.zeros_like(new)])),
      wide.exponent,
      jnp.minimum(self.low, jnp.where(keep, x, jnp.inf).min()),
      jnp.maximum(self.high, jnp.where(keep, x, -jnp.inf).max()),
    )

  def merge(self, other: Self) -> Self:
    exponent = jnp.maximum(self.exponent, other.exponent)
    return type(self)(
      _add(self._widened(exponent).counts, other._widened(exponent).counts),
      exponent,
      jnp.minimum(self.low, other.low),
      jnp.maximum(self.high, other.high),
    )

  def _widened(self, exponent: jax.Array) -> Self:
    """With the range of another, larger exponent."""
    counts = jax.lax.fori_loop(0, exponent - self.exponent, _doubled, self.counts)
    return dataclasses.replace(self, counts=counts, exponent=exponent)

  def bins(self) -> tuple[Float64s, Float64s]:
    """(counts [bins], edges [bins + 1]), exact up to 2^53 values. ConfigError as `range`."""
    low, high = np.asarray(self.counts).astype(np.float64)
    counts = low + 2.0**32 * high
    seen_count(counts.sum())
    checked_range(self.low, self.high)
    half = len(counts) // 2
    return counts, np.ldexp(np.arange(-half, half + 1) / half, int(self.exponent))

  def range(self) -> tuple[float, float]:
    """The smallest and largest value. ConfigError: none was seen, or one that is not finite."""
    self.bins()
    return float(self.low), float(self.high)

  def percentile(self, q: float) -> tuple[float, float]:
    """The range that leaves out (100 - q) / 2 percent of values at either side; 0 < q <= 100."""
    if not 0 < q <= 100:
      raise ConfigError(f"q={q} is no percentile: 0 < q <= 100.")
    counts, edges = self.bins()
    total, (low, high) = np.cumsum(counts), self.range()
    out = (100 - q) / 200 * total[-1]
    first = int(np.searchsorted(total, out, side="right"))
    last = int(np.searchsorted(total, total[-1] - out, side="left"))
    return max(low, float(edges[first])), min(high, float(edges[last + 1]))

  def mse(self, bits: int, *, symmetric: bool = False, steps: int = 200) -> tuple[float, float]:
    """The range, shrunk from what was seen, whose 2^bits points have the least squared error.

    Symmetric ranges have codes -2^(bits-1)..2^(bits-1)-1 and a step of high / (2^(bits-1) - 1).
    """
    counts, edges = self.bins()
    used = counts > 0
    counts, x = counts[used], ((edges[1:] + edges[:-1]) / 2)[used]
    low, high = min(self.range()[0], 0.0), max(self.range()[1], 0.0)
    if symmetric:
      high = max(-low, high)
      low = -high
    if low == high:
      return low, high
    levels = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    best, least = (low, high), np.inf
    for f in np.linspace(1, 1 / steps, steps):
      scale = f * high / levels if symmetric else f * (high - low) / levels
      zero = 0 if symmetric else np.rint(-f * low / scale)
      ends = (-levels - 1, levels) if symmetric else (-zero, levels - zero)
      y = np.rint(x / scale).clip(*ends) * scale
      error = float(counts @ np.square(x - y))
      if error < least:
        best, least = (float(f * low), float(f * high)), error
    return best

  def kl(self, bits: int) -> tuple[float, float]:
    """(-t, t); (0, t) where nothing was below 0. ConfigError: fewer than 2^bits bins."""
    counts, edges = self.bins()
    half = len(counts) // 2
    # |x|, in bins of the same width; 0 itself tells nothing of the shape that rounding has to keep.
    size = counts[half:] + counts[:half][::-1]
    size[0] = size[1]
    levels = 2 ** (bits - 1) if self.range()[0] < 0 else 2**bits
    if levels > half:
      raise ConfigError(f"{len(counts)} bins are too few for {bits} bits: take {2 * levels}.")
    last = int(np.flatnonzero(size).max(initial=levels - 1)) + 1
    stops = range(levels, max(last, levels) + 1)
    divergences = [_divergence(size, stop, levels) for stop in stops]
    t = min(float(edges[half + stops[int(np.argmin(divergences))]]), max(map(abs, self.range())))
    return (-t if self.range()[0] < 0 else 0.0), t


def _doubled(_: jax.Array, counts: jax.Array) -> jax.Array:
  """Counts over a range twice as wide. Not a closure: `fori_loop` would compile each anew."""
  quarter = counts.shape[1] // 4
  return jnp.pad(_add(counts[:, 0::2], counts[:, 1::2]), ((0, 0), (quarter, quarter)))


def _add(a: jax.Array, b: jax.Array) -> jax.Array:
  """Sums of counts uint32[2, n] of two words."""
  low = a[0] + b[0]
  return jnp.stack([low, a[1] + b[1] + (low < a[0]).astype(jnp.uint32)])


def _divergence(size: Float64s, stop: int, levels: int) -> float:
  """KL(P, Q): P the first `stop` bins and what is beyond in the last of them; Q these at `levels`.

  A level's count is spread evenly over those of its bins that are not empty.
  """
  p = size[:stop].copy()
  level = np.arange(stop) * levels // stop
  used = (p > 0).astype(np.float64)
  sums = np.bincount(level, p, levels)
  q = np.where(used > 0, (sums / np.maximum(np.bincount(level, used, levels), 1))[level], 0)
  p[-1] += size[stop:].sum()
  both = p > 0
  # What is clipped lands in a bin that may have been empty: a small count there, not infinity.
  q = np.where(both & (q == 0), 1e-4, q)
  p, q = p[both] / p.sum(), q[both] / q.sum()
  return float((p * np.log(p / q)).sum())
