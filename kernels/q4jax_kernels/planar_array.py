"""A quantised matrix as GPU and TPU kernels read it: inputs down the rows, outputs along lanes.

Each part lies in a plane of its own and holds the very bits of its source, never requantised:

  w[n, k] = s[g, n] * (code[k, n] - offset) - m[g, n],    g = k // group_size
  s[g] = scale[g * S // G] * scale_code[g],   m[g] = minimum[g * S // G] * minimum_code[g]

in float32 in this order, where s = scale without sub-scales (then S = G), and m = 0 without
minimums.
Plane i holds `bits[i]` bits of every code, the lowest plane first: with p = 8 / bits[i], the byte
in row r holds codes k = p * r + j, j < p, at its bits bits[i] * j and up. So

  y = sum over planes i and slots j of  2^(bits before i) * (x[:, j::p] @ (s * slot j of plane i))
      - xsum @ (offset * s + m),        xsum[:, g] = x summed over group g:

a kernel never moves a weight; x is split instead.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from q4jax_kernels.block_array import BlockArray, block_shape
from q4jax_kernels.block_formats import Array
from q4jax_kernels.block_parts import PARTS, Parts, join, split
from q4jax_kernels.q4_array import SYMMETRIC_OFFSET, Q4Array, namespace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlanarArray:
  """A float matrix [N, K]; see the module. `source` says what it was made from, to go back."""

  planes: tuple[jax.Array, ...]  # uint8[K * bits[i] / 8, N]
  scale: jax.Array  # float32[S, N]
  scale_code: jax.Array | None  # uint8 or int8 [G, N]
  minimum: jax.Array | None  # float32[S, N]
  minimum_code: jax.Array | None  # uint8[G, N]
  bits: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  offset: int = dataclasses.field(metadata={"static": True})
  # A GGUF format, or "q4:<dtype of the scales>", with ":tensor" where one scale served all.
  source: str = dataclasses.field(metadata={"static": True})

  @property
  def num_rows(self) -> int:
    """N."""
    return self.planes[0].shape[1]

  @property
  def shape(self) -> tuple[int, int]:
    """(N, K)."""
    return self.num_rows, self.planes[0].shape[0] * 8 // self.bits[0]

  @property
  def num_groups(self) -> int:
    """G."""
    return (self.scale if self.scale_code is None else self.scale_code).shape[0]

  @property
  def group_size(self) -> int:
    """Inputs that share an effective scale."""
    return self.shape[1] // self.num_groups

  @property
  def nbytes(self) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

  @property
  def bits_per_weight(self) -> float:
    """Bits a weight takes, scales and all."""
    n, k = self.shape
    return 8 * self.nbytes / (n * k)

  def codes(self) -> jax.Array:
    """uint8[K, N], the planes joined."""
    xp, k = namespace(self.scale), self.shape[1]
    codes, below = xp.uint8(0), 0
    for plane, bits in zip(self.planes, self.bits, strict=True):
      slots = xp.stack([plane >> j & (2**bits - 1) for j in range(0, 8, bits)], axis=1)
      codes = codes | slots.reshape(k, self.num_rows) << below
      below += bits
    return codes

  def factors(self) -> tuple[jax.Array, jax.Array | None]:
    """float32[G, N]: the effective scale s of every group, and its minimum m or None."""
    return (
      _expand(self.scale, self.scale_code, self.num_groups),
      None if self.minimum is None else _expand(self.minimum, self.minimum_code, self.num_groups),
    )

  def dequantize(self) -> jax.Array:
    """float32[N, K], bit-equal to the source's (op by op; `jit` may fuse to one rounding)."""
    n, k = self.shape
    codes = self.codes().reshape(self.num_groups, self.group_size, n).astype(np.float32)
    scale, minimum = self.factors()
    w = scale[:, None] * (codes - self.offset)
    if minimum is not None:
      w = w - minimum[:, None]
    return w.reshape(k, n).T

  @classmethod
  def from_q4(cls, w: Q4Array) -> Self:
    """Scales become float32, and one for the whole matrix is repeated for every output."""
    w.validated()
    xp, n = namespace(w.packed), w.shape[0]
    source = f"q4:{w.scale.dtype}" + (":tensor" if w.per_tensor else "")

    def down(x: jax.Array) -> jax.Array:
      return xp.broadcast_to(x.astype(xp.float32), (n, x.shape[1])).T

    return cls(
      # A byte of `packed` already holds codes 2r and 2r + 1.
      planes=(w.packed.T,),
      scale=down(w.scale),
      scale_code=None,
      minimum=None if w.minimum is None else down(w.minimum),
      minimum_code=None,
      bits=(4,),
      offset=SYMMETRIC_OFFSET if w.minimum is None else 0,
      source=source,
    )

  def to_q4(self) -> Q4Array:
    """The Q4Array this was made from; ValueError if it was made from GGUF blocks."""
    kind, *tags = self.source.split(":")
    if kind != "q4":
      raise ValueError(f"this PlanarArray was made from {self.source} blocks, not from a Q4Array.")
    dtype, rows = jnp.dtype(tags[0]), slice(0, 1) if "tensor" in tags else slice(None)
    minimum = None if self.minimum is None else self.minimum.T[rows].astype(dtype)
    return Q4Array(self.planes[0].T, self.scale.T[rows].astype(dtype), minimum)

  @classmethod
  def from_blocks(cls, w: BlockArray) -> Self:
    """From blocks of a format of `PARTS`; a NumPy array inside stays NumPy.

    Raises:
      NotImplementedError: the format has no planar form.
    """
    if w.format not in PARTS:
      raise NotImplementedError(
        f"{w.format} has no planar form; {', '.join(PARTS)} have. Dequantise it once instead."
      )
    xp, n = namespace(w.data), w.num_rows
    _, block_bytes = block_shape(w.format)
    parts = split(w.rows().data.reshape(n, -1, block_bytes), w.format, xp)

    def down(part: Array) -> Array:
      return None if part is None else part.reshape(n, -1).T

    codes = down(parts.codes)
    form = PARTS[w.format]
    planes, below = [], 0
    for bits in form.bits:
      planes.append(_pack(codes >> below & (2**bits - 1), bits))
      below += bits
    return cls(
      planes=tuple(planes),
      scale=down(parts.scale),
      scale_code=down(parts.scale_code),
      minimum=down(parts.minimum),
      minimum_code=down(parts.minimum_code),
      bits=form.bits,
      offset=form.offset,
      source=w.format,
    )

  def to_blocks(self) -> BlockArray:
    """The BlockArray (layout rows) this was made from; ValueError if it was a Q4Array."""
    if self.source not in PARTS:
      raise ValueError("this PlanarArray was made from a Q4Array, not from GGUF blocks.")
    n, k = self.shape
    blocks = k // block_shape(self.source)[0]
    down = [self.codes(), self.scale, self.scale_code, self.minimum, self.minimum_code]
    parts = Parts(*(None if part is None else part.T.reshape(n, blocks, -1) for part in down))
    return BlockArray(
      join(parts, self.source, namespace(self.scale)).reshape(n, -1), self.source, n
    )


def _expand(scale: jax.Array, code: jax.Array | None, groups: int) -> jax.Array:
  if code is None:
    return scale
  xp = namespace(scale)
  return xp.repeat(scale, groups // scale.shape[0], axis=0) * code.astype(np.float32)


def _pack(codes: jax.Array, bits: int) -> jax.Array:
  """uint8[K, N] codes of `bits` bits -> uint8[K * bits / 8, N]."""
  per_byte = 8 // bits
  packed = codes[0::per_byte]
  for j in range(1, per_byte):
    packed = packed | codes[j::per_byte] << bits * j
  return packed
