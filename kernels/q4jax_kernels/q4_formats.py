"""Block formats for the weights of a Q4Array, so that whatever takes a BlockArray takes them.

`q4s64_f16`: s, symmetric (a: with a minimum); groups of 64; float16 scales (f32: float32).

  w[i] = scale[g] * (code[i] - 8)   or   scale[g] * code[i] - minimum[g],    g = i // group

in float32 in this order. A block has 32 weights for groups of 8, 16, 32 and 256 for groups of 64,
128, 256. Its bytes: the scales of its groups | their minimums (a) | codes q4(16), or q4(32) in a
block of 256. The names and their order are shared with csrc/kernels.h.
"""

import itertools
from dataclasses import dataclass
from types import ModuleType

import jax.numpy as jnp

from q4jax_kernels.block_formats import Array, fields, pack_codes, unpack_codes

GROUP_SIZES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Q4Format:
  """How a block of group-wise weights lies in bytes."""

  group: int
  symmetric: bool
  wide: bool  # Scales are float32, not float16.

  @property
  def name(self) -> str:
    return f"q4{'s' if self.symmetric else 'a'}{self.group}_{'f32' if self.wide else 'f16'}"

  @property
  def block_size(self) -> int:
    return 32 if self.group <= 32 else 256

  @property
  def block_bytes(self) -> int:
    return sum(size for size, _ in self.fields)

  @property
  def fields(self) -> tuple[tuple[int, int], ...]:
    """(bytes, word bytes) of each field, as block_array.FIELDS has them."""
    width = 4 if self.wide else 2
    scales = (self.block_size // self.group * width, width)
    return (*((scales,) if self.symmetric else (scales, scales)), (self.block_size // 2, 4))

  @property
  def run(self) -> int:
    """Bytes of codes whose low nibbles come before their high ones."""
    return 16 if self.block_size == 32 else 32

  def split(self, blocks: Array, xp: ModuleType = jnp) -> tuple[Array, Array, Array | None]:
    """uint8[..., block_bytes] -> codes uint8[..., block], scale and minimum float[..., groups]."""
    *factors, codes = fields(blocks, *(size for size, _ in self.fields))
    scale, *minimum = (f.view(xp.float32 if self.wide else xp.float16) for f in factors)
    return unpack_codes(codes, 4, self.run, xp), scale, minimum[0] if minimum else None

  def join(self, codes: Array, scale: Array, minimum: Array | None, xp: ModuleType = jnp) -> Array:
    """The inverse of `split`; the factors are cast to the format's type."""
    dtype = xp.float32 if self.wide else xp.float16
    factors = [scale] if minimum is None else [scale, minimum]
    parts = [f.astype(dtype).view(xp.uint8) for f in factors]
    return xp.concatenate([*parts, pack_codes(codes, 4, self.run)], axis=-1)

  def dequantize(self, blocks: Array, xp: ModuleType = jnp) -> Array:
    """uint8[..., block_bytes] -> float32[..., block_size]."""
    codes, scale, minimum = self.split(blocks, xp)
    groups = codes.reshape(*scale.shape, self.group).astype(xp.float32)
    scale = scale.astype(xp.float32)[..., None]
    if minimum is None:
      return (scale * (groups - 8)).reshape(codes.shape)
    return (scale * groups - minimum.astype(xp.float32)[..., None]).reshape(codes.shape)


Q4_FORMATS: dict[str, Q4Format] = {
  form.name: form
  for form in itertools.starmap(
    Q4Format, itertools.product(GROUP_SIZES, (True, False), (False, True))
  )
}
