"""Compiled programs kept from one start to the next: JAX's own cache, in a directory of ours."""

import hashlib
import os
import platform
import warnings
from pathlib import Path

from q4jax.errors import ConfigError


def use(directory: str | None) -> None:
  """Keeps compiled programs in `directory` ("none": nowhere), or where `default` says.

  Compiling takes seconds and, on a CPU, some 100 MiB that are not given back.

  Raises:
    ConfigError: the directory was named, and cannot be made or written to.
  """
  if directory == "none":
    return
  named = directory is not None
  path = Path(directory).expanduser() if directory is not None else default()
  if path is None:
    return
  try:
    path.mkdir(parents=True, exist_ok=True)
    writable = os.access(path, os.W_OK | os.X_OK)
  except OSError:
    writable = False
  if not writable:
    if named:
      raise ConfigError(f"--compile_cache={directory} is no directory that can be written to.")
    warnings.warn(
      f"q4jax: {path} cannot be written to, so every start compiles anew. Name another directory "
      "with --compile_cache.",
      stacklevel=2,
    )
    return
  import jax

  jax.config.update("jax_compilation_cache_dir", str(path))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def default() -> Path | None:
  """~/.cache/q4jax/programs/PROCESSOR; None where JAX_COMPILATION_CACHE_DIR has been set.

  A program compiled for one processor may stop another that shares the home directory with an
  illegal instruction, so each kind has its own.
  """
  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return None
  cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  return cache / "q4jax" / "programs" / f"{platform.machine()}-{_processor()}"


def _processor() -> str:
  """A short name for what this processor can do."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = [platform.processor()]
  said = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
  return hashlib.sha256("\n".join(said or lines[:1]).encode()).hexdigest()[:12]
