"""Opens GGUF files, whole or split, and hands out their tensors' bytes without copying.

A file is mapped, not read: a tensor's pages come from the disk as they are touched and can be given
back with `release`. What a valid file is, `gguf_header` decides; this module joins shards.

A split model is `NAME-00001-of-0000N.gguf` to `NAME-0000N-of-0000N.gguf`; each file says `split.no`
(from 0), `split.count` and `split.tensors.count` (of all files). Any shard opens all of them. The
metadata is the first shard's, which has all of it; another may repeat or add a key, not change one.
"""

import mmap
import re
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from q4jax.errors import FormatError
from q4jax.formats.gguf_header import DAMAGED, FIXED_BYTES, Header, parse_header
from q4jax.formats.gguf_types import TensorInfo
from q4jax.formats.mapped import map_file, release

_SHARD_NAME = re.compile(r"(?P<prefix>.+)-(?P<no>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
# Keys that a shard says of itself.
_OWN_KEYS = frozenset({"split.no", "general.alignment"})


class GGUFFile:
  """An open GGUF model; a context manager.

  The files must stay as they are while open: the kernel kills a process (SIGBUS) that touches a
  mapped page of a file which has been truncated since. Sizes are checked once, when opening.

  Attributes:
    metadata: numbers, bools and strings as Python's; arrays of numbers as NumPy arrays, arrays of
      strings as lists.
    value_types: the number of each value's type in the file; see `gguf_types`.
    tensors: by name, in the order of the files.
    version: of the format, 2 or 3.
  """

  def __init__(self, shards: "Sequence[_Shard]"):
    self.metadata: dict[str, Any] = _join_metadata(shards)
    self.value_types = {k: t for s in reversed(shards) for k, t in s.header.value_types.items()}
    self.tensors: dict[str, TensorInfo] = _join_tensors(shards)
    self.version = shards[0].header.version
    self._maps = {shard.path: shard.mapping for shard in shards}

  @classmethod
  def open(cls, path: str | Path) -> Self:
    """Opens a file and, if it is a shard, all others of its model.

    Raises:
      FormatError: a file that cannot be read, breaks the format, or does not fit its shards.
    """
    path = Path(path)
    with ExitStack() as undo:
      opened = _Shard.open(path, undo)
      paths = _shard_paths(opened)
      shards = [opened if p == path else _Shard.open(p, undo) for p in paths]
      file = cls(shards)
      undo.pop_all()
    return file

  def read_rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
    """Rows start..stop-1 of a tensor, as they lie in the file.

    Returns:
      uint8[stop - start, info.row_bytes], a read-only view of the mapped file. It stays valid after
      `close`, and keeps the file mapped until it is gone.
    """
    if not 0 <= start <= stop <= info.num_rows:
      raise ValueError(f"rows {start}..{stop} are not within the {info.num_rows} of {info.name}.")
    first = info.offset + start * info.row_bytes
    rows = np.frombuffer(self._map(info), np.uint8, (stop - start) * info.row_bytes, first)
    return rows.reshape(stop - start, info.row_bytes)

  def release(self, info: TensorInfo) -> None:
    """Gives the tensor's pages back, so that they do not count as resident memory.

    Views stay valid: a page touched again, here or in a neighbour that shares it, is read again.
    """
    release(self._map(info), info.offset, info.nbytes)

  def close(self) -> None:
    """Closes the files; a mapping lives on while views of it do."""
    for mapping in self._maps.values():
      with suppress(BufferError):  # It has views, and goes with the last of them.
        mapping.close()
    self._maps = {}

  def _map(self, info: TensorInfo) -> mmap.mmap:
    if info.path not in self._maps:
      raise ValueError(f"{info.name} is in {info.path}, which this GGUFFile has closed or not had.")
    return self._maps[info.path]

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.close()


@dataclass(frozen=True)
class _Shard:
  path: Path
  mapping: mmap.mmap
  header: Header

  @classmethod
  def open(cls, path: Path, undo: ExitStack) -> Self:
    mapping = undo.enter_context(map_file(path, FIXED_BYTES))
    return cls(path, mapping, parse_header(mapping, path))

  def number(self, key: str) -> int:
    """The value of a `split.` key; 0 without it."""
    value = self.header.metadata.get(key, 0)
    if type(value) is not int or value < 0:
      found = value if type(value) is int else f"of type {type(value).__name__}"
      raise FormatError(f"{self.path}: {key} is {found}; expected an integer >= 0. {DAMAGED}")
    return value


def _shard_paths(shard: _Shard) -> list[Path]:
  """The paths of all files of a shard's model; only its own when it is not split."""
  path = shard.path
  name = _SHARD_NAME.fullmatch(path.name)
  named = int(name["count"]) if name else 1
  count = max(1, shard.number("split.count"))  # 0, which a merge leaves, also means not split.
  if count == 1 and named <= 1:
    return [path]
  if name is None or named != count:
    raise FormatError(
      f"{path}: split.count says {count} file(s), and the file's name {named}. Shards are found by "
      "name: call them NAME-00001-of-0000N.gguf and so on, as they were published."
    )
  if not 1 <= int(name["no"]) <= count:
    raise FormatError(f"{path}: the name says file {int(name['no'])} of {count}; they start at 1.")
  paths = []
  for i in range(1, count + 1):
    paths.append(path.with_name(f"{name['prefix']}-{i:05}-of-{count:05}.gguf"))
    if not paths[-1].exists():
      raise FormatError(
        f"{paths[-1]}: this file is missing, and {path.name} is one of {count} that make the "
        "model. Put them all into one folder."
      )
  return paths


def _join_metadata(shards: "Sequence[_Shard]") -> dict[str, Any]:
  """The metadata of all shards as one, their `split.` keys checked."""
  metadata: dict[str, Any] = {}
  for i, shard in enumerate(shards):
    if shard.number("split.no") != i:
      raise FormatError(
        f"{shard.path}: split.no is {shard.number('split.no')} in file {i + 1} of {len(shards)}; "
        f"expected {i}. The file was renamed or copied over another: download it again."
      )
    for key, value in shard.header.metadata.items():
      if key not in metadata:
        metadata[key] = value
      elif key not in _OWN_KEYS and not _equal(metadata[key], value):
        raise FormatError(
          f"{shard.path}: {key[:80]!r} differs from the one in {shards[0].path.name}: the files "
          "are of different models. Download them again."
        )
  return metadata


def _join_tensors(shards: "Sequence[_Shard]") -> dict[str, TensorInfo]:
  tensors: dict[str, TensorInfo] = {}
  for shard in shards:
    for name, info in shard.header.tensors.items():
      if name in tensors:
        raise FormatError(
          f"{info.path}: tensor {name!r} is also in {tensors[name].path.name}. The files do not "
          "belong together: download them again."
        )
      tensors[name] = info
  total = shards[0].number("split.tensors.count")
  if (len(shards) > 1 or total) and total != len(tensors):
    raise FormatError(
      f"{shards[0].path}: split.tensors.count is {total}, and the {len(shards)} file(s) hold "
      f"{len(tensors)} tensors. Download them again, all from one place."
    )
  return tensors


def _equal(a: Any, b: Any) -> bool:
  if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
    return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.array_equal(a, b)
  return type(a) is type(b) and a == b
