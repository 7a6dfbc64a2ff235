"""A GGUF model as a `Checkpoint`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from q4jax import config as config_lib
from q4jax.formats.checkpoint import Bytes, Tensor
from q4jax.formats.gguf import GGUFFile
from q4jax.formats.rope_rows import file_rows
from q4jax_kernels.block_array import block_shape


class GGUFCheckpoint:
  """See `Checkpoint`. The files are mapped: a tensor's pages are read as its rows are.

  Attributes:
    value_types: the GGUF type of each value of `metadata`, for who writes it again (`GGUFSink`).
  """

  def __init__(self, file: GGUFFile, path: str):
    self.path, self._file = path, file
    self.metadata: Mapping[str, Any] = file.metadata
    self.value_types: Mapping[str, int] = file.value_types
    self.config = config_lib.from_gguf(file.metadata, frozenset(file.tensors), path)
    self.tensors: Mapping[str, Tensor] = {
      info.name: Tensor(info.name, info.shape, info.format) for info in file.tensors.values()
    }

  @classmethod
  def open(cls, path: str | Path) -> Self:
    """Opens a file, or all shards of a model from any one of them.

    Raises:
      FormatError: a file that cannot be read, breaks the format, or holds no model we know.
    """
    file = GGUFFile.open(path)
    try:
      return cls(file, str(path))
    except BaseException:
      file.close()
      raise

  def rows(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
    """See `Checkpoint.rows`. A view of the file but for the Q and K of arch `llama`."""
    info = self._file.tensors[name]
    stop = info.num_rows if stop is None else stop
    order = file_rows(self.config, name)
    if order is None:
      return self._file.read_rows(info, start, stop)
    whole = self._file.read_rows(info, 0, info.num_rows)
    if len(info.shape) == 1:
      _, width = block_shape(info.format)
      return whole.reshape(-1, width)[order].reshape(1, -1)
    return whole[order[start:stop]]

  def release(self, name: str) -> None:
    """See `Checkpoint.release`."""
    self._file.release(self._file.tensors[name])

  def close(self) -> None:
    """See `Checkpoint.close`."""
    self._file.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
