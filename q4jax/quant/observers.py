"""Statistics of activations (or weights) that stream by: pure pytrees, a few arrays of fixed size.

  state = MinMax.init(K)
  state = state.update(x, valid)     x float[..., K]; valid bool[...], False where x is padding
  state = state.merge(other)         as if one had seen what both saw
  state.nbytes                       what it takes, whatever it has seen

`update` and `merge` run under jit. In which order batches come does not matter but for rounding.
Sums are float32: a million tokens cost them about 1e-5 of their value. Counts are uint32 of rows
(tokens): they wrap after 4.29e9. Histograms, from which percentiles and the ranges of least KL
divergence and squared error are read: histogram.py.

  MinMax          8 K bytes         smallest and largest value of each channel
  MovingAverage   8 K + 4           means of each sequence's smallest and largest values
  Moments         8 K + 4           mean |x| and mean x^2 of each channel (the imatrix)
  Hessian         4 K^2 + 4         X^T X
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from q4jax.errors import ConfigError

Floats = NDArray[np.float32]


class Observer:
  """What all have in common."""

  @property
  def nbytes(self) -> int:
    """Bytes of the state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinMax(Observer):
  """The smallest and largest value of each channel."""

  low: jax.Array  # float32[K], inf before anything is seen
  high: jax.Array  # float32[K], -inf

  @classmethod
  def init(cls, k: int) -> Self:
    return cls(jnp.full(k, jnp.inf), jnp.full(k, -jnp.inf))

  def update(self, x: jax.Array, valid: jax.Array | None = None) -> Self:
    low, high = _extremes(x, valid, tuple(range(x.ndim - 1)))
    return type(self)(jnp.minimum(self.low, low), jnp.maximum(self.high, high))

  def merge(self, other: Self) -> Self:
    return type(self)(jnp.minimum(self.low, other.low), jnp.maximum(self.high, other.high))

  def range(self) -> tuple[Floats, Floats]:
    """(low, high) float32[K]. ConfigError: nothing was seen, or values that are not finite."""
    return checked_range(self.low, self.high)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MovingAverage(Observer):
  """The mean over sequences of each channel's smallest and largest value.

  All sequences weigh the same: the usual exponential average depends on their order, cannot be
  merged, and forgets. Sequences are x's first axis where it has three or more; otherwise x is one.
  """

  low: jax.Array  # float32[K], the sum of smallest values
  high: jax.Array  # float32[K]
  sequences: jax.Array  # uint32

  @classmethod
  def init(cls, k: int) -> Self:
    return cls(jnp.zeros(k), jnp.zeros(k), jnp.uint32(0))

  def update(self, x: jax.Array, valid: jax.Array | None = None) -> Self:
    if x.ndim < 3:
      x, valid = x[None], None if valid is None else valid[None]
    low, high = _extremes(x, valid, tuple(range(1, x.ndim - 1)))
    seen = low <= high  # A sequence of padding alone has no extremes; NaN is seen, and stays.
    seen = (seen | jnp.isnan(low)).any(axis=-1)
    return type(self)(
      self.low + jnp.where(seen[:, None], low, 0).sum(axis=0),
      self.high + jnp.where(seen[:, None], high, 0).sum(axis=0),
      self.sequences + seen.sum(dtype=jnp.uint32),
    )

  def merge(self, other: Self) -> Self:
    return jax.tree.map(jnp.add, self, other)

  def range(self) -> tuple[Floats, Floats]:
    """(low, high) float32[K]. ConfigError: nothing was seen, or values that are not finite."""
    count = seen_count(self.sequences)
    return checked_range(self.low / count, self.high / count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments(Observer):
  """Sums of |x| and x^2 of each channel."""

  absolute: jax.Array  # float32[K]
  square: jax.Array  # float32[K]
  count: jax.Array  # uint32, rows

  @classmethod
  def init(cls, k: int) -> Self:
    return cls(jnp.zeros(k), jnp.zeros(k), jnp.uint32(0))

  def update(self, x: jax.Array, valid: jax.Array | None = None) -> Self:
    rows, count = _rows(x, valid)
    return type(self)(
      self.absolute + jnp.abs(rows).sum(axis=0),
      self.square + jnp.square(rows).sum(axis=0),
      self.count + count,
    )

  def merge(self, other: Self) -> Self:
    return jax.tree.map(jnp.add, self, other)

  def mean_abs(self) -> Floats:
    """float32[K]: what AWQ's scales come of. ConfigError as `range`."""
    return _finite(np.asarray(self.absolute) / np.float32(seen_count(self.count)))

  def mean_square(self) -> Floats:
    """float32[K]: the importance of inputs, llama.cpp's imatrix. ConfigError as `range`."""
    return _finite(np.asarray(self.square) / np.float32(seen_count(self.count)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hessian(Observer):
  """X^T X of all rows seen. Donate it to the jitted update: it is large (4096 channels: 64 MiB)."""

  total: jax.Array  # float32[K, K]
  count: jax.Array  # uint32, rows

  @classmethod
  def init(cls, k: int) -> Self:
    return cls(jnp.zeros((k, k)), jnp.uint32(0))

  def update(self, x: jax.Array, valid: jax.Array | None = None) -> Self:
    rows, count = _rows(x, valid)
    product = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
    return type(self)(self.total + product, self.count + count)

  def merge(self, other: Self) -> Self:
    return jax.tree.map(jnp.add, self, other)

  def mean(self) -> Floats:
    """X^T X / rows, float32[K, K]. ConfigError as `range`."""
    return _finite(np.asarray(self.total) / np.float32(seen_count(self.count)))


def _rows(x: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """x as float32[rows, K], 0 where it is padding, and how many rows are not."""
  rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
  if valid is None:
    return rows, jnp.uint32(len(rows))
  keep = valid.reshape(-1)
  return jnp.where(keep[:, None], rows, 0), keep.sum(dtype=jnp.uint32)


def _extremes(
  x: jax.Array, valid: jax.Array | None, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  x = x.astype(jnp.float32)
  keep = jnp.ones(x.shape[:-1], bool) if valid is None else valid
  low = jnp.where(keep[..., None], x, jnp.inf).min(axis=axes)
  return low, jnp.where(keep[..., None], x, -jnp.inf).max(axis=axes)


def seen_count(count: Any) -> int:
  """The count, if there is one; else ConfigError."""
  if not int(count):
    raise ConfigError("nothing was observed; run the model over a text first.")
  return int(count)


def checked_range(low: Any, high: Any) -> tuple[Floats, Floats]:
  """(low, high) as float32, if they are a range; else ConfigError."""
  low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
  if np.isinf(low).any() and (low > high).any():
    seen_count(0)
  return _finite(low), _finite(high)


def _finite(x: NDArray) -> Floats:
  if not np.isfinite(x).all():
    raise ConfigError(
      "values that are not finite were observed: the model's float run is broken (or its sums are "
      "beyond float32)."
    )
  return x.astype(np.float32)
