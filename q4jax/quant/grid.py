"""The group-wise integer grid: codes of 2 to 8 bits with a scale a group, and what they stand for.

  w = scale * (code - 2^(bits-1))      rules "signed" and "absmax" (symmetric)
  w = scale * code - minimum           rule "minimum", minimum of the scale's type
  w = scale * (code - zero_point)      rule "zero_point", an integer 0..2^bits-1

in float32 in this order, so that the blocks of `convert.to_blocks` decode to the same bits. Codes
are 0..2^bits-1 under every rule. Scales and minimums are rounded to their stored type before codes
are chosen: a weight gets the nearest point of the grid that is stored, not of an ideal one.

How a method finds scales is its own matter (a `Fit`: rtn.fit, search.fit); the rule says which
the plain min-max start has, with top = 2^bits - 1 and half = 2^(bits-1):

  signed       max|w| / half, signed such that the largest weight has code 0, the longer side
  absmax       max|w| / (half - 1), the range is symmetric
  minimum      (max - min) / top
  zero_point   (max - min) / top over a range that holds 0
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from q4jax.errors import ConfigError
from q4jax.quant.rows import by_rows

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Rule = Literal["signed", "absmax", "minimum", "zero_point"]
RULES: tuple[Rule, ...] = ("signed", "absmax", "minimum", "zero_point")
_SCALE_DTYPES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Grid:
  """How weights are made integers; which integers, a `Parameters` says.

  Attributes:
    bits: 2..8.
    group_size: neighbours along K that share parameters, "channel" for a row's, "tensor" for all.
    rule: see the module.
    scale_dtype: "float16", "bfloat16" or "float32", of scales and minimums as they are stored.
  """

  bits: int = 4
  group_size: int | Literal["channel", "tensor"] = 128
  rule: Rule = "signed"
  scale_dtype: str = "float16"

  def __post_init__(self) -> None:
    size = self.group_size
    if self.bits not in range(2, 9):
      raise ConfigError(f"bits={self.bits} is not a grid's; choose 2..8.")
    if size not in ("channel", "tensor") and not (isinstance(size, int) and size > 0):
      raise ConfigError(f"group_size={size!r} must be 'channel', 'tensor' or a number above 0.")
    if self.rule not in RULES:
      raise ConfigError(f"rule={self.rule!r} is none of {', '.join(RULES)}.")
    if self.scale_dtype not in _SCALE_DTYPES:
      raise ConfigError(f"scale_dtype={self.scale_dtype!r} is none of {', '.join(_SCALE_DTYPES)}.")

  @property
  def symmetric(self) -> bool:
    return self.rule in ("signed", "absmax")

  @property
  def top(self) -> int:
    """The largest code."""
    return 2**self.bits - 1

  @property
  def half(self) -> int:
    """The code that stands for 0 under a symmetric rule."""
    return 2 ** (self.bits - 1)

  def groups(self, shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the parameters of a matrix [N, K]: (N, G), (N, 1) or (1, 1).

    Raises:
      ConfigError: not a matrix, an empty one, or groups that do not divide K.
    """
    if len(shape) != 2 or 0 in shape:
      raise ConfigError(f"A grid is for a matrix [N, K] with weights in it; found {list(shape)}.")
    n, k = shape
    if self.group_size == "tensor":
      return 1, 1
    size = k if self.group_size == "channel" else self.group_size
    if k % size:
      raise ConfigError(f"group_size={size} does not divide the rows of {list(shape)}: K={k}.")
    return n, k // size

  def split(self, w: NDArray) -> NDArray:
    """[N, K] as [rows, G, L]: `groups` of L weights that share parameters, a view."""
    rows, groups = self.groups(w.shape)
    return w.reshape(rows, groups, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Parameters:
  """What the groups of a matrix share, as it is stored: each [N, G], [N, 1] or [1, 1]."""

  scale: NDArray  # of the grid's scale_dtype; negative ones occur under "signed"
  minimum: NDArray | None = None  # as scale, under "minimum"
  zero_point: Bytes | None = None  # 0..top, under "zero_point"

  def rows(self, start: int, stop: int) -> "Parameters":
    """Of some rows of the matrix; one set that serves the whole matrix serves them too."""
    if len(self.scale) == 1:
      return self
    return self.map(lambda x: x[start:stop])

  def map(self, function: Callable[[NDArray], NDArray]) -> "Parameters":
    """With `function` of each array."""
    parts = (self.scale, self.minimum, self.zero_point)
    return Parameters(*(None if part is None else function(part) for part in parts))  # type: ignore[arg-type]


class Fit(Protocol):
  """A method that finds parameters of groups, each from its own weights."""

  def __call__(self, w: Floats, grid: Grid, importance: Floats | None = None) -> Parameters:
    """Of float32[N, K]; `importance` float32[K] weighs squared errors where the method can."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class GroupArray:
  """A float matrix [N, K] on a grid."""

  codes: Bytes  # uint8[N, K], 0..top
  parameters: Parameters
  grid: Grid

  @property
  def shape(self) -> tuple[int, int]:
    """(N, K)."""
    n, k = self.codes.shape
    return n, k

  @property
  def scale(self) -> NDArray:
    return self.parameters.scale

  @property
  def minimum(self) -> NDArray | None:
    return self.parameters.minimum

  @property
  def zero_point(self) -> Bytes | None:
    return self.parameters.zero_point

  @property
  def bits_per_weight(self) -> float:
    """Of packed codes, scales, minimums and zero points (of `bits` bits each)."""
    factors = self.scale.size * 8 * self.scale.dtype.itemsize * (1 if self.minimum is None else 2)
    zeros = 0 if self.zero_point is None else self.zero_point.size * self.grid.bits
    return self.grid.bits + (factors + zeros) / self.codes.size

  def dequantize(self) -> Floats:
    """float32[N, K], by the law of the module."""
    return dequantize(self.codes, self.grid, self.parameters)


def stored(
  grid: Grid, scale: NDArray, minimum: NDArray | None = None, zero_point: NDArray | None = None
) -> Parameters:
  """Real parameters as the grid stores them.

  A scale other than 0 stays so: it becomes the smallest that there is, with which small codes work.

  Raises:
    ConfigError: a scale or minimum beyond the type's range.
  """
  dtype = jnp.dtype(grid.scale_dtype)
  with np.errstate(over="ignore"):
    narrow = scale.astype(dtype)
    smallest = np.copysign(np.float32(jnp.finfo(dtype).smallest_subnormal), scale).astype(dtype)
    narrow = np.where((narrow == 0) & (scale != 0), smallest, narrow)
    parts = [narrow] if minimum is None else [narrow, minimum.astype(dtype)]
  for part, real in zip(parts, (scale, minimum), strict=False):
    if real is not None and not np.isfinite(part.astype(np.float32)).all():
      raise ConfigError(
        f"a weight is too large: its {grid.scale_dtype} scale or minimum would be "
        f"{np.abs(real).max():.3g}. Rescale the weights or choose a wider scale_dtype."
      )
  zeros = None if zero_point is None else zero_point.clip(0, grid.top).astype(np.uint8)
  return Parameters(parts[0], parts[1] if minimum is not None else None, zeros)


def encode(x: Floats, grid: Grid, p: Parameters) -> Floats:
  """The nearest codes, as floats, of x [..., L]; parameters [..., 1] broadcast against it.

  Where a scale is 0 the code stands for 0 (under "minimum": is 0).
  """
  scale = p.scale.astype(np.float32)
  if p.minimum is not None:
    x = x + p.minimum.astype(np.float32)
  with np.errstate(over="ignore"):
    codes: NDArray = x / np.where(scale == 0, np.float32(np.inf), scale)
  np.rint(codes, out=codes)
  codes += _zero(grid, p)
  return np.clip(codes, 0, grid.top, out=codes)


def decode(codes: NDArray, grid: Grid, p: Parameters) -> Floats:
  """What codes [..., L] stand for; parameters [..., 1] broadcast against them."""
  scale = p.scale.astype(np.float32)
  codes = codes.astype(np.float32)
  if p.minimum is not None:
    return np.asarray(scale * codes - p.minimum.astype(np.float32))
  return np.asarray(scale * (codes - _zero(grid, p)))


def _zero(grid: Grid, p: Parameters) -> NDArray | np.float32:
  """The code that stands for 0; 0 under "minimum", which has none."""
  if p.zero_point is not None:
    return p.zero_point.astype(np.float32)
  return np.float32(grid.half if grid.symmetric else 0)


def quantize(w: Floats, grid: Grid, p: Parameters) -> GroupArray:
  """The nearest codes on a grid whose parameters are known.

  Args:
    w: float[N, K].
    grid: its groups divide K.
    p: e.g. of `rtn.fit(w, grid)`.

  Raises:
    ConfigError: a weight that is not finite; parameters of another shape or rule.
  """
  checked(w)
  check_parameters(w.shape, grid, p)

  def chunk(start: int, stop: int) -> Bytes:
    x, of_rows = grouped(w[start:stop], grid, p.rows(start, stop))
    return encode(x, grid, of_rows).astype(np.uint8).reshape(stop - start, -1)

  return GroupArray(by_rows(chunk, w.shape), p, grid)


def dequantize(codes: Bytes, grid: Grid, p: Parameters) -> Floats:
  """float32[N, K], by the law of the module."""

  def chunk(start: int, stop: int) -> Floats:
    groups, of_rows = grouped(codes[start:stop], grid, p.rows(start, stop))
    return decode(groups, grid, of_rows).reshape(stop - start, -1)

  return by_rows(chunk, codes.shape)


def fake_quant(w: Floats, grid: Grid, p: Parameters) -> Floats:
  """Weights as the quantised matrix has them, float32[N, K]: bit-equal to what is exported."""
  return quantize(w, grid, p).dequantize()


def grouped(x: NDArray, grid: Grid, p: Parameters) -> tuple[NDArray, Parameters]:
  """Rows [n, K] as [n, G, L], float32 if they are floats, and their parameters as [n, G, 1]."""
  if x.dtype != np.uint8:
    x = np.asarray(x, np.float32)
  # A tensor's single scale serves each row as one group.
  return x.reshape(len(x), p.scale.shape[1], -1), p.map(lambda part: part[..., None])


def checked(w: Floats) -> None:
  """Raises ConfigError naming the first weight of [N, K] that is not finite."""

  def finite(start: int, stop: int) -> NDArray:
    return np.asarray(np.isfinite(w[start:stop]).all(axis=1))

  if w.ndim != 2 or 0 in w.shape:
    raise ConfigError(f"A grid is for a matrix [N, K] with weights in it; found {list(w.shape)}.")
  rows = by_rows(finite, w.shape)
  if not rows.all():
    row = int(rows.argmin())
    column = int(np.isfinite(w[row]).argmin())
    raise ConfigError(
      f"weight [{row}, {column}] is {w[row, column]}; only finite weights can be quantised. Check "
      "the checkpoint that they come from."
    )


def check_parameters(shape: tuple[int, ...], grid: Grid, p: Parameters) -> None:
  """Raises ConfigError where parameters are not those of such a matrix on such a grid."""
  expected = grid.groups(shape)
  for name, part in (
    ("scale", p.scale),
    ("minimum", p.minimum),
    ("zero_point", p.zero_point),
  ):
    wanted = name == "scale" or grid.rule == name
    if (part is not None) != wanted:
      raise ConfigError(
        f"rule {grid.rule!r} {'needs' if wanted else 'has no'} {name}; the parameters "
        f"{'lack it' if wanted else 'have one'}. Fit them with the same grid."
      )
    if part is not None and part.shape != expected:
      raise ConfigError(
        f"{name} has shape {list(part.shape)}; a matrix {list(shape)} with group_size="
        f"{grid.group_size} needs {list(expected)}."
      )
