"""Writes a model as one GGUF file, which llama.cpp loads.

The header is gguf-py's to write; the tensors follow in their order, whatever order they come in.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from q4jax.config import LlamaConfig
from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import Bytes, Tensor
from q4jax.formats.gguf_header import ALIGNMENTS, DEFAULT_ALIGNMENT
from q4jax.formats.gguf_types import SCALARS, TENSOR_TYPES, holds
from q4jax.formats.group_blocks import as_ggml_blocks, ggml_format
from q4jax.formats.rope_rows import memory_rows
from q4jax.formats.whole_sink import WholeSink
from q4jax_kernels.block_array import block_shape
from q4jax_kernels.q4_formats import Q4_FORMATS

if TYPE_CHECKING:
  from gguf import GGUFValueType

_TYPE_NUMBERS = {type.name: number for number, type in TENSOR_TYPES.items()}
_ARRAY_TYPES = {dtype: number for number, dtype in SCALARS.items()}


class GGUFSink(WholeSink):
  """See `Sink`. Peak memory: the header, and Q or K of one layer.

  Args:
    config: says which rows an architecture's files keep in another order.
    metadata: the file's keys and values, in their order. Keys of a split (`split.*`) are left out,
      for the file is whole, and so are empty arrays, which gguf-py does not write.
    tensors: all that will be written. Group-wise formats (`q4s64_f16`) become q4_0 and q4_1 where
      these hold the very same weights; see `ggml_format`.
    types: the GGUF type of a key's value by its number, where the source had one
      (`GGUFCheckpoint.value_types`); other numbers become UINT32 or FLOAT32, as llama.cpp expects,
      if they
      fit; those of the architecture are rounded to FLOAT32.
    file_type: what `general.file_type` is to say, e.g. "q4_k_m"; None keeps that of `metadata`.
  """

  def __init__(
    self,
    path: str | Path,
    config: LlamaConfig,
    metadata: Mapping[str, Any],
    tensors: Sequence[Tensor],
    types: Mapping[str, int] | None = None,
    file_type: str | None = None,
  ):
    super().__init__(path, tensors)
    self._config = config
    self._stored = {
      t.name: Tensor(t.name, t.shape, ggml_format(t.format, f"{path}: {t.name}")) for t in tensors
    }
    self._types = types or {}
    self._metadata = {k: v for k, v in metadata.items() if not k.startswith("split.")}
    own = f"{config.architecture}."
    for key, value in self._metadata.items():
      if key.startswith(own) and isinstance(value, float) and key not in self._types:
        self._metadata[key] = float(np.float32(value))  # llama.cpp refuses these as FLOAT64.
    if file_type is not None:
      self._metadata["general.file_type"] = _file_type(file_type)
    quantised = any(block_shape(tensor.format)[0] > 1 for tensor in self._stored.values())
    if quantised and (file_type is not None or any(t.format in Q4_FORMATS for t in tensors)):
      self._metadata["general.quantization_version"] = 2  # ggml.h: GGML_QNT_VERSION
    self._alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if self._alignment not in ALIGNMENTS:
      raise ConfigError(
        f"{path}: general.alignment is {self._alignment!r}; expected a power of two from "
        f"{ALIGNMENTS[0]} to {ALIGNMENTS[-1]}."
      )

  def _begin(self, temporary: Path, closing: ExitStack) -> None:
    import gguf  # Only who writes GGUF waits for it.

    writer = gguf.GGUFWriter(temporary, self._config.architecture)
    closing.callback(writer.close)
    writer.data_alignment = self._alignment
    writer.kv_data[0].clear()  # The architecture has its place in `metadata`.
    for key, value in self._metadata.items():
      kind, element, value = _typed(key, value, self._types.get(key))
      if value != []:
        writer.add_key_value(key, value, kind, element)
    for tensor in self._stored.values():
      number = gguf.GGMLQuantizationType(_TYPE_NUMBERS[tensor.format])
      writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    self._offsets = {}
    at = temporary.stat().st_size
    for tensor in self._stored.values():
      self._offsets[tensor.name] = at = -(-at // self._alignment) * self._alignment
      at += tensor.nbytes
    self._file = closing.enter_context(temporary.open("r+b"))
    self._file.truncate(-(-at // self._alignment) * self._alignment)

  def _put(self, tensor: Tensor, rows: Bytes) -> None:
    if self._stored[tensor.name].format != tensor.format:
      rows = as_ggml_blocks(rows, tensor.format)
    order = memory_rows(self._config, tensor.name)
    if order is not None and len(tensor.shape) == 1:  # A bias is one row, each value a head's.
      width = block_shape(tensor.format)[1]
      rows = rows.reshape(-1, width)[order]
    elif order is not None:
      rows = rows[order]
    self._file.seek(self._offsets[tensor.name])
    self._file.write(np.ascontiguousarray(rows).data)


def _file_type(name: str) -> int:
  """The number of `general.file_type` (llama.h: enum llama_ftype)."""
  from gguf import LlamaFileType

  prefix = "ALL" if name == "f32" else "MOSTLY"
  try:
    return int(LlamaFileType[f"{prefix}_{name.upper()}"])
  except KeyError:
    known = ", ".join(t.name.partition("_")[2].lower() for t in LlamaFileType)
    raise ConfigError(f"file_type is '{name}'; expected one of {known}.") from None


def _typed(
  key: str, value: Any, known: int | None
) -> "tuple[GGUFValueType, GGUFValueType | None, Any]":
  """The GGUF type of a value, that of an array's elements, and the value as gguf-py takes it.

  A type that the source had holds where the value still fits it.
  """
  from gguf import GGUFValueType as T

  if isinstance(value, np.ndarray):
    return T.ARRAY, T(_ARRAY_TYPES[value.dtype.newbyteorder("<")]), value.tolist()
  if isinstance(value, list | tuple):
    return T.ARRAY, _element_type(key, value), list(value)
  if isinstance(value, bool):
    return T.BOOL, None, value
  if isinstance(value, str):
    return T.STRING, None, value
  if known in SCALARS and holds(SCALARS[known], value):
    return T(known), None, value
  return _number_type(key, [value], (T.UINT32, T.INT32, T.UINT64, T.INT64)), None, value


def _element_type(key: str, values: Sequence[Any]) -> "GGUFValueType":
  from gguf import GGUFValueType as T

  if all(isinstance(value, str) for value in values):
    return T.STRING
  if all(isinstance(value, bool) for value in values):
    return T.BOOL
  integers = (T.INT32, T.UINT32, T.INT64, T.UINT64)  # As gguf-py writes arrays of Python's int.
  return _number_type(key, values, integers)


def _number_type(
  key: str, values: Sequence[Any], integers: "Sequence[GGUFValueType]"
) -> "GGUFValueType":
  """The first type that holds every value exactly."""
  from gguf import GGUFValueType as T

  if all(isinstance(value, int) for value in values):
    candidates: Sequence[T] = integers
  elif all(isinstance(value, int | float) for value in values):
    candidates = (T.FLOAT32, T.FLOAT64)
  else:
    candidates = ()
  for kind in candidates:
    if all(holds(SCALARS[kind], value) for value in values):
      return kind
  raise ConfigError(f"{key} is {values!r:.80}, which no type of GGUF holds.")
