"""Opens a model in whichever format it is."""

from pathlib import Path

from q4jax.formats.checkpoint import Checkpoint
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.qbin import QbinCheckpoint
from q4jax.formats.qbin_header import MAGIC


def open_checkpoint(path: str | Path) -> Checkpoint:
  """Opens a model; what a file is, its first bytes say, and where they do not, its name.

  Raises:
    FormatError: it cannot be read, or is in no format that we know.
  """
  path = Path(path)
  if path.suffix == ".qbin" or _begins(path) == MAGIC:
    return QbinCheckpoint.open(path)
  return GGUFCheckpoint.open(path)


def _begins(path: Path) -> bytes:
  """The first bytes of a regular file; none where it cannot be read, which opening it explains."""
  try:
    if not path.is_file():
      return b""
    with path.open("rb") as file:
      return file.read(len(MAGIC))
  except (OSError, ValueError):
    return b""
