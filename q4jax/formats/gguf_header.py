"""Reads and checks the header of one GGUF file: its key-value pairs and its table of tensors.

Layout, all integers little-endian; a string is a u64 length and that many bytes of UTF-8:

  "GGUF" | version u32 | tensor count u64 | key count u64
  keys:    key string | value type u32 | value;     an array is: type u32 | length u64 | elements
  tensors: name string | dimensions u32 | ne u64[dimensions] innermost first | type u32 | offset u64
  padding to `general.alignment` (32), then the data section, from which offsets count

A file is a stranger's: every length and count is compared with the bytes that are left before
anything is allocated or looped over, and what can be many (keys, tensors, strings, header bytes)
has a limit far above any real model. Source: GGUF specification (ggml/docs/gguf.md), gguf.h.
"""

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from q4jax.errors import FormatError
from q4jax.formats.gguf_types import (
  ARRAY,
  BOOL,
  OTHER_TENSOR_TYPES,
  SCALARS,
  STRING,
  TENSOR_TYPES,
  TensorInfo,
  TensorType,
)

VERSIONS = (2, 3)
FIXED_BYTES = 24  # Magic, version and the two counts.
DEFAULT_ALIGNMENT = 32
ALIGNMENTS = tuple(2**i for i in range(3, 21))  # 8 bytes to 1 MiB.
# Limits. The largest vocabularies in use (256k tokens, 500k merges) fill 20 MiB and 0.8M strings.
MAX_HEADER_BYTES = 48 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_STRINGS = 3 << 19
MAX_KEY_BYTES = 65535  # GGUF specification.
MAX_NAME_BYTES = 63  # ggml's GGML_MAX_NAME is 64 with the closing zero.
MAX_DIMS = 4

DAMAGED = (
  "The file is truncated, damaged or was written by a broken tool: download it or convert it again."
)


@dataclass(frozen=True)
class Header:
  """What a file says about itself. Keys and tensors are in the order of the file.

  `value_types` are the numbers of the values' types (gguf_types): Python's int is several of them.
  """

  version: int
  metadata: dict[str, Any]
  value_types: dict[str, int]
  tensors: dict[str, TensorInfo]


def parse_header(buffer: mmap | bytes, path: Path) -> Header:
  """The header of the file whose bytes are `buffer`.

  Numbers become Python's, arrays of numbers NumPy arrays, arrays of strings lists.

  Raises:
    FormatError: the file breaks the format, uses a type or version that is not supported, or
      exceeds a limit. The message names the path, the byte and the key or tensor.
  """
  cursor = _Cursor(buffer, path)
  version = _version(cursor)
  num_tensors = cursor.count("tensors", MAX_TENSORS, min_bytes=8 + 1 + 4 + 8 + 4 + 8)
  num_keys = cursor.count("keys", MAX_KEYS, min_bytes=8 + 1 + 4 + 1)
  metadata: dict[str, Any] = {}
  value_types: dict[str, int] = {}
  for i in range(num_keys):
    at = cursor.at
    key = cursor.string(f"key {i}", MAX_KEY_BYTES)
    if not key:
      raise cursor.error(f"key {i} is empty.", at)
    if key in metadata:
      raise cursor.error(f"the key {_show(key)} occurs twice.", at)
    value_types[key], metadata[key] = cursor.value(key)
  entries = [_tensor_entry(cursor, i) for i in range(num_tensors)]
  tensors = _place_tensors(cursor, entries, _alignment(cursor, metadata))
  return Header(version, metadata, value_types, tensors)


def _version(cursor: "_Cursor") -> int:
  magic = cursor.bytes(4, "the magic")
  if magic != b"GGUF":
    raise cursor.error(
      f"this is not a GGUF file: it begins with {magic!r}, expected b'GGUF'.",
      0,
      "Is it another format, a web page or a Git LFS pointer saved under this name? Download the "
      "model file itself.",
    )
  version = cursor.integer(4, "the version")
  if version & 0xFFFF == 0 and version:
    raise cursor.error(
      f"the version reads {version:#010x}: this is a big-endian GGUF file, and q4jax reads "
      "little-endian ones.",
      4,
      "Convert the model again without --bigendian.",
    )
  if version not in VERSIONS:
    raise cursor.error(
      f"GGUF version {version} is not supported; q4jax reads versions 2 and 3.",
      4,
      "Convert the model again with a current llama.cpp.",
    )
  return version


@dataclass(frozen=True)
class _TensorEntry:
  """A row of the table of tensors, its offset from the data section not yet checked."""

  at: int
  name: str
  shape: tuple[int, ...]
  type: TensorType
  offset: int

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) // self.type.block_size * self.type.block_bytes


def _tensor_entry(cursor: "_Cursor", i: int) -> _TensorEntry:
  at = cursor.at
  name = cursor.string(f"the name of tensor {i}", MAX_NAME_BYTES)
  if not name:
    raise cursor.error(f"the name of tensor {i} is empty.", at)
  what = f"tensor {_show(name)}"
  num_dims = cursor.integer(4, f"the number of dimensions of {what}")
  if not 1 <= num_dims <= MAX_DIMS:
    raise cursor.error(f"{what} has {num_dims} dimensions; expected 1..{MAX_DIMS}.", at)
  ne = [cursor.integer(8, f"a dimension of {what}") for _ in range(num_dims)]
  if 0 in ne:
    raise cursor.error(f"{what} has a dimension of 0: ne = {ne}.", at)
  number = cursor.integer(4, f"the type of {what}")
  if number not in TENSOR_TYPES:
    known = OTHER_TENSOR_TYPES.get(number, "an unknown type")
    raise cursor.error(
      f"{what} is stored as {known} (number {number}), which q4jax does not read. It reads "
      f"{', '.join(type.name for type in TENSOR_TYPES.values())}.",
      at,
      "Use a file quantised to one of these.",
    )
  type = TENSOR_TYPES[number]
  if ne[0] % type.block_size:
    raise cursor.error(
      f"{what} has rows of {ne[0]}, which is not a multiple of {type.name}'s block of "
      f"{type.block_size}.",
      at,
    )
  offset = cursor.integer(8, f"the offset of {what}")
  return _TensorEntry(at, name, tuple(reversed(ne)), type, offset)


def _place_tensors(
  cursor: "_Cursor", entries: list[_TensorEntry], alignment: int
) -> dict[str, TensorInfo]:
  """The tensors by name, once they are known to lie in the file, aligned and apart."""
  data = -(-cursor.at // alignment) * alignment
  tensors: dict[str, TensorInfo] = {}
  for entry in entries:
    what = f"tensor {_show(entry.name)}"
    if entry.name in tensors:
      raise cursor.error(f"{what} occurs twice.", entry.at)
    if entry.offset % alignment:
      raise cursor.error(
        f"{what} has offset {entry.offset}, which is not a multiple of the alignment {alignment}.",
        entry.at,
      )
    start = data + entry.offset
    if start + entry.nbytes > cursor.size:
      raise cursor.error(
        f"{what} ({entry.type.name}, shape {entry.shape}) fills bytes {start} to "
        f"{start + entry.nbytes}, and the file ends at {cursor.size}.",
        entry.at,
      )
    tensors[entry.name] = TensorInfo(
      entry.name, entry.shape, entry.type.name, cursor.path, start, entry.nbytes
    )
  for a, b in pairwise(sorted(tensors.values(), key=lambda info: info.offset)):
    if a.offset + a.nbytes > b.offset:
      raise cursor.error(
        f"tensors {_show(a.name)} and {_show(b.name)} overlap: the first ends at "
        f"{a.offset + a.nbytes}.",
        b.offset,
      )
  return tensors


def _alignment(cursor: "_Cursor", metadata: dict[str, Any]) -> int:
  alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
  if type(alignment) is not int or alignment not in ALIGNMENTS:
    raise FormatError(
      f"{cursor.path}: general.alignment is {_show(alignment)}; expected a power of two from "
      f"{ALIGNMENTS[0]} to {ALIGNMENTS[-1]}. {DAMAGED}"
    )
  return alignment


class _Cursor:
  """A place in the header, which moves on only over bytes that are there."""

  def __init__(self, buffer: mmap | bytes, path: Path):
    self.buffer, self.path = buffer, path
    self.at, self.size = 0, len(buffer)
    self.end = min(self.size, MAX_HEADER_BYTES)
    self.num_strings = 0

  def error(self, found: str, at: int, todo: str = DAMAGED) -> FormatError:
    return FormatError(f"{self.path}: byte {at}: {found} {todo}")

  def skip(self, length: int, what: str) -> int:
    """Moves on by `length` bytes; where they begin."""
    start = self.at
    if length > self.end - start:
      if start + length <= self.size:
        found = f"{what} ends past {MAX_HEADER_BYTES} bytes, q4jax's limit for a header."
      else:
        found = f"{what} needs {length} bytes, and the file has {self.size - start} left."
      raise self.error(found, start)
    self.at = start + length
    return start

  def bytes(self, length: int, what: str) -> bytes:
    start = self.skip(length, what)
    return self.buffer[start : self.at]

  def integer(self, length: int, what: str) -> int:
    return int.from_bytes(self.bytes(length, what), "little")

  def count(self, what: str, limit: int, min_bytes: int) -> int:
    """A u64 number of things that follow and take `min_bytes` or more each."""
    at = self.at
    count = self.integer(8, f"the number of {what}")
    room = (self.size - self.at) // min_bytes
    if count > room:
      raise self.error(f"there are {count} {what}, and the rest of the file holds {room}.", at)
    if count > limit:
      raise self.error(f"there are {count} {what}; q4jax's limit is {limit}.", at)
    return count

  def string(self, what: str, limit: int | None = None) -> str:
    at = self.at
    length = self.integer(8, f"the length of {what}")
    if limit is not None and length > limit:
      raise self.error(f"{what} is {length} bytes long; at most {limit} are allowed.", at)
    data = self.bytes(length, what)
    try:
      return str(data, "utf-8")
    except UnicodeDecodeError as error:
      raise self.error(f"{what} is not valid UTF-8: {error}.", at) from None

  def value(self, key: str) -> tuple[int, Any]:
    """The value that follows a key, behind the number of its type."""
    at = self.at
    what = f"the value of {_show(key)}"
    kind = self.integer(4, f"the type of {_show(key)}")
    if kind == STRING:
      return kind, self.string(what)
    if kind == ARRAY:
      return kind, self._array(what)
    if kind not in SCALARS:
      raise self.error(f"{what} has the unknown type {kind}; types are 0..12.", at)
    return kind, self._numbers(kind, 1, what)[0].item()

  def _array(self, what: str) -> Any:
    at = self.at
    kind = self.integer(4, f"the element type of {what}")
    if kind == ARRAY:
      raise self.error(f"{what} is an array of arrays, which no supported model uses.", at)
    if kind != STRING and kind not in SCALARS:
      raise self.error(f"{what} has elements of the unknown type {kind}; types are 0..12.", at)
    if kind == STRING:
      return self._strings(what)
    return self._numbers(kind, self.integer(8, f"the length of {what}"), what)

  def _numbers(self, kind: int, length: int, what: str) -> np.ndarray:
    dtype = SCALARS[kind]
    at = self.skip(length * dtype.itemsize, what)
    data = self.buffer[at : self.at]
    if kind == BOOL and data.strip(b"\0\1"):
      raise self.error(f"{what} is a bool and holds a byte that is neither 0 nor 1.", at)
    return np.frombuffer(data, dtype)

  def _strings(self, what: str) -> list[str]:
    length = self.count(f"strings in {what}", MAX_STRINGS - self.num_strings, min_bytes=8)
    self.num_strings += length
    # A vocabulary is 10^5 strings: this is `string` without its calls.
    buffer, end, at = self.buffer, self.end, self.at
    unpack = struct.Struct("<Q").unpack_from
    strings: list[str] = []
    for i in range(length):
      start = at + 8
      stop = start + unpack(buffer, at)[0] if start <= end else start
      if stop > end:
        self.at = at
        self.string(f"string {i} of {what}")  # Raises.
      try:
        strings.append(str(buffer[start:stop], "utf-8"))
      except UnicodeDecodeError as error:
        raise self.error(f"string {i} of {what} is not valid UTF-8: {error}.", at) from None
      at = stop
    self.at = at
    return strings


def _show(value: object) -> str:
  """A value for a message: escaped, short, and made without copying a long one."""
  if isinstance(value, str) and len(value) > 80:
    return f"{value[:80]!r}..."
  return f"an array of {len(value)}" if isinstance(value, list | np.ndarray) else repr(value)
