"""How numbers of the KV cache are stored: as floats, or as 8- or 4-bit codes in groups of a head.

  x ~ scale * code - minimum                      code = round((x + minimum) / scale)
  x ~ scale * (code - 2^(bits - 1))               symmetric; code = round(x / scale) + 2^(bits - 1)

with codes clipped to [0, 2^bits - 1], ties rounded to even, and a scale and a minimum in float16
for each group of `group_size` values along the head; codes are computed from the rounded ones. The
grid of a group spans its least and its largest value: scale = (max - min) / (2^bits - 1) and
minimum = -min. A symmetric one spans the largest magnitude both ways: scale = max|x| / (2^(bits-1)
- 1), so its least code is never used. (KIVI, arXiv:2402.02750, for the asymmetric grid per token.)

Values beyond float16 (infinities too) count as its largest, 65504. A group of equal values has
scale 0, code 0 and the value, rounded to float16, as -minimum. A NaN makes its whole group NaN.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

_HALF_MAX = 65504.0


@dataclasses.dataclass(frozen=True)
class KVFormat:
  """The format of keys or of values.

  Attributes:
    bits: 32 or 16, floats as they are; 8 or 4, codes.
    group_size: values that share a scale, a divisor of head_dim; None for the whole head.
    symmetric: codes around 2^(bits - 1) and no minimum.
    bfloat16: 16 bits are a bfloat16, not a float16.

  Raises:
    ValueError: no such format.
  """

  bits: int
  group_size: int | None = None
  symmetric: bool = False
  bfloat16: bool = False

  def __post_init__(self) -> None:
    if self.bits not in (4, 8, 16, 32):
      raise ValueError(f"bits={self.bits} is none of 4, 8 (codes), 16 and 32 (floats).")
    if self.bfloat16 and self.bits != 16:
      raise ValueError(f"bfloat16=True has 16 bits; got bits={self.bits}.")
    if self.group_size is not None and self.group_size < 1:
      raise ValueError(f"group_size={self.group_size} must be positive, or None for a whole head.")
    if self.is_float and (self.group_size is not None or self.symmetric):
      raise ValueError(
        f"{self.bits} bits are floats, which have no scales; got group_size={self.group_size} and "
        f"symmetric={self.symmetric} where None and False are the only choice."
      )

  @property
  def is_float(self) -> bool:
    return self.bits >= 16

  @property
  def dtype(self) -> np.dtype:
    """Of the stored floats, or uint8 for codes."""
    if self.is_float:
      half = jnp.bfloat16 if self.bfloat16 else jnp.float16
      return np.dtype(np.float32 if self.bits == 32 else half)
    return np.dtype(np.uint8)

  @property
  def offset(self) -> int:
    """The code of zero in a symmetric format."""
    return 1 << self.bits - 1

  def groups(self, head_dim: int) -> int:
    """Groups of a head; ValueError where they do not fit. Floats have none."""
    if self.is_float:
      return 0
    size = head_dim if self.group_size is None else self.group_size
    if head_dim % size:
      raise ValueError(f"group_size={size} does not divide head_dim={head_dim}.")
    if head_dim * self.bits % 8:
      raise ValueError(f"head_dim={head_dim} of {self.bits} bits is no whole number of bytes.")
    return head_dim // size

  def bits_per_value(self, head_dim: int) -> float:
    """Bits that a value takes, its part of scale and minimum counted."""
    return self.bits + 16 * (1 if self.symmetric else 2) * self.groups(head_dim) / head_dim


def quantize(x: jax.Array, format: KVFormat) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Codes, scales and minimums of a format that has them.

  Args:
    x: float[..., H].
    format: of 4 or 8 bits.

  Returns:
    codes uint8[..., H], one a byte; scale float16[..., G]; minimum float16[..., G], or None.

  Raises:
    ValueError: a float format, or groups that do not divide H.
  """
  if format.is_float:
    raise ValueError(f"{format} has no codes: store its floats with to_float.")
  shape, groups = x.shape, format.groups(x.shape[-1])
  x = jnp.clip(x.astype(jnp.float32), -_HALF_MAX, _HALF_MAX).reshape(*shape[:-1], groups, -1)
  # Times the inverse, as XLA may turn a division by a constant into, which would make jit matter.
  if format.symmetric:
    scale = jnp.abs(x).max(-1, keepdims=True) * np.float32(1 / (format.offset - 1))
    scale, minimum, shift = scale.astype(jnp.float16), None, format.offset
  else:
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale = ((high - low) * np.float32(1 / (2**format.bits - 1))).astype(jnp.float16)
    minimum, shift = (-low).astype(jnp.float16), 0
    x = x + minimum.astype(jnp.float32)
  step = scale.astype(jnp.float32)
  codes = jnp.where(step > 0, jnp.round(x / jnp.where(step > 0, step, 1)), 0) + shift
  codes = jnp.clip(codes, 0, 2**format.bits - 1).astype(jnp.uint8).reshape(shape)
  return codes, scale[..., 0], None if minimum is None else minimum[..., 0]


def dequantize(
  codes: jax.Array, scale: jax.Array, minimum: jax.Array | None, format: KVFormat
) -> jax.Array:
  """uint8[..., H], float16[..., G] twice (or None) -> float32[..., H].

  Exact but for one rounding: the product of a float16 and a code fits a float32.
  """
  codes = codes.astype(jnp.float32).reshape(*scale.shape, -1)
  step = scale.astype(jnp.float32)[..., None]
  if minimum is None:
    x = step * (codes - format.offset)
  else:
    x = step * codes - minimum.astype(jnp.float32)[..., None]
  return x.reshape(*scale.shape[:-1], -1)


def to_float(x: jax.Array, format: KVFormat) -> jax.Array:
  """x in the dtype of a float format; what float16 cannot hold becomes its largest."""
  if format.dtype == np.float16:
    x = jnp.clip(x, -_HALF_MAX, _HALF_MAX)
  return x.astype(format.dtype)
