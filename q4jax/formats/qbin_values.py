"""GGUF's keys and values, and calibration's records, as messages of qbin.proto and back."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from q4jax import records as records_lib
from q4jax.errors import ConfigError, FormatError
from q4jax.formats import qbin_pb2 as pb
from q4jax.formats.gguf_header import MAX_KEY_BYTES, MAX_KEYS, MAX_STRINGS
from q4jax.formats.gguf_types import BOOL, SCALARS, STRING, holds
from q4jax.formats.qbin_header import DAMAGED
from q4jax.records import Record

# The field of Value that holds each of GGUF's types.
_FIELDS = {
  0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "boolean", 8: "text",
  10: "u64", 11: "i64", 12: "f64",
}  # fmt: skip
_TYPES = {field: number for number, field in _FIELDS.items()}
_NUMBERS = {dtype.str: number for number, dtype in SCALARS.items()}


def pack_metadata(
  metadata: Mapping[str, Any], types: Mapping[str, int] | None = None
) -> list[pb.Entry]:
  """Messages of keys and values as a `Checkpoint` has them.

  A number gets the type of GGUF that `types` gives its key, if it fits. Else an integer gets the
  first of u32, i32, u64 and i64 that holds it, a float f32 if that is exact and else f64. Arrays
  and NumPy scalars keep their type.

  Raises:
    ConfigError: a value of a type that GGUF does not have; it names the key.
  """
  entries = []
  for key, value in metadata.items():
    try:
      kind = (types or {}).get(key)
      if kind in SCALARS and holds(SCALARS[kind], value):
        entries.append(pb.Entry(key=key, value=_number(_FIELDS[kind], value)))
      else:
        entries.append(pb.Entry(key=key, value=_pack(value)))
    except (TypeError, ValueError) as error:
      raise ConfigError(f"the metadata's {key!r} cannot be written: {error}.") from None
  return entries


def _pack(value: Any) -> pb.Value:
  if isinstance(value, str):
    return pb.Value(text=value)
  if isinstance(value, list) and all(isinstance(item, str) for item in value):
    return pb.Value(array=pb.Array(type=STRING, strings=value))
  if isinstance(value, list | np.ndarray):
    array = np.asarray(value)
    array = array.astype(array.dtype.newbyteorder("<"))
    if array.dtype.str not in _NUMBERS or array.ndim != 1:
      raise TypeError(f"arrays are lists of numbers or of strings, not {array.dtype.name}")
    number = _NUMBERS[array.dtype.str]
    return pb.Value(array=pb.Array(type=number, numbers=array.tobytes()))
  if isinstance(value, np.generic) and value.dtype.str in _NUMBERS:
    return _number(_FIELDS[_NUMBERS[value.dtype.str]], value.item())
  if isinstance(value, bool):
    return pb.Value(boolean=value)
  if isinstance(value, int):
    for field, low, high in (("u32", 0, 32), ("i32", -1, 31), ("u64", 0, 64), ("i64", -1, 63)):
      if low * 2**high <= value < 2**high:
        return _number(field, value)
    raise ValueError(f"{value} does not fit 64 bits")
  if isinstance(value, float):
    with np.errstate(over="ignore"):
      exact = float(np.float32(value)) == value or value != value
    return pb.Value(f32=value) if exact else pb.Value(f64=value)
  raise TypeError(f"GGUF has no type for a {type(value).__name__}")


def _number(field: str, value: Any) -> pb.Value:
  message = pb.Value()
  setattr(message, field, value)
  return message


def value_types(entries: Iterable[pb.Entry]) -> dict[str, int]:
  """The number of each single value's type, as `GGUFFile.value_types` has them."""
  fields = {entry.key: entry.value.WhichOneof("kind") for entry in entries}
  return {key: _TYPES[field] for key, field in fields.items() if field in _TYPES}


def unpack_metadata(entries: Iterable[pb.Entry], path: str) -> dict[str, Any]:
  """Keys and values as `GGUFFile.metadata` has them.

  Raises:
    FormatError: a key is empty, too long or there twice, or a value is not of its type.
  """
  metadata: dict[str, Any] = {}
  strings = 0
  for entry in entries:
    key = entry.key
    where = f"{path}: key {key[:80]!r}"
    if not 0 < len(key.encode()) <= MAX_KEY_BYTES or key in metadata or len(metadata) >= MAX_KEYS:
      raise FormatError(
        f"{where} is empty, longer than {MAX_KEY_BYTES} bytes, there twice, or one of more than "
        f"{MAX_KEYS}. {DAMAGED}"
      )
    strings += len(entry.value.array.strings)
    if strings > MAX_STRINGS:
      raise FormatError(f"{where}: there are more than {MAX_STRINGS} strings. {DAMAGED}")
    try:
      metadata[key] = _unpack(entry.value)
    except ValueError as error:
      raise FormatError(f"{where}: {error}. {DAMAGED}") from None
  return metadata


def _unpack(value: pb.Value) -> Any:
  field = value.WhichOneof("kind")
  if field is None:
    raise ValueError("it has no value, or one of a kind that this q4jax does not know")
  if field == "array":
    return _unpack_array(value.array)
  found = getattr(value, field)
  if field in ("u8", "i8", "u16", "i16"):  # Protobuf has no integers this short.
    limits = np.iinfo(SCALARS[_TYPES[field]])
    if not limits.min <= found <= limits.max:
      raise ValueError(f"{found} does not fit {field}")
  return found


def _unpack_array(array: pb.Array) -> Any:
  kind = array.type
  if kind == STRING and not array.numbers:
    return list(array.strings)
  if kind not in SCALARS or array.strings:
    raise ValueError(f"an array of type {kind} does not hold what it does")
  dtype = SCALARS[kind]
  if len(array.numbers) % dtype.itemsize:
    raise ValueError(f"{len(array.numbers)} bytes are no array of {dtype.name}")
  if kind == BOOL and array.numbers.strip(b"\0\1"):
    raise ValueError("a bool is neither 0 nor 1")
  return np.frombuffer(array.numbers, dtype)


def pack_record(record: Record) -> pb.Record:
  """The message of a record."""
  message = pb.Record(
    layer_name=record.layer_name,
    target=record.target,
    dtype=record.dtype.upper(),
    axis=record.axis,
    group_size=record.group_size,
    method=record.method,
    shape=record.scale.shape,
    scale=record.scale.reshape(-1),
    zero_point=record.zero_point.reshape(-1),
    minimum=None if record.minimum is None else record.minimum.reshape(-1),
  )
  for name, value in record.statistics.items():
    scalar = not isinstance(value, list | tuple | np.ndarray)
    message.statistics.add(name=name, values=[value] if scalar else value, scalar=scalar)
  return message


def unpack_records(messages: Iterable[pb.Record], path: str) -> list[Record]:
  """The records of a header, held to the same schema and rules as a calibration's JSON.

  Raises:
    FormatError: see `records.parse`; or a message that is of no known kind.
  """
  layers = [_layer(message, f"{path}: record {at}") for at, message in enumerate(messages)]
  document = {"format": "q4jax-calibration", "version": records_lib.VERSION, "about": {}}
  return records_lib.parse(document | {"layers": layers}, path)


def _layer(message: pb.Record, place: str) -> dict[str, Any]:
  """What a record's JSON would be."""
  place = f"{place} ({message.layer_name[:80]!r}, {message.target[:80]!r})"
  if message.dtype not in pb.QType.values() or message.dtype == pb.UNSPECIFIED:
    raise FormatError(f"{place}: dtype {message.dtype} is not known. Update q4jax. {DAMAGED}")
  plain, lists = ("layer_name", "target", "group_size", "method"), ("shape", "scale", "zero_point")
  layer = {name: getattr(message, name) for name in plain}
  layer |= {name: list(getattr(message, name)) for name in lists}
  if message.minimum:
    layer["minimum"] = list(message.minimum)
  statistics = {}
  for statistic in message.statistics:
    values = list(statistic.values)
    if (statistic.scalar and len(values) != 1) or not np.isfinite(values).all():
      raise FormatError(
        f"{place}: statistic {statistic.name[:80]!r} is not finite, or has {len(values)} values "
        f"where it says 1. {DAMAGED}"
      )
    statistics[statistic.name] = values[0] if statistic.scalar else values
  axis = message.axis if message.HasField("axis") else None
  dtype = pb.QType.Name(message.dtype).lower()
  return layer | {"dtype": dtype, "axis": axis, "statistics": statistics}
