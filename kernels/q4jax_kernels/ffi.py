"""The native CPU library: loaded once, its handlers registered with XLA; or None, said once."""

import contextlib
import contextvars
import ctypes
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

_PATH = Path(__file__).with_name("_native.so")
_HANDLERS = (
  "q4jax_matmul",
  "q4jax_take_rows",
  "q4jax_attention",
  "q4jax_window_attention",
  "q4jax_paged_attention",
  "q4jax_clock",
)

# How the `isa` attribute of the handlers names an instruction set; "best" is chosen at run time.
ISA_IDS = {"best": 0, "scalar": 1, "avx2": 2, "avx512": 3, "neon": 4}


@functools.cache
def library() -> ctypes.CDLL | None:
  """The loaded library, or None with one warning where it was not built or cannot be loaded."""
  try:
    lib = ctypes.CDLL(str(_PATH))
    handlers = {name: getattr(lib, name) for name in _HANDLERS}
    to_tiles = lib.q4jax_tiles
  except (OSError, AttributeError) as error:  # AttributeError: an older build, without a handler.
    reason = "it was not built" if not _PATH.exists() else str(error)
    warnings.warn(
      f"q4jax: the native CPU kernels are not available ({reason}); matrices will be dequantised "
      "by XLA, which is much slower on a CPU. Install g++ and reinstall q4jax, or run "
      "`make native` in a checkout.",
      stacklevel=2,
    )
    return None
  for name, handler in handlers.items():
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
  lib.q4jax_isa_name.restype = ctypes.c_char_p
  lib.q4jax_isa_name.argtypes = [ctypes.c_int64]
  to_tiles.restype = None
  to_tiles.argtypes = [
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_bool,
  ]
  return lib


_UNUSED = contextvars.ContextVar("q4jax_native_unused", default=False)


@contextlib.contextmanager
def unused() -> Iterator[None]:
  """What is loaded and traced inside uses no native kernel, as if there were none."""
  token = _UNUSED.set(True)
  try:
    yield
  finally:
    _UNUSED.reset(token)


def available() -> bool:
  """Whether the native kernels can run here (asking warns once if they cannot)."""
  return not _UNUSED.get() and library() is not None


def isa_name(isa: str = "best") -> str | None:
  """The instruction set that `isa` selects on this processor; None if it has not got it."""
  lib = library()
  name = lib.q4jax_isa_name(ISA_IDS[isa]) if lib is not None else None
  return name.decode() if name else None


def to_tiles(
  source: np.ndarray,
  out: np.ndarray,
  pieces: tuple[tuple[int, int, int], ...],
  codes: tuple[int, int],
  reverse: bool = False,
) -> bool:
  """Interleaves one tile of 16 rows in C; False where the library is missing.

  Args:
    source, out: contiguous uint8 arrays of the same size, a whole number of tiles' blocks.
    pieces: (offset, bytes, word bytes) of each piece of a block, in the tile's order.
    codes: see code_words.py, `CODES`; (0, 0) leaves codes as the file has them.
    reverse: from the tile to its rows.
  """
  lib = library()
  if lib is None:
    return False
  table = np.array(pieces, np.int64)
  blocks = source.size // (16 * sum(size for _, size, _ in pieces))
  first, bits = 16 * codes[0], codes[1]
  lib.q4jax_tiles(
    source.ctypes.data, out.ctypes.data, blocks, len(pieces), table.ctypes.data, first, bits,
    reverse,
  )  # fmt: skip
  return True
