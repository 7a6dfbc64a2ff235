"""A quantised matrix as Hopper's tensor cores take it: a PlanarArray with codes along the rows.

`wgmma` multiplies [64, k] from registers by [k, columns] from shared memory, so the weights must be
the left side, with k along their rows: only then are codes unpacked once, in registers, and never
written back. (In the PlanarArray's own order they would be the right side, which has to lie in
shared memory as bfloat16: 4.5 bytes of its traffic for each weight, read, written and read again,
where this order takes 0.5; at 128 bytes a cycle that would limit decoding before HBM does.)

  planes[0]  int4[N, K], the low 4 bits of each code, minus 8; or int8[N, K], an 8-bit code minus
             128. Signed, because that is what the unpacking instructions make.
  planes[1]  int8[N, K * bits / 8]  the bits above, of 5- and 6-bit codes. A chunk of 256 codes has
             32 * bits bytes; byte b holds codes b + 32 * bits * j, code j at bit bits * j: each
             mask leaves a tile of neighbours in k. The highest bit of the byte is flipped, so that
             its codes too are what they were, minus half of their range.

Scales and minimums are the PlanarArray's, [S, N] and [G, N]; scales that came from float16 are kept
as float16 again. Every bit is kept and `to_planar` goes back.
"""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from q4jax_kernels.planar_array import PlanarArray

CHUNK = 256  # codes whose upper bits lie together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowPlanarArray:
  """A float matrix [N, K]; see the module. Fields as of PlanarArray, from which it is made."""

  planes: tuple[jax.Array, ...]
  scale: jax.Array  # float[S, N]
  scale_code: jax.Array | None  # uint8 or int8 [G, N]
  minimum: jax.Array | None  # float[S, N]
  minimum_code: jax.Array | None  # uint8[G, N]
  bits: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  offset: int = dataclasses.field(metadata={"static": True})
  source: str = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, int]:
    """(N, K)."""
    n, k = self.planes[0].shape
    return n, k

  @property
  def num_rows(self) -> int:
    """N."""
    return self.shape[0]

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
    """Bytes of all parts, int4 counted as packed."""
    width = {jnp.dtype(jnp.int4): 4}
    return sum(
      a.size * width.get(a.dtype, 8 * a.dtype.itemsize) // 8 for a in jax.tree.leaves(self)
    )

  @classmethod
  def from_planar(cls, w: PlanarArray) -> Self:
    """The same matrix, of codes of 4, 4 + 1, 4 + 2 or 8 bits.

    Raises:
      NotImplementedError: K does not fill the chunks that upper bits lie in.
    """
    _, k = w.shape
    if len(w.bits) > 1 and k % CHUNK:
      raise NotImplementedError(f"codes of {sum(w.bits)} bits need K % {CHUNK} == 0; got K = {k}.")
    low, *upper = w.planes
    rows = jnp.asarray(low).T ^ (0x80 if w.bits[0] == 8 else 0x88)
    planes = [_cast(rows, jnp.int8 if w.bits[0] == 8 else jnp.int4)]
    for plane, bits in zip(upper, w.bits[1:], strict=True):
      planes.append(_cast(_along_chunks(jnp.asarray(plane).T, bits) ^ 0x80, jnp.int8))
    dtype = _scale_dtype(w.source)
    scale, minimum = w.scale.astype(dtype), None if w.minimum is None else w.minimum.astype(dtype)
    return cls(
      tuple(planes), scale, w.scale_code, minimum, w.minimum_code, w.bits, w.offset, w.source
    )

  def to_planar(self) -> PlanarArray:
    """The PlanarArray this was made from."""
    low, *upper = self.planes
    planes = [(_cast(low, jnp.uint8) ^ (0x80 if self.bits[0] == 8 else 0x88)).T]
    for plane, bits in zip(upper, self.bits[1:], strict=True):
      planes.append(_along_rows(_cast(plane, jnp.uint8) ^ 0x80, bits).T)
    scale = self.scale.astype(jnp.float32)
    minimum = None if self.minimum is None else self.minimum.astype(jnp.float32)
    return PlanarArray(
      tuple(planes), scale, self.scale_code, minimum, self.minimum_code, *self._law()
    )

  def dequantize(self) -> jax.Array:
    """float32[N, K], bit-equal to the PlanarArray's."""
    return self.to_planar().dequantize()

  def take(self, ids: jax.Array) -> "RowPlanarArray":
    """Rows `ids` int32[T] of the matrix; an id outside it takes the nearest."""

    def take(part: jax.Array, axis: int) -> jax.Array:
      return jnp.take(part, ids, axis=axis, mode="clip")

    def factor(part: jax.Array | None) -> jax.Array | None:
      return None if part is None else take(part, 1)

    return dataclasses.replace(
      self,
      planes=tuple(take(plane, 0) for plane in self.planes),
      scale=take(self.scale, 1),
      scale_code=factor(self.scale_code),
      minimum=factor(self.minimum),
      minimum_code=factor(self.minimum_code),
    )

  def _law(self) -> tuple[tuple[int, ...], int, str]:
    return self.bits, self.offset, self.source


def _scale_dtype(source: str) -> np.dtype:
  """The dtype that scales had before they became a PlanarArray's; GGUF's are float16."""
  kind, *tags = source.split(":")
  return jnp.dtype(tags[0] if kind == "q4" else jnp.float16)


def _cast(rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """The bits of [N, columns] as another integer; int4 has two columns a byte, the lower first."""
  n, _ = rows.shape
  if jnp.dtype(dtype) == jnp.uint8 and rows.dtype == jnp.int4:
    rows = rows.reshape(n, -1, 2)
  return jax.lax.bitcast_convert_type(rows, dtype).reshape(n, -1)


def _along_chunks(rows: jax.Array, bits: int) -> jax.Array:
  """uint8[N, K * bits / 8]: codes 8/bits side by side in a byte -> a chunk's codes across bytes."""
  codes = jnp.stack([rows >> j & (2**bits - 1) for j in range(0, 8, bits)], axis=-1)
  return _pack(codes.reshape(len(rows), -1, 8 // bits, CHUNK * bits // 8).swapaxes(2, 3), bits)


def _along_rows(rows: jax.Array, bits: int) -> jax.Array:
  """The inverse of `_along_chunks`."""
  codes = jnp.stack([rows >> j & (2**bits - 1) for j in range(0, 8, bits)], axis=-1)
  codes = codes.reshape(len(rows), -1, CHUNK * bits // 8, 8 // bits).swapaxes(2, 3)
  return _pack(codes.reshape(len(rows), -1, 8 // bits), bits)


def _pack(codes: jax.Array, bits: int) -> jax.Array:
  """uint8[N, ..., 8 / bits] codes -> uint8[N, bytes], the first code lowest."""
  shifted = (codes[..., j] << bits * j for j in range(8 // bits))
  return functools.reduce(jnp.bitwise_or, shifted).reshape(len(codes), -1)
