"""The head of a .qbin file: its first 24 bytes and the protobuf header after them, checked.

All integers are little-endian:

  magic 89 51 42 49 4E 0D 0A 1A | major u16 | minor u16 | header bytes u64 | CRC-32 u32 | header

The checksum covers the 20 bytes before it and the header. Then zeros up to a multiple of 4096,
where the data section begins. docs/formats/qbin.md has the rest.

A file is a stranger's: lengths are compared with the file's, and what can be many is counted,
before anything is allocated for it.
"""

import dataclasses
import itertools
import struct
import zlib
from collections.abc import Iterator
from mmap import mmap

from google.protobuf.message import DecodeError

from q4jax.errors import FormatError
from q4jax.formats import qbin_pb2 as pb
from q4jax.formats.checkpoint import Tensor
from q4jax.formats.gguf_header import MAX_DIMS, MAX_NAME_BYTES
from q4jax_kernels.block_array import FIELDS, ROWS, block_shape
from q4jax_kernels.code_words import CODES

# As PNG's: a transfer that takes the file for text, or cuts the eighth bit off, shows at once.
MAGIC = b"\x89QBIN\r\n\x1a"
MAJOR, MINOR = 1, 0
ALIGNMENT = 4096
LAYOUTS = ("rows", "x16")  # Of matrices, to choose from; see `tiled_layout`.
MAX_HEADER_BYTES = 64 << 20
MAX_FIELDS = 1 << 18  # Of the header and of its records: entries, tensors, statistics.
_FIXED = struct.Struct("<8sHHQ")
FIXED_BYTES = _FIXED.size + 4

DAMAGED = "The file is truncated or damaged: copy or download it again, or convert the model again."


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where a tensor lies in the file.

  Attributes:
    layout: "rows", or the tiles of `q4jax_kernels.block_array`: "x16", or "x16w" where their codes
      are packed anew.
    offset: of its first byte, from the start of the file; a multiple of 4096.
    nbytes: stored; in tiles the rows that fill up the last tile are among them.
    checksum: CRC-32 of these bytes, None if the file has none.
  """

  tensor: Tensor
  layout: str
  offset: int
  nbytes: int
  checksum: int | None

  @property
  def tiled(self) -> bool:
    return self.layout != "rows"

  @property
  def mappable(self) -> bool:
    """Whether the CPU's kernels can read it where it lies."""
    return self.layout == tiled_layout(self.tensor.format)


@dataclasses.dataclass(frozen=True)
class Head:
  """What comes before the tensors.

  Attributes:
    header: the message, with the fields that only its writer knew.
    minor: version.
    data: where the data section begins.
  """

  header: pb.Header
  minor: int
  data: int


def pack(header: pb.Header, minor: int = MINOR) -> bytes:
  """The bytes of a file up to its data section."""
  body = header.SerializeToString(deterministic=True)
  if len(body) > MAX_HEADER_BYTES:
    raise FormatError(
      f"the header takes {len(body)} bytes, and a .qbin may have {MAX_HEADER_BYTES}: its metadata "
      "or its records are too large. Leave records of weights out: blocks hold their scales."
    )
  fixed = _FIXED.pack(MAGIC, MAJOR, minor, len(body))
  checksum = zlib.crc32(body, zlib.crc32(fixed))
  head = fixed + struct.pack("<I", checksum) + body
  return head + bytes(padding(len(head)))


def padding(size: int) -> int:
  """Bytes from `size` to the next multiple of 4096."""
  return -size % ALIGNMENT


def stored_bytes(tensor: Tensor, layout: str) -> int:
  """What a tensor takes in a layout."""
  rows = tensor.num_rows
  return (rows if layout == "rows" else -(-rows // ROWS) * ROWS) * tensor.row_bytes


def tiled_layout(format: str) -> str:
  """What a file calls the tiles of a format that the CPU's kernels read."""
  return "x16w" if format in CODES else "x16"


def parse(buffer: mmap | bytes, path: str) -> Head:
  """The head of the file whose bytes are `buffer`; its tensors are for `places` to check.

  Raises:
    FormatError: it is no .qbin, of a newer major version, damaged, or beyond a limit.
  """
  view = memoryview(buffer)
  magic, major, minor, length = _FIXED.unpack_from(view)
  if magic != MAGIC:
    raise FormatError(
      f"{path}: this is not a .qbin file: it begins with {magic!r}, expected {MAGIC!r}. Is it "
      "another format, or was it transferred as text? Copy it in binary mode, or name another file."
    )
  if major != MAJOR:
    raise FormatError(
      f"{path}: the file is of version {major}.{minor}, and this q4jax reads versions {MAJOR}.x. "
      "Update q4jax, or convert the model again."
    )
  if length > min(MAX_HEADER_BYTES, len(view) - FIXED_BYTES):
    raise FormatError(
      f"{path}: the header is said to have {length} bytes; the file has {len(view) - FIXED_BYTES} "
      f"after its first {FIXED_BYTES}, and q4jax's limit is {MAX_HEADER_BYTES}. {DAMAGED}"
    )
  body = view[FIXED_BYTES : FIXED_BYTES + length]
  (expected,) = struct.unpack_from("<I", view, _FIXED.size)
  found = zlib.crc32(body, zlib.crc32(view[: _FIXED.size]))
  if found != expected:
    raise FormatError(
      f"{path}: the header's checksum is {found:#010x}; the file says {expected:#010x}. {DAMAGED}"
    )
  header = pb.Header()
  try:
    _count_fields(body)
    header.ParseFromString(bytes(body))
  except (DecodeError, ValueError) as error:
    raise FormatError(f"{path}: the header is no valid protobuf: {error}. {DAMAGED}") from None
  end = FIXED_BYTES + length
  return Head(header, minor, end + padding(end))


def places(head: Head, size: int, path: str) -> dict[str, Stored]:
  """The tensors by name, once known to lie in a file of `size` bytes, aligned and apart."""
  found: dict[str, Stored] = {}
  for message in head.header.tensors:
    stored = _stored(message, head.data, path)
    name, end = stored.tensor.name, stored.offset + stored.nbytes
    if name in found:
      raise FormatError(f"{path}: tensor {name!r} occurs twice. {DAMAGED}")
    if end > size:
      raise FormatError(
        f"{path}: tensor {name!r} fills bytes {stored.offset} to {end}, and the file ends at "
        f"{size}. {DAMAGED}"
      )
    found[name] = stored
  for a, b in itertools.pairwise(sorted(found.values(), key=lambda stored: stored.offset)):
    if a.offset + a.nbytes > b.offset:
      raise FormatError(
        f"{path}: tensors {a.tensor.name!r} and {b.tensor.name!r} overlap: the first ends at byte "
        f"{a.offset + a.nbytes}, the second begins at {b.offset}. {DAMAGED}"
      )
  return found


def _stored(message: pb.Tensor, data: int, path: str) -> Stored:
  name, shape = message.name, tuple(message.shape[: MAX_DIMS + 1])
  what = f"{path}: tensor {name[:80]!r}"
  if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
    raise FormatError(f"{what}: a name has 1 to {MAX_NAME_BYTES} bytes. {DAMAGED}")
  if not 1 <= len(shape) <= MAX_DIMS or 0 in shape:
    raise FormatError(
      f"{what} has shape {list(shape)}; expected 1 to {MAX_DIMS} dimensions of 1 or more. {DAMAGED}"
    )
  if message.format not in FIELDS:
    raise FormatError(
      f"{what} is of format {message.format[:80]!r}, which q4jax does not read. It reads "
      f"{', '.join(FIELDS)}. Update q4jax, or convert the model again."
    )
  tiles = ("x16", tiled_layout(message.format)) if len(shape) > 1 else ()
  if message.layout not in ("rows", *tiles):
    raise FormatError(
      f"{what} ({message.format}) of shape {list(shape)} has layout {message.layout[:80]!r}; "
      "expected 'rows', or for a matrix 'x16', or 'x16w' of q5_k or q6_k. Update q4jax, or convert "
      "the model again."
    )
  if shape[-1] % block_shape(message.format)[0]:
    raise FormatError(
      f"{what} has rows of {shape[-1]}, which is not a multiple of {message.format}'s block of "
      f"{block_shape(message.format)[0]}. {DAMAGED}"
    )
  tensor = Tensor(name, shape, message.format)
  nbytes = stored_bytes(tensor, message.layout)
  if message.nbytes != nbytes or message.offset % ALIGNMENT:
    raise FormatError(
      f"{what} ({message.format}, {message.layout}, shape {list(shape)}) has {message.nbytes} "
      f"bytes at offset {message.offset}; expected {nbytes} at a multiple of {ALIGNMENT}. {DAMAGED}"
    )
  checksum = message.checksum if message.HasField("checksum") else None
  return Stored(tensor, message.layout, data + message.offset, nbytes, checksum)


def _count_fields(body: memoryview) -> None:
  """Refuses a header of more fields than any model has: each becomes an object of a hundred bytes.

  What a field can hold without such a limit (strings, numbers) grows with the header's bytes.
  """
  count = 0
  for number, value in _fields(body):
    nested = _fields(value) if number == pb.Header.RECORDS_FIELD_NUMBER else ()
    for _ in itertools.chain([number], nested):
      count += 1
      if count > MAX_FIELDS:
        raise ValueError(f"it has more than {MAX_FIELDS} fields")


def _fields(view: memoryview) -> Iterator[tuple[int, memoryview]]:
  """(number, bytes) of each field of a message; no bytes but where the field has a length.

  Source: protobuf.dev/programming-guides/encoding.
  """
  at, end = 0, len(view)
  while at < end:
    tag, at = _varint(view, at)
    kind, size = tag & 7, 0
    if kind == 0:
      _, at = _varint(view, at)
    elif kind == 2:
      size, at = _varint(view, at)
    elif kind in (1, 5):
      at += 8 if kind == 1 else 4
    else:
      raise ValueError(f"a field is of wire type {kind}")
    if at + size > end:
      raise ValueError("a field ends past its message")
    yield tag >> 3, view[at : at + size]
    at += size


def _varint(view: memoryview, at: int) -> tuple[int, int]:
  value = 0
  for shift in range(0, 70, 7):
    if at + shift // 7 >= len(view):
      break
    byte = view[at + shift // 7]
    value |= (byte & 127) << shift
    if byte < 128:
      return value, at + shift // 7 + 1
  raise ValueError("a number does not end")
