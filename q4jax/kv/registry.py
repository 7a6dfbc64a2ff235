"""Names for interchangeable parts: found by name, refused with the nearest names that exist."""

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from q4jax.errors import ConfigError

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
  """Frozen dataclasses of one kind, by name.

  Args:
    kind: what messages call them.
    folder: a package; its modules are imported at the first look-up and register themselves.
  """

  def __init__(self, kind: str, folder: str | None = None) -> None:
    self.kind = kind
    self._folder = folder
    self._classes: dict[str, type] = {}

  def register(self, *names: str) -> Callable[[C], C]:
    """Decorates a class; further names are aliases. ConfigError if a name is another class's."""

    def add(cls: C) -> C:
      for name in names:
        # The same class defined again, as a notebook does, takes its own place.
        taken = self._classes.get(name)
        if taken and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
          raise ConfigError(
            f"The name {name!r} belongs to {taken.__module__}.{taken.__qualname__}; choose another "
            f"for the {self.kind} {cls.__qualname__}."
          )
        self._classes[name] = cls
      return cls

    return add

  def names(self) -> list[str]:
    """All names, aliases among them, sorted."""
    self._import_folder()
    return sorted(self._classes)

  def get(self, name: str, **options: Any) -> T:
    """Builds what `name` stands for. ConfigError names the nearest names or options there are."""
    self._import_folder()
    if name not in self._classes:
      raise ConfigError(f"Unknown {self.kind} {name!r}; {_nearest(name, self.names())}.")
    cls = self._classes[name]
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    for option in options:
      if option not in fields:
        known = _nearest(option, fields) if fields else "it has none"
        raise ConfigError(f"The {self.kind} {name!r} has no option {option!r}; {known}.")
    try:
      return cls(**options)
    except TypeError as error:  # an option without a default is missing
      raise ConfigError(f"The {self.kind} {name!r} cannot be built: {error}.") from error

  def _import_folder(self) -> None:
    if self._folder is None:
      return
    folder, self._folder = self._folder, None
    for module in pkgutil.iter_modules(importlib.import_module(folder).__path__):
      importlib.import_module(f"{folder}.{module.name}")


def _nearest(name: object, names: Iterable[str]) -> str:
  close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
  return f"nearest: {', '.join(close)}" if close else f"there are: {', '.join(names)}"
