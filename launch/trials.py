"""A sweep described: an experiment and values of its flags, and the trials that they make.

A description is a TOML file that says what is measured and nothing of where (no folders of results,
no workers, no hosts), so that any backend can run it:

  experiment = "quant_error"        # python -m experiments.quant_error
  retries = 1                       # times a failed trial is tried again
  timeout_s = 600                   # after which a trial has failed; 0 for no limit

  [flags]                           # of every trial; a list is one value of a flag with commas
  kquants = []

  [cross]                           # each value with each of the others
  bits = [3, 4]
  groups = [["32", "128"], "channel"]

  [[zip]]                           # first with first, second with second; such tables are crossed
  rules = ["absmax", "minimum"]
  methods = ["rtn", ["rtn", "hqq"]]

A trial is known by the hash of its experiment (and its VERSION, where it has one) and of all its
options, those left at their defaults too: the same trial in two sweeps has one hash, and a changed
default makes another trial. The hash does not see the code; the record of a trial names the commit
it was measured at.
"""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import itertools
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from q4jax.errors import ConfigError

_KEYS = ("experiment", "retries", "timeout_s", "flags", "cross", "zip")
# Says where the records go, which is the backend's to say.
_OUT = "out"


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of an experiment.

  Attributes:
    experiment: a module of `experiments`.
    flags: those that the description gives, as text.
    hash: see the module.
  """

  experiment: str
  flags: Mapping[str, str]
  hash: str

  def command(self, out: str | Path, python: str = "python") -> list[str]:
    """What runs it, from the root of the repository; its record is to appear in `out`."""
    words = [f"--{name}={value}" for name, value in {**self.flags, _OUT: out}.items()]
    return [python, "-m", f"experiments.{self.experiment}", *words]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What a description says.

  Attributes:
    swept: the flags that differ between trials.
  """

  name: str
  trials: tuple[Trial, ...]
  swept: tuple[str, ...]
  retries: int
  timeout_s: float


def load(path: str | Path) -> Sweep:
  """Reads a description and makes its trials, each checked against its experiment's options.

  Raises:
    ConfigError: no such file or experiment, a key, flag or value that it does not know, lists of
      different lengths zipped, or two trials that are the same.
  """
  path = Path(path)
  try:
    raw = tomllib.loads(path.read_text())
  except OSError as error:
    raise ConfigError(f"{path}: the description cannot be read: {error.strerror}.") from error
  except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path}: the description is not TOML: {error}.") from error
  try:
    return describe(path.stem, raw)
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from error


def describe(name: str, raw: Mapping[str, Any]) -> Sweep:
  """The sweep of a description's keys and values; ConfigError as `load`."""
  for key in raw:
    if key not in _KEYS:
      raise ConfigError(f"there is no key '{key}'; {_nearest(key, _KEYS)}.")
  experiment = raw.get("experiment")
  if not isinstance(experiment, str):
    raise ConfigError('experiment is missing; give a module of experiments/, as "quant_error".')
  retries, timeout_s = raw.get("retries", 0), raw.get("timeout_s", 0)
  if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
    raise ConfigError(f"retries is {retries!r}; expected a whole number, 0 or more.")
  if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not timeout_s >= 0:
    raise ConfigError(f"timeout_s is {timeout_s!r}; expected seconds, 0 for no limit.")
  fixed, cross, zips = _table(raw, "flags"), _table(raw, "cross"), raw.get("zip", [])
  if not isinstance(zips, list) or not all(isinstance(table, dict) for table in zips):
    raise ConfigError("zip is not a list of tables; write [[zip]] above each.")
  names = [*fixed, *cross, *itertools.chain(*zips)]
  for flag in names:
    if names.count(flag) > 1:
      raise ConfigError(f"the flag '{flag}' is given {names.count(flag)} times; give it once.")
  options, version = _options(experiment)
  trials = [
    _trial(experiment, version, options, {**fixed, **values})
    for values in _combinations(cross, zips)
  ]
  first: dict[str, int] = {}
  for i, trial in enumerate(trials, 1):
    if trial.hash in first:
      raise ConfigError(f"trials {first[trial.hash]} and {i} are the same: {dict(trial.flags)}.")
    first[trial.hash] = i
  return Sweep(name, tuple(trials), tuple(names[len(fixed) :]), retries, float(timeout_s))


def _table(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
  table = raw.get(key, {})
  if not isinstance(table, dict):
    raise ConfigError(f"{key} is {table!r}; expected a table: [{key}] above flags and values.")
  return table


def _combinations(
  cross: Mapping[str, Any], zips: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
  """The flags of each trial that are not the same for all."""
  axes: list[list[dict[str, Any]]] = []
  for flag, values in cross.items():
    axes.append([{flag: value} for value in _values(flag, values)])
  for table in zips:
    lengths = {flag: len(_values(flag, values)) for flag, values in table.items()}
    if len(set(lengths.values())) > 1:
      found = ", ".join(f"{flag} has {n}" for flag, n in lengths.items())
      raise ConfigError(f"flags that are zipped need as many values each; {found}.")
    axes.append([dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)])
  for parts in itertools.product(*axes):
    yield {flag: value for part in parts for flag, value in part.items()}


def _values(flag: str, values: Any) -> list[Any]:
  if not isinstance(values, list) or not values:
    raise ConfigError(
      f"the flag '{flag}' is to take {values!r}; expected a list of values, at least one."
    )
  return values


def _options(experiment: str) -> tuple[dict[str, dataclasses.Field], int]:
  """The fields of the experiment's Config by name, and the version of what it measures."""
  module = f"experiments.{experiment}"
  try:
    known = importlib.util.find_spec(module) is not None
  except (ImportError, ValueError):
    known = False
  if not known:
    folder = Path(importlib.import_module("experiments").__path__[0])
    there = [path.stem for path in folder.glob("*.py") if "class Config" in path.read_text()]
    raise ConfigError(f"there is no experiment '{experiment}'; {_nearest(experiment, there)}.")
  found = importlib.import_module(module)
  config = getattr(found, "Config", None)
  if not dataclasses.is_dataclass(config):
    raise ConfigError(f"the experiment '{experiment}' has no Config: it cannot be swept.")
  fields = {field.name: field for field in dataclasses.fields(config) if field.name != _OUT}
  return fields, getattr(found, "VERSION", 1)


def _trial(
  experiment: str,
  version: int,
  options: Mapping[str, dataclasses.Field],
  values: Mapping[str, Any],
) -> Trial:
  """A trial, its flags known and their values of the right type."""
  config = {name: field.default for name, field in options.items()}
  for flag, value in values.items():
    if flag == _OUT:
      raise ConfigError(f"the flag '{_OUT}' is not a description's: the backend says where.")
    if flag not in config:
      raise ConfigError(
        f"the experiment '{experiment}' has no flag '{flag}'; {_nearest(flag, config)}."
      )
    config[flag] = _typed(flag, value, options[flag].default)
  text = json.dumps([experiment, version, config], sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:12]
  return Trial(experiment, {flag: _word(config[flag]) for flag in values}, digest)


def _typed(flag: str, value: Any, default: Any) -> Any:
  """The value as the experiment will have it, of its default's type; ConfigError if it cannot."""
  if isinstance(default, tuple):
    kind = type(default[0]) if default else str
    return tuple(_typed(flag, v, kind()) for v in (value if isinstance(value, list) else [value]))
  kind = type(default) if isinstance(default, bool | int | float) else str
  fits = {
    bool: isinstance(value, bool),
    int: isinstance(value, int) and not isinstance(value, bool),
    float: isinstance(value, int | float) and not isinstance(value, bool),
    str: isinstance(value, str),
  }
  if not fits[kind]:
    raise ConfigError(f"the flag '{flag}' is to be {value!r}; expected {kind.__name__}.")
  return kind(value)


def _word(value: Any) -> str:
  """As it stands on a command line."""
  if isinstance(value, tuple):
    return ",".join(map(_word, value))
  return str(value).lower() if isinstance(value, bool) else str(value)


def _nearest(name: str, names: Iterable[str]) -> str:
  close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
  return f"nearest: {', '.join(close)}" if close else f"there are: {', '.join(sorted(names))}"
