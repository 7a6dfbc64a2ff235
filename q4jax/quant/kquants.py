"""Quantisers that write GGUF blocks: the k-quants by search, the older types by their formula.

A k-quant super-block is 256 weights in groups. Q4_K and Q5_K store, for 8 groups of 32,

  w = d * scale * code - d_min * minimum        scale, minimum in 0..63; d, d_min float16

and Q6_K, for 16 groups of 16, `w = d * scale * code` with scale in -128..127, code in -32..31.
Codes, group integers and float16 factors are found by minimising the weighted squared error

  E = sum importance * (w - w')^2

in two stages. Each group first gets its best real scale: a grid of steps proposes codes, least
squares refits the scale (and the minimum) to them; for Q6_K this maximises
`(sum i w q)^2 / sum i q^2`. Then the super-block is solved by coordinate steps, each exact given
the others: group integers among their neighbours, `d` and `d_min` by least squares, codes by
rounding. A step is kept only where E falls. Layout: ggml's block structs, as documented by GGUF.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from q4jax.errors import ConfigError
from q4jax.quant.rows import by_rows

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SUPER_BLOCK = 256
_ROUNDS = 2  # Coordinate rounds over a super-block; a third lowers the error by under 0.1%.


def quantize(x: Floats, format: str, importance: Floats | None = None) -> Bytes:
  """Rows of weights as rows of GGUF blocks.

  Args:
    x: float32[N, K]; K is a multiple of the format's block (32, or 256 for the k-quants).
    format: q4_0 q4_1 q5_0 q5_1 q8_0 q4_k q5_k q6_k.
    importance: float32[K], the weight of each input in the squared error, for example the mean
      squared activation. Used by the k-quants; equal weights when None.

  Returns:
    uint8[N, row_bytes], exactly the bytes of the tensor in a GGUF file.

  Raises:
    ConfigError: a format, shape or importance that cannot work; a weight that is not finite or too
      large for the format's float16 scale.
  """
  if format not in _QUANTIZERS:
    raise ConfigError(f"format={format!r} cannot be written; choose one of {', '.join(FORMATS)}.")
  block, quantize_blocks = _QUANTIZERS[format]
  if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] % block:
    raise ConfigError(
      f"{format} needs a matrix whose rows are a multiple of {block} long; found shape {x.shape}."
    )
  n, k = x.shape
  weight = _checked_importance(importance, k, format)

  def rows(start: int, stop: int) -> Bytes:
    chunk = np.ascontiguousarray(x[start:stop], dtype=np.float32)
    _check_finite(chunk, start, format)
    blocks = chunk.reshape(-1, block)
    w = np.ascontiguousarray(np.broadcast_to(weight, chunk.shape)).reshape(-1, block)
    # A product that overflows is a candidate that loses; a stored scale is checked in `_f16`.
    with np.errstate(over="ignore"):
      return quantize_blocks(blocks, w).reshape(len(chunk), -1)

  if n:
    return by_rows(rows, x.shape)
  row_bytes = quantize_blocks(np.zeros((1, block), np.float32), np.ones((1, block), np.float32))
  return np.zeros((0, k // block * row_bytes.size), np.uint8)


def _checked_importance(importance: Floats | None, k: int, format: str) -> Floats:
  if importance is None:
    return np.ones(k, np.float32)
  if importance.shape != (k,) or not np.isfinite(importance).all() or (importance < 0).any():
    raise ConfigError(
      f"{format}: importance must be {k} finite values >= 0; found shape {importance.shape}"
      f"{'' if importance.shape != (k,) else ' with values outside that range'}."
    )
  # A floor keeps weights that no activation reached from becoming arbitrary.
  mean = max(float(importance.mean(dtype=np.float64)), 1e-30)
  return np.maximum(importance.astype(np.float64) / mean, 1e-3).astype(np.float32)


def _check_finite(x: Floats, first_row: int, format: str) -> None:
  bad = np.argwhere(~np.isfinite(x))
  if len(bad):
    row, column = bad[0]
    raise ConfigError(
      f"{format}: weight [{first_row + row}, {column}] is {x[row, column]}; only finite weights "
      "can be quantised. Check the checkpoint that they come from."
    )


def _f16(scale: NDArray[np.floating], what: str) -> NDArray[np.float16]:
  half = scale.astype(np.float16)
  if not np.isfinite(half).all():
    raise ConfigError(
      f"{what}: a weight is too large: its float16 scale would be {np.abs(scale).max():.3g}, and "
      "float16 ends at 65504. Rescale the weights or keep this tensor in float."
    )
  return half


def _f16_kept(scale: NDArray[np.floating], what: str) -> NDArray[np.float16]:
  """Like `_f16`, but a scale that is not 0 does not round to 0: small integers can then use it."""
  half = _f16(scale, what)
  smallest = np.copysign(np.finfo(np.float16).smallest_subnormal, scale).astype(np.float16)
  return np.where((half == 0) & (scale != 0), smallest, half)


def _bytes(x: np.ndarray) -> Bytes:
  """The little-endian bytes of each row."""
  return np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1)


def _divide(a: Floats, b: Floats) -> Floats:
  """a / b, and 0 where b is 0."""
  return np.divide(
    a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0
  )


# Formats of 32 weights: rounding with the formula of ggml's reference, bit for bit.


def _q8_0(x: Floats, _: Floats) -> Bytes:
  d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
  scaled = x * _divide(np.ones_like(d), d)
  codes = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled)
  return np.hstack([_bytes(_f16(d, "q8_0")), _bytes(codes.astype(np.int8))])


def _signed(bits: int) -> Callable[[Floats, Floats], Bytes]:
  """Q4_0 and Q5_0: w = d * (code - 2^(bits-1)), the weight of largest size at code 0."""
  half = 2 ** (bits - 1)

  def quantize_blocks(x: Floats, _: Floats) -> Bytes:
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    d = largest / np.float32(-half)
    codes = np.trunc(x * _divide(np.ones_like(d), d) + np.float32(half + 0.5))
    codes = codes.clip(0, 2 * half - 1).astype(np.uint8)
    return np.hstack([_bytes(_f16(d, f"q{bits}_0")), _pack_32(codes, bits)])

  return quantize_blocks


def _offset(bits: int) -> Callable[[Floats, Floats], Bytes]:
  """Q4_1 and Q5_1: w = d * code + min."""

  def quantize_blocks(x: Floats, _: Floats) -> Bytes:
    low = x.min(axis=1, keepdims=True)
    what = f"q{bits}_1"
    d = (x.max(axis=1, keepdims=True) - low) / np.float32(2**bits - 1)
    head = [_bytes(_f16(d, what)), _bytes(_f16(low, what))]
    codes = np.trunc((x - low) * _divide(np.ones_like(d), d) + np.float32(0.5))
    codes = codes.clip(0, 2**bits - 1).astype(np.uint8)
    return np.hstack([*head, _pack_32(codes, bits)])

  return quantize_blocks


def _pack_32(codes: Bytes, bits: int) -> Bytes:
  """32 codes: for 5 bits first the high bits as a mask, then weights k and k + 16 in a byte."""
  low = codes & np.uint8(15)
  nibbles: Bytes = low[:, :16] | low[:, 16:] << np.uint8(4)
  if bits == 4:
    return nibbles
  return np.hstack([np.packbits(codes >> 4, axis=1, bitorder="little"), nibbles])


# K-quants. Letters: B super-blocks, G groups in one, L weights in a group.


def _sum(*factors: np.ndarray) -> Floats:
  """The sum over the last axis of a product of arrays [..., L]."""
  return np.einsum(",".join(["...l"] * len(factors)) + "->...", *factors)


def _normalised(x: Floats) -> tuple[Floats, NDArray[np.float64]]:
  """Blocks divided by their largest size (so that squares neither overflow nor vanish), and it."""
  unit = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
  unit[unit == 0] = 1
  return (x / unit).astype(np.float32), unit


def _affine(bits: int) -> Callable[[Floats, Floats], Bytes]:
  """Q4_K and Q5_K."""
  top = 2**bits - 1
  what = f"q{bits}_k"

  def half(factor: Floats, unit: NDArray[np.float64]) -> tuple[NDArray[np.float16], Floats]:
    """A factor of the normalised block as the float16 that is stored, and what that decodes to."""
    stored = _f16_kept(factor * unit, what)
    return stored, (stored / unit).astype(np.float32)

  def quantize_blocks(x: Floats, w: Floats) -> Bytes:
    x_bl, unit = _normalised(x)
    x_bgl, w_bgl = x_bl.reshape(-1, 8, 32), w.reshape(-1, 8, 32)
    scale, minimum = _fit_affine(x_bgl, w_bgl, top)
    d16, d = half(scale.max(axis=1, keepdims=True) / 63, unit)
    m16, m = half(minimum.max(axis=1, keepdims=True) / 63, unit)
    sc = np.rint(_divide(scale, d)).clip(0, 63).astype(np.float32)
    mn = np.rint(_divide(minimum, m)).clip(0, 63).astype(np.float32)
    for _ in range(_ROUNDS):
      sc, mn, error = _best_neighbours(x_bgl, w_bgl, d, m, sc, mn, top)
      codes = _affine_codes(x_bgl, d * sc, m * mn, top)
      new_d, new_m = _solve_factors(x_bgl, w_bgl, codes, sc, mn, d, m)
      (new_d16, new_d), (new_m16, new_m) = half(new_d, unit), half(new_m, unit)
      new_error = _affine_error(x_bgl, w_bgl, new_d * sc, new_m * mn, top)
      better = new_error.sum(axis=1, keepdims=True) < error.sum(axis=1, keepdims=True)
      d16, d = np.where(better, new_d16, d16), np.where(better, new_d, d)
      m16, m = np.where(better, new_m16, m16), np.where(better, new_m, m)
    last: Bytes = _affine_codes(x_bgl, d * sc, m * mn, top).astype(np.uint8)
    head = [_bytes(d16), _bytes(m16), _pack_6_bit(sc.astype(np.uint8), mn.astype(np.uint8))]
    if bits == 5:
      head.append(np.packbits(last >> 4, axis=1, bitorder="little").reshape(-1, 32))
    low = last & 15
    return np.hstack([*head, (low[:, 0::2] | low[:, 1::2] << 4).reshape(-1, 128)])

  return quantize_blocks


def _fit_affine(x: Floats, w: Floats, top: int) -> tuple[Floats, Floats]:
  """The best found scale >= 0 and minimum >= 0 of each group [B, G, L]: two arrays [B, G]."""
  low = np.minimum(x.min(axis=-1), 0)
  span = x.max(axis=-1) - low
  total, sum_x, sum_xx = w.sum(axis=-1), _sum(w, x), _sum(w, x, x)

  def refit(codes: Floats) -> tuple[Floats, Floats, Floats]:
    """Weighted least squares of x on (codes, -1) with both coefficients >= 0, and its error."""
    wq = w * codes
    sum_q, sum_qq, sum_xq = wq.sum(axis=-1), _sum(wq, codes), _sum(wq, x)
    scale = _divide(total * sum_xq - sum_x * sum_q, total * sum_qq - sum_q * sum_q)
    minimum = (scale * sum_q - sum_x) / total
    through_zero = (minimum < 0) | (scale < 0)
    scale = np.where(through_zero, _divide(sum_xq, sum_qq), scale).clip(0)
    minimum = np.where(through_zero, 0, minimum)
    error = (
      sum_xx
      + scale * (scale * sum_qq - 2 * sum_xq - 2 * minimum * sum_q)
      + minimum * (minimum * total + 2 * sum_x)
    )
    return scale, minimum, error

  scale, minimum, error = _divide(span, np.full_like(span, top)), -low, np.full_like(low, np.inf)
  for steps in np.arange(-12, 22, 2) / np.float32(10) + top:
    step = _divide(np.full_like(span, steps), span)
    codes = np.rint((x - low[..., None]) * step[..., None]).clip(0, top)
    for _ in range(2):
      new = refit(codes)
      better = new[2] < error
      scale, minimum, error = (
        np.where(better, a, b) for a, b in zip(new, (scale, minimum, error), strict=True)
      )
      codes = _affine_codes(x, new[0], new[1], top)
  return scale, minimum


def _affine_codes(x: Floats, scale: Floats, minimum: Floats, top: int) -> Floats:
  """The nearest codes 0..top, as floats [B, G, L]; 0 where the scale is 0."""
  inverse = _divide(np.ones_like(scale), scale)
  return np.rint((x + minimum[..., None]) * inverse[..., None]).clip(0, top)


def _affine_error(x: Floats, w: Floats, scale: Floats, minimum: Floats, top: int) -> Floats:
  codes = _affine_codes(x, scale, minimum, top)
  miss = codes * scale[..., None] - minimum[..., None] - x
  return _sum(w, miss, miss)


def _best_neighbours(
  x: Floats, w: Floats, d: Floats, m: Floats, sc: Floats, mn: Floats, top: int
) -> tuple[Floats, Floats, Floats]:
  """Each group's best (scale, minimum) integers within one step of the given, and its error."""
  best_sc, best_mn, best_error = sc, mn, _affine_error(x, w, d * sc, m * mn, top)
  for i, j in [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]:
    new_sc, new_mn = (sc + np.float32(i)).clip(0, 63), (mn + np.float32(j)).clip(0, 63)
    new_error = _affine_error(x, w, d * new_sc, m * new_mn, top)
    better = new_error < best_error
    best_sc, best_mn = np.where(better, new_sc, best_sc), np.where(better, new_mn, best_mn)
    best_error = np.where(better, new_error, best_error)
  return best_sc, best_mn, best_error


def _solve_factors(
  x: Floats, w: Floats, codes: Floats, sc: Floats, mn: Floats, d: Floats, m: Floats
) -> tuple[Floats, Floats]:
  """Least squares of x on (sc * code, -mn) over a super-block: d, d_min [B, 1]; old if singular."""
  a = (codes * sc[..., None]).reshape(len(x), -1)
  b = np.broadcast_to(mn[..., None], codes.shape).reshape(len(x), -1)
  x, w = x.reshape(a.shape), w.reshape(a.shape)
  aa, ab, bb = (_sum(w, p, q).astype(np.float64)[:, None] for p, q in ((a, a), (a, b), (b, b)))
  ax, bx = (_sum(w, p, x).astype(np.float64)[:, None] for p in (a, b))
  det = aa * bb - ab * ab
  # Nearly parallel columns have no stable solution; without minimums only d is solved for.
  stable = det > 1e-6 * aa * bb
  det = np.where(stable, det, 1)
  new_d = np.where(
    stable, (bb * ax - ab * bx) / det, np.where(bb > 0, d, ax / np.maximum(aa, 1e-30))
  )
  new_m = np.where(stable, (ab * ax - aa * bx) / det, m)
  valid = (new_d >= 0) & (new_m >= 0)
  return (
    np.where(valid, new_d, d).astype(np.float32),
    np.where(valid, new_m, m).astype(np.float32),
  )


def _pack_6_bit(scale: Bytes, minimum: Bytes) -> Bytes:
  """Eight 6-bit scales and minimums in 12 bytes: see ggml's `get_scale_min_k4`."""
  return np.hstack(
    [
      scale[:, :4] | (scale[:, 4:] >> 4) << 6,
      minimum[:, :4] | (minimum[:, 4:] >> 4) << 6,
      (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4,
    ]
  )


def _q6_k(x: Floats, w: Floats) -> Bytes:
  x_bl, unit = _normalised(x)
  x_bgl, w_bgl = x_bl.reshape(-1, 16, 16), w.reshape(-1, 16, 16)
  scale = _fit_symmetric(x_bgl, w_bgl)
  largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1, keepdims=True), axis=1)
  # The scale of largest size becomes -128, the longer side of int8.
  d16 = _f16_kept(largest / -128 * unit, "q6_k")
  d = (d16 / unit).astype(np.float32)
  sc = np.rint(_divide(scale, d)).clip(-128, 127)
  for _ in range(_ROUNDS):
    error = _symmetric_error(x_bgl, w_bgl, d * sc)
    for step in (-1, 1):
      new_sc = (sc + np.float32(step)).clip(-128, 127)
      new_error = _symmetric_error(x_bgl, w_bgl, d * new_sc)
      better = new_error < error
      sc, error = np.where(better, new_sc, sc), np.where(better, new_error, error)
    a = (_symmetric_codes(x_bgl, d * sc) * sc[..., None]).reshape(x.shape)
    new_d = _divide(_sum(w, a, x_bl), _sum(w, a, a))[:, None]
    new_d16 = _f16_kept(new_d * unit, "q6_k")
    new_d = (new_d16 / unit).astype(np.float32)
    new_error = _symmetric_error(x_bgl, w_bgl, new_d * sc)
    better = new_error.sum(axis=1, keepdims=True) < error.sum(axis=1, keepdims=True)
    d16, d = np.where(better, new_d16, d16), np.where(better, new_d, d)
  codes = (_symmetric_codes(x_bgl, d * sc) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
  low, high = codes & 15, codes >> 4
  return np.hstack(
    [
      (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128),
      (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(
        -1, 64
      ),
      _bytes(sc.astype(np.int8)),
      _bytes(d16),
    ]
  )


def _fit_symmetric(x: Floats, w: Floats) -> Floats:
  """The scale of each group [B, G, L] that maximises (sum w x q)^2 / sum w q^2: [B, G]."""
  largest = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)[..., 0]
  scale, best = np.zeros_like(largest), np.zeros_like(largest)
  # A negative step puts the largest weight at code -32, the longer side; a positive one at 31.
  for step in [*np.arange(-33.5, -30.4, 0.25), *np.arange(30, 32.6, 0.25)]:
    codes = np.rint(x * _divide(np.full_like(largest, step), largest)[..., None]).clip(-32, 31)
    wq = w * codes
    sum_xq, sum_qq = _sum(wq, x), _sum(wq, codes)
    new_scale = _divide(sum_xq, sum_qq)
    value = sum_xq * new_scale
    scale, best = np.where(value > best, new_scale, scale), np.maximum(value, best)
  return scale


def _symmetric_codes(x: Floats, scale: Floats) -> Floats:
  return np.rint(x * _divide(np.ones_like(scale), scale)[..., None]).clip(-32, 31)


def _symmetric_error(x: Floats, w: Floats, scale: Floats) -> Floats:
  miss = _symmetric_codes(x, scale) * scale[..., None] - x
  return _sum(w, miss, miss)


_QUANTIZERS: dict[str, tuple[int, Callable[[Floats, Floats], Bytes]]] = {
  "q4_0": (32, _signed(4)),
  "q4_1": (32, _offset(4)),
  "q5_0": (32, _signed(5)),
  "q5_1": (32, _offset(5)),
  "q8_0": (32, _q8_0),
  "q4_k": (SUPER_BLOCK, _affine(4)),
  "q5_k": (SUPER_BLOCK, _affine(5)),
  "q6_k": (SUPER_BLOCK, _q6_k),
}
FORMATS = tuple(_QUANTIZERS)
