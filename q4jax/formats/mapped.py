"""Files mapped into memory: read as they are touched, their pages given back on request."""

import mmap
import os
import stat
from pathlib import Path

from q4jax.errors import FormatError


def map_file(path: Path, least: int) -> mmap.mmap:
  """Maps a file read-only.

  Raises:
    FormatError: it cannot be opened, is not a regular file, or has less than `least` bytes.
  """
  try:
    # Opening a pipe would wait for its writer, so look first.
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise FormatError(f"{path}: this is not a regular file; name the model's file itself.")
    with path.open("rb") as file:
      size = os.fstat(file.fileno()).st_size
      if size < least:
        raise FormatError(
          f"{path}: the file is {size} bytes long, and a {path.suffix[1:] or 'model'} file has "
          f"{least} or more. The download was cut short or has not begun: download it again."
        )
      return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
  except (OSError, ValueError) as error:  # ValueError: a path with a null byte.
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    raise FormatError(
      f"{path}: the file cannot be opened: {reason}. Check the path and its permissions."
    ) from None


def release(mapping: mmap.mmap, offset: int, nbytes: int) -> None:
  """Gives pages of a mapped file back; touched again, they are read again."""
  start = offset // mmap.PAGESIZE * mmap.PAGESIZE
  mapping.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)
