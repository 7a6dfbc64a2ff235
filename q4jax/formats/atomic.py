"""Files and folders that appear whole under their name or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from q4jax.errors import ConfigError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
  """Gives a temporary path beside `path`, which becomes `path` where the block ends without error.

  The file (or the folder and all its files) is flushed to the disk before it is renamed, so that a
  kill or a power cut leaves what was there before, or the new content, never a part. What an error
  leaves is removed; what a kill leaves is `.NAME.PID.tmp`, removed by the next writer of `path`.

  Raises:
    ConfigError: the folder of `path` does not exist or cannot be written.
  """
  path = Path(path)
  if not path.parent.is_dir():
    raise ConfigError(f"{path}: the folder {path.parent} does not exist; create it first.")
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  _remove_leftovers(path)
  try:
    yield temporary
    _flush(temporary)
    if temporary.is_dir() and path.is_dir():
      # A folder cannot replace one in a single step: the old one steps aside first.
      aside = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
      os.rename(path, aside)
      os.rename(temporary, path)
      shutil.rmtree(aside)
    else:
      os.replace(temporary, path)
    _sync(path.parent)
  except OSError as error:
    raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
  finally:
    _remove(temporary)


def write_bytes(path: str | Path, data: bytes) -> None:
  """Writes a small file by `replacing`."""
  with replacing(path) as temporary:
    temporary.write_bytes(data)


def _flush(path: Path) -> None:
  if path.is_dir():
    for child in path.iterdir():
      _flush(child)
  _sync(path)


def _sync(path: Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _remove(path: Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
  for leftover in path.parent.glob(f".{path.name}.*.tmp"):
    owner = leftover.name.removeprefix(f".{path.name}.").split(".")[0]
    if owner.isdigit() and Path(f"/proc/{owner}").exists():
      continue
    if leftover.name.endswith(".old.tmp") and not path.exists():
      os.rename(leftover, path)  # Killed between the two renames: the old folder is the content.
    else:
      _remove(leftover)
