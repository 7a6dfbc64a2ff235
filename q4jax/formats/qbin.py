"""A .qbin model as a `Checkpoint`: mapped, not parsed, its tensors ready for the CPU's kernels.

The file is a small header and tensors on pages of their own, in the order and, with layout x16, in
the tiles that memory has: `stored` hands the mapped bytes out, and JAX takes them as they are.
Processes that load the same file share its pages. docs/formats/qbin.md gives every byte.
"""

import zlib
from collections.abc import Mapping
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from typing import Any, Self

import numpy as np

from q4jax import config as config_lib
from q4jax.formats import mapped, qbin_header, qbin_values
from q4jax.formats.checkpoint import Bytes, Tensor
from q4jax.formats.qbin_header import FIXED_BYTES, Stored
from q4jax.records import Record
from q4jax_kernels.block_array import ROWS, separate_tile


class QbinCheckpoint:
  """See `Checkpoint`. The file must stay as it is while open: replace it by renaming, never write.

  Attributes:
    head: what the file says before its tensors.
    places: where each tensor lies, by name.
    value_types: the GGUF type of each single value of `metadata`; see `GGUFCheckpoint`.
  """

  def __init__(self, mapping: mmap, path: str):
    self.path, self._mapping = path, mapping
    self.head = qbin_header.parse(mapping, path)
    self.places: Mapping[str, Stored] = qbin_header.places(self.head, len(mapping), path)
    entries = self.head.header.metadata
    self.metadata: Mapping[str, Any] = qbin_values.unpack_metadata(entries, path)
    self.value_types: Mapping[str, int] = qbin_values.value_types(entries)
    self.tensors: Mapping[str, Tensor] = {n: stored.tensor for n, stored in self.places.items()}
    self.config = config_lib.from_gguf(self.metadata, frozenset(self.tensors), path)

  @classmethod
  def open(cls, path: str | Path) -> Self:
    """Maps a file and reads its header; no tensor is touched.

    Raises:
      FormatError: a file that cannot be read, breaks the format, or holds no model we know.
    """
    mapping = mapped.map_file(Path(path), FIXED_BYTES)
    try:
      return cls(mapping, str(path))
    except BaseException:
      with suppress(BufferError):  # The error's traceback may hold views; they go with it.
        mapping.close()
      raise

  def records(self) -> list[Record]:
    """The calibration that travels with the model.

    Raises:
      FormatError: see `qbin_values.unpack_records`.
    """
    return qbin_values.unpack_records(self.head.header.records, self.path)

  def stored(self, name: str) -> Bytes:
    """A tensor as it lies in the file: a read-only view, nothing is copied or read yet.

    Returns:
      uint8[tiles, 16 * row_bytes] of tiles, uint8[num_rows, row_bytes] of layout rows.
    """
    place = self.places[name]
    width = place.tensor.row_bytes * (ROWS if place.tiled else 1)
    return np.frombuffer(self._mapping, np.uint8, place.nbytes, place.offset).reshape(-1, width)

  def rows(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
    """See `Checkpoint.rows`. A view of the file, or of tiles a copy."""
    place = self.places[name]
    count = place.tensor.num_rows
    stop = count if stop is None else stop
    if not 0 <= start <= stop <= count:
      raise ValueError(f"rows {start}..{stop} are not within the {count} of {name}.")
    stored = self.stored(name)
    if not place.tiled:
      return stored[start:stop]
    first, last = start // ROWS, -(-stop // ROWS)
    out = np.empty((last - first, ROWS, place.tensor.row_bytes), np.uint8)
    for tile, part in zip(stored[first:last], out, strict=True):
      separate_tile(tile, place.tensor.format, part, packed=place.layout == "x16w")
    rows = out.reshape(-1, place.tensor.row_bytes)[start - first * ROWS : stop - first * ROWS]
    rows.flags.writeable = False
    return rows

  def is_intact(self, name: str) -> bool | None:
    """Whether a tensor's bytes have the checksum that the file gives; None if it gives none."""
    expected = self.places[name].checksum
    return None if expected is None else zlib.crc32(self.stored(name).data) == expected

  def release(self, name: str) -> None:
    """See `Checkpoint.release`."""
    mapped.release(self._mapping, self.places[name].offset, self.places[name].nbytes)

  def close(self) -> None:
    """See `Checkpoint.close`."""
    with suppress(BufferError):  # It has views, and goes with the last of them.
      self._mapping.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
