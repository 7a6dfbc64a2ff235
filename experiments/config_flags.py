"""Absl flags from a script's frozen `Config`: each option, its default and its help said once."""

import dataclasses
from typing import Any, TypeVar

from absl import flags

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
      kinds: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
      kinds.get(type(default), flags.DEFINE_string)(field.name, default, help)


def read(config: type[T]) -> T:
  """The Config that the flags say."""
  values: dict[str, Any] = {}
  for field in dataclasses.fields(config):  # type: ignore[arg-type]
    value: Any = flags.FLAGS[field.name].value
    if isinstance(field.default, tuple):
      value = tuple(type(field.default[0])(word) for word in value)
    values[field.name] = value
  return config(**values)
