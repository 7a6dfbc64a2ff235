"""A GroupArray as what a model runs and as what calibration writes: exactly, or not at all.

Exactly: the blocks decode to the bits of `GroupArray.dequantize` (but for the sign of a zero). What
runs, the smallest first:

  q4s.. q4a..   2 to 4 bits. Symmetric codes are shifted to be around 8. A zero point becomes the
                minimum scale * zero_point, which needs float32 scales (16 bits more a group).
  q5_0 q5_1     5 bits, symmetric and with a minimum; groups of a multiple of 32, float16 scales
  q6_k          6 bits, symmetric; groups of a multiple of 256, float16 scales
  q8_0          5 to 8 bits, symmetric or with zero points as long as code - zero_point is in
                -128..127; groups of a multiple of 32, float16 scales
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jax.errors import ConfigError
from q4jax.quant.grid import Bytes, Grid, GroupArray, Parameters, Rule
from q4jax.records import Record
from q4jax_kernels import q4_blocks
from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.block_formats import pack_codes
from q4jax_kernels.q4_array import SYMMETRIC_OFFSET, Q4Array, pack_pairs
from q4jax_kernels.q4_formats import Q4Format


def to_q4_array(w: GroupArray) -> Q4Array:
  """Of NumPy arrays; codes of 2 or 3 bits take 4.

  Raises:
    ConfigError: more than 4 bits, odd groups, zero points whose minimum float32 cannot hold.
  """
  _need(w.grid.bits <= 4, w, "a Q4Array holds codes of at most 4 bits")
  _need(w.shape[1] // w.scale.shape[1] % 2 == 0, w, "a Q4Array needs even groups")
  codes, scale, minimum = w.codes, w.scale, w.minimum
  if w.grid.symmetric:
    codes = codes + np.uint8(SYMMETRIC_OFFSET - w.grid.half)
  elif w.zero_point is not None:
    scale = scale.astype(np.float32)
    minimum = scale * w.zero_point
    _need(w.grid.scale_dtype != "float32", w, "scale * zero_point is not exact in float32")
  return Q4Array(pack_pairs(codes), scale, minimum).validated()  # type: ignore[arg-type]


def block_format(grid: Grid, k: int) -> str:
  """The format of `as_planned`'s blocks for rows of K weights, whatever the weights are.

  Raises:
    ConfigError: no format that a model runs holds such a grid.
  """
  group = grid.group_size if isinstance(grid.group_size, int) else k
  if grid.bits <= 4 and grid.rule == "zero_point" and grid.scale_dtype == "float32":
    raise ConfigError("scale * zero_point is not exact in float32. Choose another scale_dtype.")
  if grid.bits <= 4:
    try:
      in_block = q4_blocks.longest_group(k, group)
    except NotImplementedError as error:
      raise ConfigError(f"{error} Choose another group_size, or leave it in float.") from None
    wide = grid.scale_dtype != "float16" or grid.rule == "zero_point"
    return Q4Format(in_block, grid.symmetric, wide).name
  # With 8 bits, code - zero_point may be beyond int8.
  names = ["q8_0"] if grid.symmetric or (grid.rule == "zero_point" and grid.bits < 8) else []
  if grid.bits == 5 and grid.rule != "zero_point":
    names.insert(0, "q5_0" if grid.symmetric else "q5_1")
  if grid.bits == 6 and grid.symmetric and group % 256 == 0:
    names.insert(0, "q6_k")
  if not names or group % 32 or grid.scale_dtype != "float16":
    raise ConfigError(
      f"no block format that a model runs holds {grid.bits} bits in groups of {group} by rule "
      f"{grid.rule} with {grid.scale_dtype} scales. Above 4 bits take groups of a multiple of 32, "
      "float16 scales, and symmetric codes (a minimum only with 5 bits, a zero point only below 8)."
    )
  return names[0]


def as_planned(w: GroupArray) -> BlockArray:
  """Blocks of `block_format`, in layout rows, that decode to the same weights; errors as there."""
  if w.grid.bits > 4:
    return to_blocks(w, block_format(w.grid, w.shape[1]))
  wide = block_format(w.grid, w.shape[1]).endswith("_f32")
  return q4_blocks.to_blocks(to_q4_array(w), wide)


def to_blocks(w: GroupArray, format: str | None = None) -> BlockArray:
  """Blocks, in layout rows, that decode to the same weights.

  Args:
    w: a matrix on a grid.
    format: "q4" (the group-wise formats of 4 bits), "q5_0", "q5_1", "q6_k" or "q8_0"; the smallest
      that holds it if None.

  Raises:
    ConfigError: no format, or not this one, holds it exactly; it says why, for each.
  """
  if format is not None and format not in _WRITERS:
    raise ConfigError(f"format={format!r} is none of {', '.join(_WRITERS)}.")
  reasons = []
  for name in _WRITERS if format is None else [format]:
    try:
      return _WRITERS[name](w)
    except ConfigError as error:
      reasons.append(f"{name}: {error}")
  raise ConfigError("No block format that a model runs holds this matrix. " + " ".join(reasons))


def _q4(w: GroupArray) -> BlockArray:
  array = to_q4_array(w)
  try:
    return q4_blocks.to_blocks(array)
  except NotImplementedError as error:
    raise ConfigError(str(error)) from None


def _q5_0(w: GroupArray) -> BlockArray:
  _need(w.grid.bits == 5 and w.grid.symmetric, w, "it holds symmetric codes of 5 bits")
  return _join(w, "q5_0", 32, lambda codes, d, _: [d, *_five_bits(codes)])


def _q5_1(w: GroupArray) -> BlockArray:
  _need(w.grid.bits == 5 and w.minimum is not None, w, "it holds codes of 5 bits with a minimum")
  return _join(w, "q5_1", 32, lambda codes, d, m: [d, m, *_five_bits(codes)])


def _q6_k(w: GroupArray) -> BlockArray:
  _need(w.grid.bits == 6 and w.grid.symmetric, w, "it holds symmetric codes of 6 bits")

  def parts(codes: Bytes, d: Bytes, _: Bytes) -> list[Bytes]:
    ones = np.ones((*codes.shape[:-1], 16), np.uint8)
    return [pack_codes(codes & 15, 4, 64), pack_codes(codes >> 4, 2, 32), ones, d]

  return _join(w, "q6_k", 256, parts)


def _q8_0(w: GroupArray) -> BlockArray:
  _need(w.minimum is None, w, "it holds no minimum")
  if w.zero_point is None:
    zero = np.full((1, 1), w.grid.half, np.int16)
  else:
    zero = np.repeat(w.zero_point, w.shape[1] // w.scale.shape[1], axis=1).astype(np.int16)
  signed = w.codes - zero
  fits = signed.min() >= -128 and signed.max() <= 127
  _need(bool(fits), w, "code - zero_point is beyond int8")
  codes = dataclasses.replace(w, codes=signed.astype(np.int8).view(np.uint8))
  return _join(codes, "q8_0", 32, lambda codes, d, _: [d, codes])


_WRITERS: Mapping[str, Callable[[GroupArray], BlockArray]] = {
  "q4": _q4,
  "q5_0": _q5_0,
  "q5_1": _q5_1,
  "q6_k": _q6_k,
  "q8_0": _q8_0,
}


def _join(
  w: GroupArray, format: str, block: int, parts: Callable[[Bytes, Bytes, Bytes], list[Bytes]]
) -> BlockArray:
  """Blocks of `parts(codes [N, B, block], d bytes [N, B, 2], m bytes)`, fields in order."""
  n, k = w.shape
  group = k // w.scale.shape[1]
  _need(group % block == 0, w, f"its groups are of a multiple of {block}")

  def bytes_of(factor: NDArray) -> Bytes:
    with np.errstate(over="ignore"):
      narrow = factor.astype(np.float16)
    same = np.array_equal(narrow.astype(np.float32), factor.astype(np.float32))
    _need(same, w, "its scales are float16")
    every = np.broadcast_to(np.repeat(narrow, group // block, axis=1), (n, k // block))
    return np.ascontiguousarray(every)[..., None].view(np.uint8)

  d = bytes_of(w.scale)
  m = d if w.minimum is None else bytes_of(-w.minimum)
  data = np.concatenate(parts(w.codes.reshape(n, -1, block), d, m), axis=-1)
  return BlockArray(data.reshape(n, -1), format, n)  # type: ignore[arg-type]


def _five_bits(codes: Bytes) -> list[Bytes]:
  return [pack_codes(codes >> 4, 1, 1), pack_codes(codes & 15, 4, 16)]


def _need(condition: bool, w: GroupArray, what: str) -> None:
  if not condition:
    grid = w.grid
    raise ConfigError(
      f"{what}; this matrix has {grid.bits} bits, groups of {grid.group_size}, rule {grid.rule}, "
      f"{grid.scale_dtype} scales."
    )


def to_record(
  layer_name: str,
  grid: Grid,
  p: Parameters,
  *,
  group_size: int,
  target: str = "weight",
  method: str = "minmax",
  statistics: Mapping[str, Any] | None = None,
) -> Record:
  """What calibration says of such parameters.

  Codes of a symmetric grid are signed there (intB, zero point 0), others are not (uintB).

  Args:
    layer_name, target, method, statistics: see `Record`.
    grid, p: the parameters; float16 and bfloat16 scales are exact as the record's float32.
    group_size: weights along K that share parameters: K for "channel".
  """
  whole = grid.group_size == "tensor"
  shape = (1,) if whole else p.scale.shape
  zero = np.zeros(shape, np.int32)
  if p.zero_point is not None:
    zero = p.zero_point.astype(np.int32).reshape(shape)
  return Record(
    layer_name=layer_name,
    target=target,
    dtype=f"{'int' if grid.symmetric else 'uint'}{grid.bits}",
    axis=None if whole else -1,
    group_size=0 if whole else group_size,
    method=method,
    scale=p.scale.astype(np.float32).reshape(shape),
    zero_point=zero,
    minimum=None if p.minimum is None else p.minimum.astype(np.float32).reshape(shape),
    statistics=statistics or {},
  )


def from_record(record: Record, scale_dtype: str = "float16") -> tuple[Grid, Parameters]:
  """The grid and parameters of a weight's record.

  Signed codes whose zero point is 0 are rule "signed", which differs from "absmax" only in how
  scales are fitted. `scale_dtype` must hold the record's scales and minimums exactly.

  Raises:
    ConfigError: axes, shapes, zero points or scales that a grid does not have.
  """
  bits = int(record.dtype.removeprefix("u").removeprefix("int"))
  signed = record.dtype.startswith("int")
  zero = record.zero_point + (2 ** (bits - 1) if signed else 0)
  rule: Rule = "zero_point"
  if record.minimum is not None:
    rule = "minimum"
  elif signed and not record.zero_point.any():
    rule = "signed"
  shape = (1, 1) if record.axis is None else record.scale.shape
  if record.axis not in (None, -1) or len(shape) != 2 or (record.minimum is not None and signed):
    raise ConfigError(
      f"{record.layer_name}: a weight's parameters are [N, G] along axis -1, or one of all, and a "
      f"minimum goes with unsigned codes; the record has axis {record.axis}, shape "
      f"{list(record.scale.shape)}, {record.dtype}."
    )
  size = "tensor" if record.axis is None else "channel" if shape[1] == 1 else record.group_size
  grid = Grid(bits, size, rule, scale_dtype)  # type: ignore[arg-type]

  def narrow(x: NDArray[np.float32]) -> NDArray:
    with np.errstate(over="ignore"):
      out = x.astype(np.dtype(scale_dtype)).reshape(shape)
    if not np.array_equal(out.astype(np.float32), x.reshape(shape)):
      raise ConfigError(
        f"{record.layer_name}: {scale_dtype} does not hold its scales exactly; take float32."
      )
    return out

  return grid, Parameters(
    narrow(record.scale),
    None if record.minimum is None else narrow(record.minimum),
    zero.astype(np.uint8).reshape(shape) if rule == "zero_point" else None,
  )
