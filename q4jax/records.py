"""What calibration says about a tensor: quantiser parameters and the statistics behind them.

A `Record` is for a weight, the input of a matrix, or a layer's keys or values; it maps real
numbers x to integer codes and back by

  code = clip(round(x / scale) + zero_point, low, high)      x' = scale * (code - zero_point)

with low, high the range of `dtype`. A record with a `minimum` (k-quants, asymmetric float16 groups,
which no integer zero point expresses) has x' = scale * code - minimum instead. The JSON form is
fixed by records.schema.json; docs/formats/calibration.md explains both.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from q4jax.errors import FormatError

TARGETS = ("weight", "input", "key", "value")
# The range of codes of each dtype; 0 and 15 have the same width as -8 and 7, another zero point.
RANGES = {
  **{f"int{b}": (-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in range(2, 9)},
  **{f"uint{b}": (0, 2**b - 1) for b in range(2, 9)},
}
VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
  """Quantiser parameters of one tensor.

  Attributes:
    layer_name: the tensor's GGUF name; of the matrix whose input it is; or "blk.3" for KV.
    target: "weight", "input", "key" or "value".
    dtype: "int2".."int8" or "uint2".."uint8": the range of codes.
    axis: along which `group_size` neighbours share parameters, counted from the end (-1); None
      where one scale serves the whole tensor.
    group_size: neighbours along `axis`; 0 where axis is None.
    method: that found the parameters, e.g. "minmax", "mse", "gptq".
    scale: float32, of any shape: [N, G] for a weight, [1] for a tensor.
    zero_point: int32, as scale.
    minimum: float32 as scale, or None; then it stands in place of zero_point, which is all zeros.
    statistics: numbers or lists of numbers by name (see `docs/formats/calibration.md`).
  """

  layer_name: str
  target: str
  dtype: str
  axis: int | None
  group_size: int
  method: str
  scale: NDArray[np.float32]
  zero_point: NDArray[np.int32]
  minimum: NDArray[np.float32] | None = None
  statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def key(self) -> tuple[str, str]:
    """(layer_name, target): what it is about."""
    return self.layer_name, self.target

  def to_json(self) -> dict[str, Any]:
    """A dict of JSON's types; floats as their shortest decimal that reads back to the same bits."""
    out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    out |= {"shape": list(self.scale.shape), "statistics": dict(self.statistics)}
    out["scale"] = [float(str(s)) for s in self.scale.reshape(-1)]
    out["zero_point"] = self.zero_point.reshape(-1).tolist()
    if self.minimum is None:
      del out["minimum"]
    else:
      out["minimum"] = [float(str(m)) for m in self.minimum.reshape(-1)]
    return out

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> Self:
    """What `to_json` made, of a value that `validate` has passed."""
    shape = value["shape"]
    minimum = value.get("minimum")
    return cls(
      layer_name=value["layer_name"],
      target=value["target"],
      dtype=value["dtype"],
      axis=value["axis"],
      group_size=value["group_size"],
      method=value["method"],
      scale=np.asarray(value["scale"], np.float32).reshape(shape),
      zero_point=np.asarray(value["zero_point"], np.int32).reshape(shape),
      minimum=None if minimum is None else np.asarray(minimum, np.float32).reshape(shape),
      statistics=value["statistics"],
    )


def dumps(records: list[Record], about: Mapping[str, Any]) -> str:
  """A calibration document. `about`: what was calibrated, on which data, by which version."""
  layers = [record.to_json() for record in records]
  document = {"format": "q4jax-calibration", "version": VERSION, "about": dict(about)}
  return json.dumps(document | {"layers": layers}, allow_nan=False) + "\n"


def loads(text: str | bytes, path: str) -> tuple[list[Record], dict[str, Any]]:
  """The records of a document, and its `about`.

  Raises:
    FormatError: no JSON, against the schema, or with parameters that cannot be; it names `path`,
      the place within, and what was expected.
  """
  try:
    document = json.loads(text, parse_constant=_refuse_constant)
  except (ValueError, RecursionError) as error:  # Bad UTF-8 is a ValueError too.
    raise FormatError(f"{path}: this is not JSON: {error}. Calibrate again.") from None
  return parse(document, path), document["about"]


def parse(document: Any, path: str) -> list[Record]:
  """The records of a document of JSON's types; raises as `loads` does."""
  validate(document, path)
  records = []
  seen: set[tuple[str, str]] = set()
  for at, layer in enumerate(document["layers"]):
    place = f"{path}: layers[{at}] ({layer['layer_name']}, {layer['target']})"
    record = _checked(layer, place)
    if record.key in seen:
      raise FormatError(f"{place}: there is a second record of the same; keep one.")
    seen.add(record.key)
    records.append(record)
  return records


def validate(document: Any, path: str) -> None:
  """Raises FormatError where a parsed document does not follow the schema."""
  errors = sorted(_validator().iter_errors(document), key=lambda e: list(map(str, e.absolute_path)))
  if errors:
    first = errors[0]
    place = first.json_path.removeprefix("$").lstrip(".") or "the document"
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    raise FormatError(
      f"{path}: {place}: {first.message:.300}{more}. The schema is q4jax/records.schema.json, "
      "described in docs/formats/calibration.md."
    )


@functools.cache
def _validator() -> Any:
  import jsonschema  # Only who reads calibrations waits for it.

  schema = json.loads((resources.files("q4jax") / "records.schema.json").read_text())
  return jsonschema.Draft202012Validator(schema)


def _refuse_constant(name: str) -> None:
  raise ValueError(f"{name} is no number that a calibration may hold")


def _checked(layer: Mapping[str, Any], place: str) -> Record:
  """What a schema cannot say."""
  size = int(np.prod(layer["shape"], dtype=np.float64))
  for name in ("scale", "zero_point", "minimum"):
    if name in layer and len(layer[name]) != size:
      raise FormatError(
        f"{place}: {name} has {len(layer[name])} values where shape {layer['shape']} says {size}."
      )
  if (layer["axis"] is None) != (layer["group_size"] == 0):
    raise FormatError(
      f"{place}: axis is {layer['axis']} with group_size {layer['group_size']}; a tensor with one "
      "scale has axis null and group_size 0, any other has both."
    )
  with np.errstate(over="ignore"):
    record = Record.from_json(layer)
  for name, values in (("scale", record.scale), ("minimum", record.minimum)):
    if values is not None and not np.isfinite(values).all():
      raise FormatError(f"{place}: {name} has a value beyond float32; its largest is 3.4e38.")
  low, high = RANGES[record.dtype]
  outside = (record.zero_point < low) | (record.zero_point > high)
  if outside.any():
    raise FormatError(
      f"{place}: zero_point {record.zero_point[outside].flat[0]} is outside {record.dtype}'s codes "
      f"({low}..{high}): it would not represent 0."
    )
  return record
