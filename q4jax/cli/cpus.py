"""Which CPUs this process may use: XLA and q4jax's kernels start one thread for each."""

import os
from pathlib import Path

from q4jax.errors import ConfigError


def count() -> int:
  """CPUs that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads(limit: int | None) -> None:
  """Keeps this process, and the threads it will start, to `limit` CPUs; to all that it has if None.

  Must run before JAX starts: XLA sizes its thread pool by the CPUs that the process may use. Cores
  are filled one hyperthread each before any gets its second.

  Raises:
    ConfigError: there are fewer CPUs, or the system does not let processes choose.
  """
  if limit is None:
    return
  if not hasattr(os, "sched_setaffinity"):
    raise ConfigError("--threads needs Linux, where a process can be kept to some CPUs.")
  allowed = sorted(os.sched_getaffinity(0))
  if limit > len(allowed):
    raise ConfigError(f"--threads is {limit}; this process may use {len(allowed)} CPU(s).")
  by_core = sorted(allowed, key=lambda cpu: (_rank_within_core(cpu), cpu))
  os.sched_setaffinity(0, by_core[:limit])


def _rank_within_core(cpu: int) -> int:
  """0 for a core's first hyperthread, 1 for its second; 0 where the system does not tell."""
  path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
  try:
    siblings = path.read_text().strip().replace("-", ",").split(",")  # "0,64" or "0-1"
  except OSError:
    return 0
  return 0 if str(cpu) == siblings[0] else 1
