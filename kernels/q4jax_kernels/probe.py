"""What this machine can do at most, for benchmarks to divide by; and clocks inside a program."""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from q4jax_kernels import ffi


def _function(name: str, result: Any, *arguments: Any) -> Callable:
  library = ffi.library()
  if library is None:
    raise NotImplementedError("probing needs the native library; see the warning above.")
  function = getattr(library, name)
  function.restype, function.argtypes = result, arguments
  return function


def threads() -> int:
  """CPUs of this process: as many threads as XLA starts."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_bandwidth(buffer: np.ndarray, num_threads: int) -> float:
  """Bytes a second of one plain sequential read of `buffer`, each thread its own part of it.

  The buffer must be written to before, and be far larger than the caches.
  """
  read = _function("q4jax_probe_read", ctypes.c_double, ctypes.c_void_p, *[ctypes.c_int64] * 2)
  return read(buffer.ctypes.data, buffer.nbytes, num_threads)


def int8_peak(num_threads: int, seconds: float = 0.05) -> float:
  """Operations a second, two for each product of bytes: AVX-512's vpdpbusd where the processor has
  it, AVX2's vpmaddubsw with vpaddw, or whatever the compiler makes of a plain loop.
  """
  peak = _function("q4jax_probe_int8", ctypes.c_double, ctypes.c_int64, ctypes.c_double)
  return peak(num_threads, seconds)


def scalar_matmul(
  x: np.ndarray, packed: np.ndarray, scale: np.ndarray, minimum: np.ndarray
) -> np.ndarray:
  """x float32[M, K] times the transpose of scale * code - minimum, in a plain triple loop.

  Args:
    packed: uint8[N, K / 2], the even k in the low nibble.
    scale, minimum: float32[N, G], a value for each K / G weights of a row.

  Returns:
    float32[M, N].
  """
  (m, k), (n, groups) = x.shape, scale.shape
  arrays = [np.ascontiguousarray(a, np.float32) for a in (x, scale, minimum)]
  x, scale, minimum = arrays
  packed, y = np.ascontiguousarray(packed, np.uint8), np.empty((m, n), np.float32)
  if packed.shape != (n, k // 2) or minimum.shape != scale.shape or k % 2 or k % groups:
    raise ValueError(
      f"x {x.shape}, packed {packed.shape}, scale {scale.shape} and minimum {minimum.shape} do not "
      "fit each other."
    )
  pointers = [a.ctypes.data for a in (x, packed, scale, minimum, y)]
  types = [*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 4]
  _function("q4jax_probe_scalar_matmul", None, *types)(*pointers, m, n, k, groups)
  return y


def clock(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x, and the time at which the program came to it: uint32[2], see `nanoseconds`. CPU only."""
  ffi.library()  # Registers the handler.
  like = jax.ShapeDtypeStruct(x.shape, x.dtype)
  call = jax.ffi.ffi_call("q4jax_clock", [like, jax.ShapeDtypeStruct((2,), jnp.uint32)])
  value, now = call(x)
  return value, now


def nanoseconds(now: jax.Array) -> int:
  """What `clock` told, on the clock of `time.monotonic_ns`."""
  low, high = np.asarray(now).tolist()
  return low + (high << 32)
