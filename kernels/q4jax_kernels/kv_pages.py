"""Kv blocks of one side of the cache (keys or values), packed: the pool that block tables point to.

A block holds `block_size` slots (tokens) of every KV head. Letters: NB blocks, K KV heads, bs slots
of a block, H head_dim, G groups of a head. Two layouts:

rows  canonical: GPU, TPU, reference. A slot's numbers lie side by side.
  float  codes = float[NB, K, bs, H]
  int8   codes = uint8[NB, K, bs, H]
  int4   codes = uint8[NB, K, bs, H/2]: byte j has dim j in the low nibble, dim j + H/2 in the high
  scale, minimum = float16[NB, K, bs, G]

x16   what the CPU kernels read: words of 4 bytes, 16 lanes of them side by side.
  key, lanes are slots:
    int8  uint8[NB, K, bs/16, H/4, 16, 4]: [.., s, w, lane, j] = slot 16 s + lane, dim 4 w + j
    int4  uint8[NB, K, bs/16, H/8, 16, 4]: low nibble dim 4 w + j, high nibble dim H/2 + 4 w + j
    scale, minimum = float16[NB, K, bs/16, G, 16]
  value, lanes are dims:
    int8  uint8[NB, K, H/16, bs/4, 16, 4]: [.., d, w, lane, j] = slot 4 w + j, dim 16 d + lane
    int4  uint8[NB, K, H/16, bs/8, 16, 4]: low nibble slot 4 w + j, high nibble slot bs/2 + 4 w + j
    scale, minimum = float16[NB, K, G, bs]
  floats are as in rows.

Block 0 is the null block: it is never written.
"""

import dataclasses
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from q4jax_kernels import kv_format
from q4jax_kernels.kv_format import KVFormat

LAYOUTS = ("rows", "x16")
KINDS = ("key", "value")
LANES = 16


class Parts(NamedTuple):
  """What a format makes of numbers, packed or not; floats have codes only."""

  codes: jax.Array
  scale: jax.Array | None = None
  minimum: jax.Array | None = None


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["codes", "scale", "minimum"],
  meta_fields=["format", "block_size", "head_dim", "layout", "kind"],
)
@dataclasses.dataclass(frozen=True)
class Pages:
  """The keys or the values of a pool of blocks. Build with `Pages.zeros`."""

  codes: jax.Array
  scale: jax.Array | None
  minimum: jax.Array | None
  format: KVFormat
  block_size: int
  head_dim: int
  layout: str
  kind: str

  @classmethod
  def zeros(
    cls,
    num_blocks: int,
    kv_heads: int,
    head_dim: int,
    format: KVFormat,
    *,
    kind: str,
    layout: str = "rows",
    block_size: int = 32,
  ) -> Self:
    """A pool of num_blocks, block 0 included. Raises ValueError: see `check`."""
    check(format, block_size, head_dim, layout, kind)
    shape = (num_blocks, kv_heads, block_size, head_dim)
    if format.is_float:
      parts = Parts(jnp.zeros(shape, format.dtype))
    else:
      scale = jnp.zeros((*shape[:-1], format.groups(head_dim)), jnp.float16)
      minimum = None if format.symmetric else jnp.zeros_like(scale)
      parts = pack(Parts(jnp.zeros(shape, jnp.uint8), scale, minimum), format, layout, kind)
    return cls(*parts, format, block_size, head_dim, layout, kind)

  @property
  def parts(self) -> Parts:
    return Parts(self.codes, self.scale, self.minimum)

  @property
  def num_blocks(self) -> int:
    """NB."""
    return self.codes.shape[0]

  @property
  def kv_heads(self) -> int:
    """K."""
    return self.codes.shape[1]

  @property
  def nbytes(self) -> int:
    """Of all blocks, scales and all."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))


def check(format: KVFormat, block_size: int, head_dim: int, layout: str, kind: str) -> None:
  """Raises ValueError where blocks cannot be laid out so."""
  if layout not in LAYOUTS or kind not in KINDS:
    raise ValueError(f"layout='{layout}', kind='{kind}': expected one of {LAYOUTS} and of {KINDS}.")
  if block_size < 16 or block_size % 16:
    raise ValueError(f"block_size={block_size} must be a positive multiple of 16.")
  if layout == "x16" and head_dim % LANES:
    raise ValueError(
      f"layout='x16' needs a head_dim that is a multiple of {LANES}; got {head_dim}. Use 'rows'."
    )
  format.groups(head_dim)


def pack(parts: Parts, format: KVFormat, layout: str, kind: str) -> Parts:
  """Codes uint8[..., bs, H], one a byte, and float16[..., bs, G], as the layout has them."""
  codes, *scales = parts
  dims_across = layout == "x16" and kind == "value"
  if format.bits == 4:
    low, high = jnp.split(codes, 2, -2 if dims_across else -1)
    codes = low | high << 4
  if layout == "rows":
    return Parts(codes, *scales)
  *lead, rows, columns = codes.shape
  if dims_across:  # w, j, d, lane -> d, w, lane, j
    codes = _permute(codes.reshape(*lead, rows // 4, 4, columns // LANES, LANES), 2, 0, 3, 1)
    return Parts(codes, *jax.tree.map(lambda a: a.swapaxes(-1, -2), scales))
  # s, lane, w, j -> s, w, lane, j
  codes = _permute(codes.reshape(*lead, rows // LANES, LANES, columns // 4, 4), 0, 2, 1, 3)

  def in_lanes(a: jax.Array) -> jax.Array:
    return a.reshape(*lead, rows // LANES, LANES, a.shape[-1]).swapaxes(-1, -2)

  return Parts(codes, *jax.tree.map(in_lanes, scales))


def unpack(parts: Parts, format: KVFormat, layout: str, kind: str) -> Parts:
  """The inverse of `pack`: codes uint8[..., bs, H] and float16[..., bs, G]."""
  codes, *scales = parts
  dims_across = layout == "x16" and kind == "value"
  if layout == "x16":
    *lead, a, b, _, _ = codes.shape
    scales = jax.tree.map(lambda a: a.swapaxes(-1, -2), scales)
    if dims_across:  # d, w, lane, j -> w, j, d, lane
      codes = _permute(codes, 1, 3, 0, 2).reshape(*lead, 4 * b, LANES * a)
    else:
      codes = _permute(codes, 0, 2, 1, 3).reshape(*lead, LANES * a, 4 * b)
      scales = jax.tree.map(lambda s: s.reshape(*lead, LANES * a, -1), scales)
  if format.bits == 4:
    codes = jnp.concatenate([codes & 15, codes >> 4], axis=-2 if dims_across else -1)
  return Parts(codes, *scales)


def encode(pages: Pages, x: jax.Array) -> Parts:
  """float[..., bs, H] as these pages store it, packed."""
  if pages.format.is_float:
    return Parts(kv_format.to_float(x, pages.format))
  parts = Parts(*kv_format.quantize(x, pages.format))
  return pack(parts, pages.format, pages.layout, pages.kind)


def decode(pages: Pages, parts: Parts) -> jax.Array:
  """The inverse of `encode`, as float32[..., bs, H]."""
  if pages.format.is_float:
    return parts.codes.astype(jnp.float32)
  codes, scale, minimum = unpack(parts, pages.format, pages.layout, pages.kind)
  assert scale is not None
  return kv_format.dequantize(codes, scale, minimum, pages.format)


def write(pages: Pages, block_ids: jax.Array, x: jax.Array) -> Pages:
  """Quantises whole blocks.

  Args:
    pages: donate them to have them changed in place.
    block_ids: int32[n], where to; 0 drops the block. Others differ from each other.
    x: float[n, K, bs, H].
  """
  return _put(pages, block_ids, encode(pages, x))


def read(pages: Pages, block_ids: jax.Array) -> jax.Array:
  """The numbers of blocks int32[...], float32[..., K, bs, H]."""
  parts = jax.tree.map(lambda a: a[block_ids], pages.parts)
  return decode(pages, parts)


def gather_slots(
  pages: Pages, source_block: jax.Array, source_slot: jax.Array, block_ids: jax.Array
) -> Pages:
  """Fills blocks with slots of any blocks (compaction). Codes and scales move bit for bit.

  Args:
    pages: all sources are read before anything is written.
    source_block: int32[n, bs], the block that slot s of the i-th new block comes from.
    source_slot: int32[n, bs], and the slot in it.
    block_ids: int32[n], the new blocks; 0 drops it. Others differ from each other.
  """
  parts = jax.tree.map(lambda a: a.swapaxes(1, 2), _take(pages, source_block, source_slot))
  if not pages.format.is_float:
    parts = pack(parts, pages.format, pages.layout, pages.kind)
  return _put(pages, block_ids, parts)


def _take(pages: Pages, block: jax.Array, slot: jax.Array) -> Parts:
  """Single slots, unpacked: codes [n, bs, K, H], scale and minimum [n, bs, K, G]."""
  bits, half = pages.format.bits, pages.block_size // 2
  if pages.format.is_float:
    return Parts(pages.codes[block, :, slot])
  if pages.layout == "rows":
    found: Parts = jax.tree.map(lambda a: a[block, :, slot], pages.parts)
    return unpack(found, pages.format, "rows", pages.kind)
  codes, *scales = pages.parts
  if pages.kind == "key":  # A slot has its bytes to itself, in the order of rows.
    lane = (block, slice(None), slot // LANES, slice(None), slot % LANES)
    row = codes[lane]  # [n, bs, K, words, 4]
    found = Parts(row.reshape(*row.shape[:3], -1), *jax.tree.map(lambda a: a[lane], scales))
    return unpack(found, pages.format, "rows", pages.kind)
  at = slot % half if bits == 4 else slot
  row = codes[block, :, :, at // 4, :, at % 4]  # [n, bs, K, H/16, 16]
  row = row.reshape(*row.shape[:3], -1)
  if bits == 4:
    row = jnp.where((slot < half)[..., None, None], row & 15, row >> 4)
  return Parts(row, *jax.tree.map(lambda a: a[block, :, :, slot], scales))


def _put(pages: Pages, block_ids: jax.Array, parts: Parts) -> Pages:
  at = jnp.where(block_ids > 0, block_ids, pages.num_blocks)  # past the end, which drops it
  new = jax.tree.map(lambda old, part: old.at[at].set(part, mode="drop"), pages.parts, parts)
  return dataclasses.replace(pages, codes=new.codes, scale=new.scale, minimum=new.minimum)


def _permute(x: jax.Array, *axes: int) -> jax.Array:
  """The last four axes in this order."""
  lead = x.ndim - 4
  return x.transpose(*range(lead), *(lead + a for a in axes))
