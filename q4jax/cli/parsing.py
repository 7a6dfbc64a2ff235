"""Reads a command's flags and positional arguments with absl, and writes its help."""

import copy
import difflib
import shutil
import textwrap
from collections.abc import Collection, Sequence
from types import ModuleType

from absl import flags as absl_flags


class UsageError(Exception):
  """A command line that makes no sense: exit code 2."""


def command(name: str, known: Collection[str]) -> str:
  """`name`, if there is such a command."""
  if name in known:
    return name
  flag = name.startswith("-")
  what = f"the command comes before flags such as {name}" if flag else f"no command '{name}'"
  raise UsageError(f"{what}.{_nearest(name, known)} The commands are {', '.join(known)}.")


def asks_for_help(arguments: Sequence[str]) -> bool:
  """Whether --help or -h is among the arguments."""
  return not {"-h", "--help"}.isdisjoint(arguments)


def parse(
  name: str, module: ModuleType, arguments: Sequence[str]
) -> tuple[absl_flags.FlagValues, list[str]]:
  """The flags and the positional arguments of one command line.

  Flags may stand before or after the arguments, as --flag=value or --flag value.

  Raises:
    UsageError: a flag that the command does not have or that has no good value; a missing or a
      surplus argument.
  """
  flags = copy.deepcopy(module.FLAGS)  # A second command line of this process starts afresh.
  flags.set_gnu_getopt(True)
  help = f"See q4jax {name} --help."
  # absl's own way of asking it to ignore unknown flags.
  if any(argument.lstrip("-").partition("=")[0] == "undefok" for argument in arguments):
    raise UsageError(f"q4jax {name} has no flag --undefok. {help}")
  try:
    rest = flags([name, *arguments])[1:]
  except absl_flags.UnrecognizedFlagError as error:
    near = _nearest(error.flagname, list(flags), "--")
    raise UsageError(f"q4jax {name} has no flag --{error.flagname}.{near} {help}") from None
  except (absl_flags.Error, ValueError) as error:
    raise UsageError(f"{error}. {help}") from None
  wanted = module.ARGUMENTS
  if len(rest) < len(wanted):
    raise UsageError(f"q4jax {name} needs {' '.join(wanted)}. {help}")
  if len(rest) > len(wanted):
    surplus = " ".join(map(repr, rest[len(wanted) :]))
    raise UsageError(f"q4jax {name} takes no argument {surplus}; quote texts with spaces. {help}")
  return flags, rest


def help_text(name: str, module: ModuleType) -> str:
  """A command's docstring and its flags."""
  assert module.__doc__
  usage = " ".join(["usage: q4jax", name, *module.ARGUMENTS, "[--flag=value ...]"])
  lines = [usage, "", module.__doc__.strip(), "", "flags:"]
  width = min(100, shutil.get_terminal_size().columns)
  for flag in map(module.FLAGS.__getitem__, module.FLAGS):
    text = flag.help.split(";\n")[0]  # absl adds a remark to flags that may be repeated.
    if not flag.boolean and flag.default not in (None, []):
      text += f" (default: {flag.default})"
    lines.append(f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}=...")
    lines.append(textwrap.indent(textwrap.fill(text, width - 6), " " * 6))
  return "\n".join(lines) + "\n"


def _nearest(name: str, known: Collection[str], prefix: str = "") -> str:
  name = name.lstrip("-")
  near = [k for k in known if name and k.startswith(name)] or difflib.get_close_matches(name, known)
  return f" Did you mean {prefix}{near[0]}?" if near else ""
