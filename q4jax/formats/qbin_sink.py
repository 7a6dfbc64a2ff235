"""Writes .qbin files: a `Sink`, and calibration put into a file that is there."""

import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from q4jax import __version__
from q4jax import config as config_lib
from q4jax.config import LlamaConfig
from q4jax.errors import ConfigError
from q4jax.formats import qbin_header
from q4jax.formats import qbin_pb2 as pb
from q4jax.formats.atomic import replacing
from q4jax.formats.checkpoint import Bytes, Tensor
from q4jax.formats.qbin import QbinCheckpoint
from q4jax.formats.qbin_header import LAYOUTS
from q4jax.formats.qbin_values import pack_metadata, pack_record
from q4jax.records import Record
from q4jax_kernels.block_array import ROWS, interleave_tile

# Bytes put into tiles, summed and written at a time.
_CHUNK_BYTES = 16 << 20


class QbinSink:
  """See `Sink`. Memory: 16 MiB and the header.

  Sizes, and so offsets, are known from the start. The header comes first, so that a reader needs
  nothing else; a checksum takes four bytes whatever its value, so the header is written once more,
  of the same length, when all checksums are known.

  Args:
    path: of the file to be.
    config: of the model; `metadata` must describe it.
    metadata: GGUF keys and values, the tokenizer's among them.
    tensors: all that will be written.
    layout: of matrices: "x16" for the CPU's kernels, which then read the file itself, or "rows".
    records: calibration that travels with the model.
    types: see `pack_metadata`.

  Raises:
    ConfigError: an argument that cannot be written or read back; it names it.
  """

  def __init__(
    self,
    path: str | Path,
    config: LlamaConfig,
    metadata: Mapping[str, Any],
    tensors: Sequence[Tensor],
    *,
    layout: str = "x16",
    records: Iterable[Record] = (),
    types: Mapping[str, int] | None = None,
  ):
    if layout not in LAYOUTS:
      raise ConfigError(
        f"layout '{layout}' of a .qbin is unknown; expected {' or '.join(LAYOUTS)}."
      )
    self.path = Path(path)
    self._header = pb.Header(q4jax_version=__version__, metadata=pack_metadata(metadata, types))
    self._header.records.extend(map(pack_record, records))
    offset = 0
    for tensor in tensors:
      tiled = layout == "x16" and len(tensor.shape) > 1
      own = qbin_header.tiled_layout(tensor.format) if tiled else "rows"
      nbytes = qbin_header.stored_bytes(tensor, own)
      self._header.tensors.add(
        name=tensor.name, shape=tensor.shape, format=tensor.format, layout=own, offset=offset,
        nbytes=nbytes, checksum=0,
      )  # fmt: skip
      offset += nbytes + qbin_header.padding(nbytes)
    self._entries = {entry.name: entry for entry in self._header.tensors}
    self._tensors = {tensor.name: tensor for tensor in tensors}
    self._missing = set(self._tensors)
    self._data = len(qbin_header.pack(self._header))
    head = qbin_header.Head(self._header, qbin_header.MINOR, self._data)
    qbin_header.places(head, self._data + offset, str(path))  # Refuses what would not be read.
    if config_lib.from_gguf(metadata, frozenset(self._tensors), str(path)) != config:
      raise ConfigError(f"{path}: the metadata describes another model than the config {config}.")
    self._stack = ExitStack()
    self._file: BinaryIO

  def __enter__(self) -> Self:
    with ExitStack() as stack:
      temporary = stack.enter_context(replacing(self.path))
      self._file = stack.enter_context(temporary.open("wb"))
      self._stack = stack.pop_all()
    return self

  def write(self, tensor: Tensor, rows: Bytes) -> None:
    """See `Sink.write`."""
    expected = self._tensors.get(tensor.name)
    if tensor != expected or rows.shape != (tensor.num_rows, tensor.row_bytes):
      raise ConfigError(
        f"{self.path}: {tensor} with rows of shape {list(rows.shape)} cannot be written; the file "
        f"was opened for {expected}."
      )
    entry = self._entries[tensor.name]
    self._file.seek(self._data + entry.offset)
    tiled = entry.layout != "rows"
    step = max(1, _CHUNK_BYTES // max(1, tensor.row_bytes) // ROWS) * ROWS
    checksum = 0
    for first in range(0, tensor.num_rows, step):
      part = rows[first : first + step]
      chunk = _tiles(part, tensor.format) if tiled else np.ascontiguousarray(part)
      checksum = zlib.crc32(chunk.data, checksum)
      self._file.write(chunk.data)
    entry.checksum = checksum
    self._missing.discard(tensor.name)

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
    if error is not None:
      self._stack.__exit__(kind, error, traceback)
      return
    with self._stack:
      if self._missing:
        raise ConfigError(
          f"{self.path}: {len(self._missing)} tensor(s) were not written, first "
          f"'{min(self._missing)}'."
        )
      head = qbin_header.pack(self._header)
      assert len(head) == self._data
      self._file.seek(0)
      self._file.write(head)


def _tiles(rows: Bytes, format: str) -> Bytes:
  """Rows as x16 tiles, uint8[ceil(N / 16), 16 * row_bytes]."""
  out = np.empty((-(-len(rows) // ROWS), ROWS * rows.shape[1]), np.uint8)
  for i, tile in enumerate(out):
    interleave_tile(rows[i * ROWS : (i + 1) * ROWS], format, tile)
  return out


def set_records(path: str | Path, records: Iterable[Record]) -> None:
  """Puts a calibration into a .qbin, in place of the one in it; all else stays, known or not.

  Raises:
    FormatError: the file is no good .qbin.
    ConfigError: it cannot be written.
  """
  with QbinCheckpoint.open(path) as old:
    header = pb.Header()
    header.CopyFrom(old.head.header)
    del header.records[:]
    header.records.extend(map(pack_record, records))
    with (
      replacing(path) as temporary,
      temporary.open("wb") as file,
      Path(path).open("rb") as source,
    ):
      file.write(qbin_header.pack(header, old.head.minor))
      source.seek(old.head.data)
      shutil.copyfileobj(source, file, _CHUNK_BYTES)
