"""AWQ: inputs that are large get finer steps, by scaling their weights up before rounding.

  s_k = mean|x_k|^alpha          W' = quantize(W s)          y = W' (x / s)

alpha is that of a grid on 0..1 with the least output error over a sample of inputs,

  E = |D X^T|^2 = tr(D H D^T),   D = W - W' / s,   H = X^T X

summed over matrices that read the same inputs (q, k and v), which must share s: x / s is made once,
by folding 1 / s into what writes x (a norm's weights, or the rows of the matrix before). Then, per
matrix, each group's range is shrunk by the factor that has the least error of the group's part of
the output. alpha = 0 is s = 1 to the bit. (Lin et al., arXiv:2306.00978.)
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from q4jax.errors import ConfigError
from q4jax.quant import rtn
from q4jax.quant.grid import (
  Fit,
  Floats,
  Grid,
  GroupArray,
  Parameters,
  checked,
  decode,
  encode,
  quantize,
)
from q4jax.quant.search import ranges, take

ALPHAS = tuple(i / 10 for i in range(11))


@dataclasses.dataclass(frozen=True, eq=False)
class AWQ:
  """What came of it.

  Attributes:
    scale: float32[K] > 0. `arrays` expect inputs divided by it.
    alpha: that scale comes of; all 1 for 0.
    arrays: W s on the grid, one for each matrix.
    error: E of `arrays`, summed over the matrices.
    start: the same of alpha = 0 without clipping; never less.
  """

  scale: Floats
  alpha: float
  arrays: list[GroupArray]
  error: float
  start: float


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
  """What is known of the inputs of matrices: a sample of them, or their second moments.

  Attributes:
    mean_abs: float32[K], the mean of |x| of each input.
    sample: float32[S, K], a few hundred inputs; or None.
    hessian: float32[K, K], X^T X or a multiple; or None where there is a sample.
  """

  mean_abs: Floats
  sample: Floats | None = None
  hessian: Floats | None = None

  @classmethod
  def of(cls, sample: Floats) -> "Inputs":
    """Of a sample [S, K] alone."""
    return cls(np.abs(sample).mean(axis=0, dtype=np.float64).astype(np.float32), sample)

  def error(self, d: Floats) -> NDArray[np.float64]:
    """Each row's E of errors d [N, K] in the weights: float64[N]."""
    if self.sample is not None:
      y = d @ self.sample.T
      return np.asarray(np.einsum("ns,ns->n", y, y, dtype=np.float64))
    assert self.hessian is not None
    return np.asarray(np.einsum("nk,nk->n", d @ self.hessian, d, dtype=np.float64))

  def within(self, size: int, scale: Floats) -> Floats:
    """The Hessian of each group of `size` inputs divided by `scale`: float32[G, size, size]."""
    k = len(scale)
    if self.sample is not None:
      x = (self.sample / scale).reshape(len(self.sample), -1, size).transpose(1, 0, 2)
      return np.asarray(x.transpose(0, 2, 1) @ x)
    assert self.hessian is not None
    starts = range(0, k, size)
    h = np.stack([self.hessian[i : i + size, i : i + size] for i in starts])
    s = scale.reshape(-1, size)
    return np.asarray(h / (s[:, :, None] * s[:, None, :]))

  def squares(self) -> Floats:
    """The mean square of each input, or a multiple: float32[K]."""
    if self.sample is not None:
      return np.asarray(np.square(self.sample).mean(axis=0))
    assert self.hessian is not None
    return np.diagonal(self.hessian).copy()


def quantize_awq(
  weights: Sequence[Floats],
  inputs: Inputs,
  grid: Grid,
  *,
  fit: Fit = rtn.fit,
  alphas: Sequence[float] = ALPHAS,
  clip: bool = True,
) -> AWQ:
  """Matrices float[N_i, K] that share their inputs, on a grid, with the scale of their inputs.

  Args:
    weights: one or more matrices.
    inputs: of all of them.
    grid: its groups divide K.
    fit: finds groups' parameters for each alpha; it is given mean (x / s)^2 as importance.
    alphas: of the grid; 0 is tried first, always.
    clip: whether groups' ranges are searched at the end. Rows keep what `fit` found where their
      whole output does not gain; a grid of one scale a tensor is not clipped.

  Raises:
    ConfigError: as rtn.fit; matrices or inputs that do not fit together.
  """
  k = _check(weights, inputs)
  for w in weights:
    checked(w)
    grid.groups(w.shape)
  best: AWQ | None = None
  squares = inputs.squares()
  for alpha in dict.fromkeys([0.0, *alphas]):
    s = scale_of(inputs.mean_abs, alpha)
    scaled = [np.asarray(w, np.float32) * s for w in weights]
    arrays = [
      quantize(w, grid, fit(w, grid, np.asarray(squares / np.square(s), np.float32)))
      for w in scaled
    ]
    pairs = zip(weights, arrays, strict=True)
    error = sum(float(inputs.error(w - a.dequantize() / s).sum()) for w, a in pairs)
    if best is None:
      best = AWQ(s, alpha, arrays, error, error)
    elif error < best.error:
      best = AWQ(s, alpha, arrays, error, best.start)
  assert best is not None
  if not clip or grid.group_size == "tensor":
    return best
  size = k if grid.group_size == "channel" else grid.group_size
  h = inputs.within(int(size), best.scale)
  pairs = zip(weights, best.arrays, strict=True)
  clipped = [_clipped(w, array, best.scale, inputs, h) for w, array in pairs]
  arrays = [array for array, _ in clipped]
  return dataclasses.replace(best, arrays=arrays, error=sum(error for _, error in clipped))


def scale_of(mean_abs: Floats, alpha: float) -> Floats:
  """mean|x|^alpha, normalised so that its extremes are reciprocal; float32[K], exactly 1 for 0."""
  # An input that was hardly active gives no measure: scales stay within 1e4 ^ alpha of the mean's.
  mean = mean_abs.astype(np.float64)
  s = np.maximum(mean, 1e-4 * (mean.mean() or 1)) ** alpha
  return np.asarray((s / np.sqrt(s.max() * s.min())).astype(np.float32))


def _clipped(
  w: Floats, array: GroupArray, s: Floats, inputs: Inputs, h: Floats
) -> tuple[GroupArray, float]:
  """The array with clipped groups, in the rows whose whole output gains, and its error."""
  grid = array.grid
  x = np.asarray(w, np.float32) * s
  clipped = quantize(x, grid, _clip(grid.split(x), array.parameters, grid, h))
  old, new = (inputs.error(w - a.dequantize() / s) for a in (array, clipped))
  better = new < old
  p = take(better[:, None], clipped.parameters, array.parameters)
  codes = np.where(better[:, None], clipped.codes, array.codes)
  return GroupArray(codes, p, grid), float(np.minimum(new, old).sum())


def _clip(x: Floats, start: Parameters, grid: Grid, h: Floats) -> Parameters:
  """For x [N, G, L] the parameters [N, G] of least error d H_gg d^T of each group of each row."""

  def error(p: Parameters) -> Floats:
    p = p.map(lambda part: part[..., None])
    d = (x - decode(encode(x, grid, p), grid, p)).transpose(1, 0, 2)
    return np.asarray(np.einsum("gnl,gnl->ng", d @ h, d))

  best, least = start, error(start)
  for p in ranges(x.min(axis=-1), x.max(axis=-1), grid):
    new = error(p)
    better = new < least
    best, least = take(better, p, best), np.where(better, new, least)
  return best


def _check(weights: Sequence[Floats], inputs: Inputs) -> int:
  k = len(inputs.mean_abs)
  shapes = [list(w.shape) for w in weights]
  if not weights or any(shape[-1:] != [k] for shape in shapes):
    raise ConfigError(f"matrices {shapes} must be one or more [N, K] with the K={k} of mean_abs.")
  if (inputs.sample is None) == (inputs.hessian is None):
    raise ConfigError("AWQ needs either a sample of inputs or their Hessian.")
  known = inputs.sample if inputs.sample is not None else inputs.hessian
  assert known is not None
  if known.ndim != 2 or known.shape[1] != k or (inputs.sample is None and len(known) != k):
    raise ConfigError(
      f"inputs are {list(known.shape)}: a sample is [S, {k}], a Hessian [{k}, {k}]."
    )
  if not np.isfinite(known).all() or not np.isfinite(inputs.mean_abs).all():
    raise ConfigError("inputs have values that are not finite; is the model's float run broken?")
  return k
