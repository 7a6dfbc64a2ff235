"""One .safetensors file, mapped: its tensors' bytes without a copy.

Layout: u64 length of the header | JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes,
to which the offsets point. The safetensors library judges the header (every byte covered once,
sizes that fit); the mapping is ours, so that the pages of a tensor can be given back.
"""

import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from q4jax.errors import FormatError
from q4jax.formats.checkpoint import Bytes
from q4jax.formats.json_file import parse_object

_MAX_HEADER_BYTES = 64 << 20  # The library's own limit is 100 MB; 10^5 tensors need 10.


@dataclass(frozen=True)
class StoredTensor:
  """Where a tensor lies. `dtype` is the format's name for it: "BF16", "F32", "I64"."""

  dtype: str
  shape: tuple[int, ...]
  offset: int
  nbytes: int


class SafetensorsFile:
  """An open file. `tensors` are by the file's own names."""

  def __init__(self, path: Path):
    """Opens the file.

    Raises:
      FormatError: it cannot be read, or breaks the format.
    """
    self.path = path
    _judge(path)
    with path.open("rb") as file:
      self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(self._map[:8], "little")
    header = parse_object(self._map[8 : 8 + length], path, "the header")
    header.pop("__metadata__", None)
    self.tensors = {name: _stored(entry, 8 + length) for name, entry in header.items()}

  def read(self, tensor: StoredTensor, start: int, stop: int) -> Bytes:
    """Bytes start..stop-1 of a tensor: uint8[stop - start], a read-only view of the file."""
    return np.frombuffer(self._map, np.uint8, stop - start, tensor.offset + start)

  def release(self, tensor: StoredTensor) -> None:
    """Gives the tensor's pages back; touched again, they are read again."""
    start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
    if tensor.nbytes:
      self._map.madvise(mmap.MADV_DONTNEED, start, tensor.offset + tensor.nbytes - start)

  def close(self) -> None:
    """Closes the file; the mapping lives on while views of it do."""
    with suppress(BufferError):
      self._map.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _judge(path: Path) -> None:
  """Raises FormatError where the file is none."""
  import safetensors  # Only who reads such files waits for it.

  try:
    size = os.stat(path).st_size
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
      raise FormatError(
        f"{path}: the header is to have {length} bytes, in a file of {size}; expected at most "
        f"{_MAX_HEADER_BYTES} and the file's size. It is truncated or no .safetensors file (a Git "
        "LFS pointer?): download it again."
      )
    with safetensors.safe_open(path, "numpy"):
      pass
  except OSError as error:
    raise FormatError(f"{path}: the file cannot be opened: {error.strerror or error}.") from None
  except safetensors.SafetensorError as error:
    raise FormatError(
      f"{path}: this is not a valid .safetensors file: {error}. Download it again."
    ) from None


def _stored(entry: dict, data: int) -> StoredTensor:
  start, stop = entry["data_offsets"]
  return StoredTensor(entry["dtype"], tuple(entry["shape"]), data + start, stop - start)
