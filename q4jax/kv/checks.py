"""Checks of options, shared by the frozen dataclasses of this folder; all raise ConfigError."""

import math
from numbers import Integral, Real
from typing import Any

from q4jax.errors import ConfigError


def whole(owner: Any, name: str, at_least: int) -> None:
  """`owner.name` is a whole number, `at_least` or more."""
  value = getattr(owner, name)
  good = _is_whole(value) and value >= at_least
  _require(good, owner, name, f"a whole number, {at_least} or more")


def odd(owner: Any, name: str) -> None:
  """`owner.name` is an odd whole number, 1 or more."""
  value = getattr(owner, name)
  good = _is_whole(value) and value > 0 and value % 2 == 1
  _require(good, owner, name, "an odd whole number, 1 or more")


def finite(owner: Any, name: str, at_least: float = -math.inf) -> None:
  """`owner.name` is a finite number, `at_least` or more."""
  bound = "" if at_least == -math.inf else f", {at_least} or more"
  value = getattr(owner, name)
  good = _is_number(value) and math.isfinite(value) and value >= at_least
  _require(good, owner, name, f"a finite number{bound}")


def share(owner: Any, name: str, one: bool) -> None:
  """`owner.name` is above 0 and below 1; 1 itself only where `one`."""
  value = getattr(owner, name)
  good = _is_number(value) and value > 0 and (value <= 1 if one else value < 1)
  _require(good, owner, name, f"above 0 and {'at most' if one else 'below'} 1")


def one_of(owner: Any, name: str, values: tuple[Any, ...]) -> None:
  """`owner.name` is one of `values`."""
  _require(getattr(owner, name) in values, owner, name, "one of " + ", ".join(map(repr, values)))


def flag(owner: Any, name: str) -> None:
  """`owner.name` is True or False."""
  _require(isinstance(getattr(owner, name), bool), owner, name, "True or False")


def _is_whole(value: Any) -> bool:
  return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  return isinstance(value, Real) and not isinstance(value, bool)


def _require(good: bool, owner: Any, name: str, expected: str) -> None:
  if not good:
    found = getattr(owner, name)
    raise ConfigError(f"{type(owner).__name__}: {name} is {found!r}; expected {expected}.")
