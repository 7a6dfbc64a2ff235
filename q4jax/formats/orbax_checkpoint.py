"""A folder of orbax checkpoints as a model: for training code, which knows orbax.

  q4jax.json     the GGUF metadata, and each tensor's shape, format and part
  00000/ ...     parts, each an orbax PyTree {GGUF name: array} of about PART_BYTES

Float tensors are arrays of their type and shape, others their rows, uint8[N, row_bytes]. The rows
of Q and K are in memory's order (half-split RoPE). Parts are there because orbax copies all that it
saves: the memory needed is one part's, not the model's.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from q4jax import config as config_lib
from q4jax.config import LlamaConfig
from q4jax.errors import FormatError, MissingDependencyError
from q4jax.formats.checkpoint import FLOAT_FORMATS, Bytes, Tensor
from q4jax.formats.gguf_types import SCALARS
from q4jax.formats.json_file import read_object
from q4jax.formats.whole_sink import WholeSink
from q4jax_kernels.block_array import block_shape

ABOUT = "q4jax.json"
PART_BYTES = 64 << 20
_VERSION = 1
_DTYPES: dict[str, np.dtype] = {
  "f32": np.dtype(np.float32),
  "f16": np.dtype(np.float16),
  "bf16": jnp.dtype("bfloat16"),
}


class OrbaxSink(WholeSink):
  """See `Sink`: writes the folder described above.

  Peak memory: a few times PART_BYTES, or as many times a tensor that is larger.
  """

  def __init__(
    self,
    path: str | Path,
    config: LlamaConfig,
    metadata: Mapping[str, Any],
    tensors: Sequence[Tensor],
  ):
    super().__init__(path, tensors)
    del config  # The metadata says it all.
    _orbax()  # Before anything is written.
    self._metadata = metadata
    self._pending: dict[str, np.ndarray] = {}
    self._parts: dict[str, str] = {}

  def _begin(self, temporary: Path, closing: ExitStack) -> None:
    temporary.mkdir()
    self._folder = temporary.absolute()  # As orbax wants it.

  def _put(self, tensor: Tensor, rows: Bytes) -> None:
    if sum(array.nbytes for array in self._pending.values()) + tensor.nbytes > PART_BYTES:
      self._save_part()
    array: np.ndarray = np.array(rows)  # A copy: the caller may release what it read.
    if tensor.format in FLOAT_FORMATS:
      array = array.view(_DTYPES[tensor.format]).reshape(tensor.shape)
    self._pending[tensor.name] = array

  def _save_part(self) -> None:
    if not self._pending:
      return
    part = f"{len(set(self._parts.values())):05}"
    ocp = _orbax()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      checkpointer.save(self._folder / part, args=ocp.args.PyTreeSave(self._pending))
    self._parts |= dict.fromkeys(self._pending, part)
    self._pending = {}

  def _finish(self) -> None:
    self._save_part()
    about = {
      "version": _VERSION,
      "tensors": [
        {"name": t.name, "shape": t.shape, "format": t.format, "part": self._parts[t.name]}
        for t in self.tensors
      ],
      "metadata": {key: _to_json(value) for key, value in self._metadata.items()},
    }
    (self._folder / ABOUT).write_text(json.dumps(about))


class OrbaxCheckpoint:
  """See `Checkpoint`: reads what `OrbaxSink` writes, a tensor at a time; the last one is kept."""

  def __init__(self, path: Path, document: Mapping[str, Any]):
    self.path, self._folder = str(path), path.absolute()
    self.metadata: Mapping[str, Any] = {
      key: _from_json(value) for key, value in document["metadata"].items()
    }
    entries = {entry["name"]: entry for entry in document["tensors"]}
    self.tensors: Mapping[str, Tensor] = {
      name: _tensor(entry, path) for name, entry in entries.items()
    }
    self._parts = {name: _part(entry, path) for name, entry in entries.items()}
    self.config = config_lib.from_gguf(self.metadata, frozenset(entries), self.path)
    self._lock = threading.Lock()
    self._last: tuple[str, Bytes] | None = None

  @classmethod
  def open(cls, path: str | Path) -> Self:
    """Opens a folder.

    Raises:
      FormatError: q4jax.json cannot be read or is not as `OrbaxSink` writes it, or it is a model
        that q4jax does not run.
      MissingDependencyError: orbax is not installed.
    """
    path = Path(path)
    _orbax()
    document = read_object(path / ABOUT, "the description of the checkpoint")
    if document.get("version") != _VERSION:
      raise FormatError(
        f"{path / ABOUT}: version is {document.get('version')!r:.40}; q4jax reads {_VERSION}."
      )
    try:
      return cls(path, document)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise FormatError(
        f"{path / ABOUT}: this is not laid out as q4jax writes it: {type(error).__name__} {error}."
      ) from error

  def rows(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
    """See `Checkpoint.rows`."""
    with self._lock:
      if self._last is None or self._last[0] != name:
        self._last = None  # Before the next is there: one tensor at a time.
        self._last = name, self._restore(self.tensors[name])
      return self._last[1][start:stop]

  def release(self, name: str) -> None:
    """See `Checkpoint.release`. The last tensor stays: it is read in parts, and restored whole."""

  def close(self) -> None:
    """See `Checkpoint.close`."""
    self._last = None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _restore(self, tensor: Tensor) -> Bytes:
    ocp = _orbax()
    place = self._folder / self._parts[tensor.name]
    is_float = tensor.format in FLOAT_FORMATS
    shape = tensor.shape if is_float else (tensor.num_rows, tensor.row_bytes)
    dtype = _DTYPES.get(tensor.format, np.dtype(np.uint8))
    arguments = ocp.args.PyTreeRestore(
      item={tensor.name: jax.ShapeDtypeStruct(shape, dtype)},
      restore_args={tensor.name: ocp.RestoreArgs(restore_type=np.ndarray)},
      partial_restore=True,
    )
    try:
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        array = np.asarray(checkpointer.restore(place, args=arguments)[tensor.name])
    except Exception as error:  # orbax raises its own, tensorstore's, and the system's.
      reason = str(error).strip().split("\n")[0][:300]
      raise FormatError(
        f"{place}: tensor '{tensor.name}' cannot be restored: {reason}. The folder is incomplete "
        "or damaged."
      ) from error
    if array.shape != shape or array.dtype != dtype:
      raise FormatError(
        f"{place}: tensor '{tensor.name}' is {array.dtype}{list(array.shape)}; {ABOUT} says "
        f"{dtype}{list(shape)}."
      )
    rows = array.view(np.uint8).reshape(tensor.num_rows, tensor.row_bytes)
    rows.flags.writeable = False
    return rows


def _orbax() -> Any:
  try:
    import orbax.checkpoint as ocp
  except ImportError as error:
    raise MissingDependencyError(
      f"orbax checkpoints need the package orbax-checkpoint ({error}): pip install 'q4jax[train]'."
    ) from error
  return ocp


def _tensor(entry: Mapping[str, Any], path: Path) -> Tensor:
  shape, format = entry["shape"], entry["format"]
  if not isinstance(shape, list) or not shape or any(type(n) is not int or n < 1 for n in shape):
    raise FormatError(f"{path / ABOUT}: {entry['name']} has the shape {shape!r:.80}.")
  try:
    block_size, _ = block_shape(format)
  except (KeyError, TypeError):
    raise FormatError(
      f"{path / ABOUT}: {entry['name']} is of the unknown format {format!r:.80}."
    ) from None
  if shape[-1] % block_size:
    raise FormatError(
      f"{path / ABOUT}: {entry['name']} has rows of {shape[-1]}, not a multiple of {format}'s "
      f"block of {block_size}."
    )
  return Tensor(entry["name"], tuple(shape), format)


def _part(entry: Mapping[str, Any], path: Path) -> str:
  part = entry["part"]
  if not isinstance(part, str) or not part.isdecimal():
    raise FormatError(f"{path / ABOUT}: {entry['name']} is in part {part!r:.80}, which is none.")
  return part


def _to_json(value: Any) -> Any:
  """Metadata in JSON: arrays of numbers with the type of their elements."""
  if isinstance(value, np.ndarray):
    return {"dtype": value.dtype.str, "values": value.tolist()}
  return value


def _from_json(value: Any) -> Any:
  if not isinstance(value, dict):
    return value
  if np.dtype(value["dtype"]) not in SCALARS.values():
    raise ValueError(f"an array of {value['dtype']!r:.40}")
  return np.array(value["values"], value["dtype"])
