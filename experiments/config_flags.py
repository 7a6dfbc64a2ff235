"""Absl flags from a script's frozen `Config`: each option, its default and its help said once."""

import dataclasses
from typing import Any, TypeVar

from absl import app, flags

T = TypeVar("T")


def option(default: Any, help: str) -> Any:
  """A field of a Config. A tuple becomes a flag that takes a list with commas."""
  return dataclasses.field(default=default, metadata={"help": help})


def define(config: type) -> None:
  """Defines a flag for each field. To be called where the script is run, not where it is imported:
  flags of two scripts may share a name.
  """
  for field in dataclasses.fields(config):
    default, help = field.default, field.metadata["help"]
    if isinstance(default, tuple):
      flags.DEFINE_list(field.name, [str(value) for value in default], help)
    else:
      kinds: dict[type, Any] = {
        bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float,
      }  # fmt: skip
      kinds.get(type(default), flags.DEFINE_string)(field.name, default, help)


def read(config: type[T]) -> T:
  """The Config that the flags say; UsageError where a list holds what is no number."""
  values: dict[str, Any] = {}
  for field in dataclasses.fields(config):  # type: ignore[arg-type]
    value: Any = flags.FLAGS[field.name].value
    if isinstance(field.default, tuple):
      kind = type(field.default[0])
      try:
        value = tuple(kind(word) for word in value)
      except ValueError:
        text = ",".join(value)
        raise app.UsageError(f"--{field.name}={text}: not all of it is {kind.__name__}.") from None
    values[field.name] = value
  return config(**values)
