"""A model from one format to another, tensor by tensor: the same weights, in the same types."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import Checkpoint, Tensor
from q4jax.formats.group_blocks import ggml_format
from q4jax.formats.hub import resolve
from q4jax.formats.open import open_checkpoint, open_sink
from q4jax.formats.qbin import QbinCheckpoint
from q4jax.offline.rotate import RotatedCheckpoint


class Progress(Protocol):
  """Called after each tensor with the bytes done and the bytes in all."""

  def __call__(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Converted:
  """What was written.

  Attributes:
    source, out: where the model was and is.
    tensors, weights: how many there are.
    source_bytes, out_bytes: of the tensors there, and of the whole file (or folder) here.
    has_tokenizer: whether the model has its vocabulary with it.
    stored_as: formats that `out` cannot hold, and the one that holds the same weights there.
  """

  source: str
  out: str
  tensors: int
  weights: int
  source_bytes: int
  out_bytes: int
  has_tokenizer: bool
  stored_as: dict[str, str]


def convert(
  source: str | Path,
  out: str | Path,
  *,
  layout: str | None = None,
  rotate: int | None = None,
  force: bool = False,
  progress: Progress | None = None,
) -> Converted:
  """Writes a model anew, in the format that the suffix of `out` says.

  The bytes of every tensor stay, but for what `Converted.stored_as` lists: the weights of those
  stay. With `rotate` they do not: see `RotatedCheckpoint`. Peak memory: about one tensor.

  Args:
    source: whatever `open_checkpoint` opens.
    out: a path that ends in .gguf, .qbin or .orbax.
    layout: of a .qbin's matrices: "rows", or "x16" as a CPU multiplies with them.
    rotate: the seed of a rotation to fold into the weights.
    force: replaces what is at `out`; it stays until the new one is complete.

  Raises:
    ConfigError: `out` exists, is (part of) the source, or cannot hold the tensors.
    Q4JaxError: the source cannot be read.
  """
  out = Path(out).expanduser()
  _check_free(out, resolve(str(source)), force)
  with open_checkpoint(source) as opened:
    model = opened if rotate is None else RotatedCheckpoint(opened, rotate)
    tensors = list(model.tensors.values())
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    options = _options(model, out, layout)
    with open_sink(out, model.config, model.metadata, tensors, **options) as sink:
      for tensor in tensors:
        sink.write(tensor, model.rows(tensor.name))
        model.release(tensor.name)
        done += tensor.nbytes
        if progress:
          progress(done, total)
    return Converted(
      source=model.path,
      out=str(out),
      tensors=len(tensors),
      weights=sum(prod(tensor.shape) for tensor in tensors),
      source_bytes=total,
      out_bytes=size_on_disk(out),
      has_tokenizer="tokenizer.ggml.model" in model.metadata,
      stored_as=_stored_as(tensors, out),
    )


def size_on_disk(path: Path) -> int:
  """Bytes of a file, or of all files in a folder."""
  files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
  return sum(file.stat().st_size for file in files)


def _check_free(out: Path, source: Path, force: bool) -> None:
  if not out.exists():
    return
  if source.exists() and (out.samefile(source) or out.resolve() in source.resolve().parents):
    raise ConfigError(f"{out} is what is read; give another path to write to.")
  if not force:
    raise ConfigError(f"{out} exists; give another name, or --force to replace it.")


def _options(model: Checkpoint, out: Path, layout: str | None) -> Mapping[str, Any]:
  """What the sink is told besides the tensors."""
  if layout is not None and out.suffix != ".qbin":
    raise ConfigError(f"--layout={layout} is of .qbin files, and {out} will be none.")
  options: dict[str, Any] = {}
  if out.suffix in (".gguf", ".qbin"):
    options["types"] = getattr(model, "value_types", None)  # Some sources have none.
  if out.suffix == ".qbin":
    options["records"] = model.records() if isinstance(model, QbinCheckpoint) else ()
  return options if layout is None else options | {"layout": layout}


def _stored_as(tensors: list[Tensor], out: Path) -> dict[str, str]:
  if out.suffix != ".gguf":
    return {}
  pairs = {t.format: ggml_format(t.format, t.name) for t in tensors}
  return {old: new for old, new in pairs.items() if old != new}
