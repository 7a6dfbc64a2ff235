"""Memory that loading and compiling have freed goes back to the system.

glibc keeps it: 25 MiB of an 8B model's loading, 50 MiB of each of its programs, even of those that
are only read from the cache. Where the C library is another, nothing is done.
"""

import ctypes
import functools
import os

# Windows opens no library without a name.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def give_back() -> None:
  """What is free now."""
  if _trim is not None:
    _trim(0)


@functools.cache  # JAX calls what is registered twice twice.
def give_back_after_compiling() -> None:
  """What is free each time a program has been compiled, or read from the cache, from now on."""
  import jax

  def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      give_back()

  jax.monitoring.register_event_duration_secs_listener(heard)
