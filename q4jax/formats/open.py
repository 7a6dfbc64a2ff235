"""Opens a model of any format for reading or writing: the one place that knows them all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from q4jax.config import LlamaConfig
from q4jax.errors import ConfigError, FormatError
from q4jax.formats import hf_folder, orbax_checkpoint
from q4jax.formats.checkpoint import Checkpoint, Sink, Tensor
from q4jax.formats.gguf import GGUFFile
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.gguf_sink import GGUFSink
from q4jax.formats.hub import resolve
from q4jax.formats.orbax_checkpoint import OrbaxCheckpoint, OrbaxSink
from q4jax.formats.qbin import QbinCheckpoint
from q4jax.formats.qbin_header import MAGIC
from q4jax.formats.qbin_sink import QbinSink
from q4jax.formats.safetensors import SafetensorsCheckpoint

# The suffixes that can be written, and what each sink can be told besides the model.
SINKS: dict[str, set[str]] = {
  ".gguf": {"types", "file_type"},
  ".qbin": {"layout", "records", "types"},
  ".orbax": set(),
}


def open_checkpoint(model: str | Path) -> Checkpoint:
  """Opens a model for reading.

  Args:
    model: a .gguf file (any shard of a split one), a .qbin file, a Hugging Face model folder (or
      its config.json, index or .safetensors file), a folder that `open_sink` wrote as .orbax, the
      alias `tiny`, or a name on the hub (`hf://org/repo`, `hf://org/repo/file.gguf`), downloaded
      first.

  Raises:
    ConfigError, DownloadError: the model cannot be found.
    FormatError: it is of no known format, cannot be read, or holds no model that q4jax runs.
    TokenizerError: a tokenizer.json does what GGUF's metadata cannot say.
  """
  path = resolve(str(model))
  kind = kind_of(path)
  if kind == "qbin":
    return QbinCheckpoint.open(path)
  if kind == "orbax":
    return OrbaxCheckpoint.open(path)
  if kind == "safetensors":
    return SafetensorsCheckpoint.open(path if path.is_dir() else path.parent)
  return GGUFCheckpoint.open(path)


def kind_of(path: Path) -> str:
  """The format of what lies at a path: "gguf", "qbin", "safetensors" or "orbax".

  A file of no other format, and one that does not exist, is for the reader of GGUF to judge.

  Raises:
    FormatError: a folder that is no model's.
  """
  if path.is_dir():
    if (path / orbax_checkpoint.ABOUT).exists():
      return "orbax"
    if (path / hf_folder.CONFIG).exists():
      return "safetensors"
    files = sorted(file.name for file in path.glob("*.gguf"))
    raise FormatError(
      f"{path}: the folder has neither {hf_folder.CONFIG} (Hugging Face) nor "
      f"{orbax_checkpoint.ABOUT} (q4jax's orbax checkpoints)."
      + (f" Name a file in it: {', '.join(files[:3])}." if files else " Is it a model's?")
    )
  if path.suffix == ".qbin" or _begins(path) == MAGIC:
    return "qbin"
  if path.name in (hf_folder.CONFIG, hf_folder.INDEX) or path.suffix == ".safetensors":
    return "safetensors"
  return "gguf"


def read_metadata(path: Path) -> Mapping[str, Any]:
  """A model's metadata alone; a GGUF file may hold nothing else.

  Raises:
    FormatError, TokenizerError: see `open_checkpoint`.
  """
  if kind_of(path) == "gguf":
    with GGUFFile.open(path) as file:
      return file.metadata
  with open_checkpoint(path) as checkpoint:
    return checkpoint.metadata


def check_suffix(path: str | Path) -> str:
  """The suffix of a path that `open_sink` can write.

  Raises:
    ConfigError: it is none of `SINKS`.
  """
  suffix = Path(path).suffix
  if suffix not in SINKS:
    raise ConfigError(
      f"{path}: the name ends in '{suffix}', which is no format that q4jax writes. End it in "
      f"{', '.join(SINKS)}."
    )
  return suffix


def open_sink(
  path: str | Path,
  config: LlamaConfig,
  metadata: Mapping[str, Any],
  tensors: Sequence[Tensor],
  **options: Any,
) -> Sink:
  """Opens a model for writing, in the format that the suffix of `path` says (`SINKS`).

  Args:
    options: of the format: see `GGUFSink` (types, file_type) and `QbinSink` (layout, records,
      types).

  Raises:
    ConfigError: another suffix, an option that the format does not have, or a tensor that it cannot
      hold.
  """
  suffix = check_suffix(path)
  allowed = SINKS[suffix]
  if surplus := options.keys() - allowed:
    raise ConfigError(
      f"{path}: a {suffix} file has no option {min(surplus)!r}; it has "
      f"{', '.join(sorted(allowed)) or 'none'}."
    )
  if suffix == ".gguf":
    return GGUFSink(path, config, metadata, tensors, **options)
  if suffix == ".orbax":
    return OrbaxSink(path, config, metadata, tensors)
  return QbinSink(path, config, metadata, tensors, **options)


def _begins(path: Path) -> bytes:
  """The first bytes of a regular file; none where it cannot be read, which opening it explains."""
  try:
    if not path.is_file():
      return b""
    with path.open("rb") as file:
      return file.read(len(MAGIC))
  except (OSError, ValueError):
    return b""
