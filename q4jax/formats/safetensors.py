"""A Hugging Face model folder (config.json, *.safetensors, tokenizer.*) as a `Checkpoint`."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from q4jax import config as config_lib
from q4jax.errors import FormatError
from q4jax.formats.checkpoint import Bytes, Tensor
from q4jax.formats.hf_config import HFConfig
from q4jax.formats.hf_folder import CONFIG, SENTENCEPIECE, TOKENIZER, model_name, weight_files
from q4jax.formats.json_file import read_object
from q4jax.formats.llama_tensors import hf_name, tensor_shapes
from q4jax.formats.safetensors_file import SafetensorsFile, StoredTensor
from q4jax.text import hf_metadata, spm_metadata

_FORMATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}  # llama.h: enum llama_ftype.
_ROPE_FREQS = "rope_freqs.weight"
# Buffers that old versions of transformers saved; they follow from the config.
_DERIVED = ".rotary_emb.inv_freq"


class SafetensorsCheckpoint:
  """See `Checkpoint`. Float weights as they are, vectors as float32; all files are mapped.

  Q and K have their rows in memory's order already. The metadata is what a converter to GGUF would
  write, the tokenizer's included if the folder has a tokenizer.json or a tokenizer.model.
  """

  def __init__(
    self,
    path: str,
    files: Mapping[str, SafetensorsFile],
    config: HFConfig,
    tokenizer: Mapping[str, Any],
  ):
    self.path, self._files, self._factors = path, files, config.rope_factors
    self._stored = _join(path, files)
    if config.tied:
      self._stored.pop("lm_head.weight", None)  # transformers ties it, whatever it holds.
    self.config = config_lib.from_gguf(config.metadata, self._names(config), path)
    self.tensors: Mapping[str, Tensor] = {
      name: Tensor(name, shape, self._format(name, shape))
      for name, shape in tensor_shapes(self.config).items()
    }
    unknown = self._stored.keys() - {hf_name(n) for n in self.tensors if n != _ROPE_FREQS}
    if unknown:
      raise FormatError(
        f"{path}: {len(unknown)} tensor(s) are no part of a {self.config.architecture} model of "
        f"{self.config.num_layers} layers as q4jax knows it, first '{min(unknown)}'. This variant "
        "is not supported."
      )
    kinds = [tensor.format for tensor in self.tensors.values() if len(tensor.shape) > 1]
    about = {
      "general.type": "model",
      "general.name": model_name(Path(path)),
      "general.file_type": _FILE_TYPES[max(_FILE_TYPES, key=kinds.count)],
    }
    self.metadata: Mapping[str, Any] = {**config.metadata, **about, **tokenizer}

  @classmethod
  def open(cls, path: str | Path) -> Self:
    """Opens a model folder.

    Raises:
      FormatError: a file is missing, cannot be read or breaks its format, or it is a model that
        q4jax does not run.
      TokenizerError: GGUF's metadata cannot say what its tokenizer does.
    """
    folder = Path(path)
    config = HFConfig(read_object(folder / CONFIG, "the model's config"), folder / CONFIG)
    tokenizer = _tokenizer(folder, config.vocab_size)
    with ExitStack() as undo:
      paths = weight_files(folder)
      files = {path.name: undo.enter_context(SafetensorsFile(path)) for path in paths}
      checkpoint = cls(str(folder), files, config, tokenizer)
      undo.pop_all()
    return checkpoint

  def rows(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
    """See `Checkpoint.rows`. A view of the file, but for vectors of 16 bits."""
    tensor = self.tensors[name]
    stop = tensor.num_rows if stop is None else stop
    if name == _ROPE_FREQS and self._factors is not None:
      return self._factors.view(np.uint8)[None][start:stop]
    file, stored = self._place(name)
    if len(tensor.shape) > 1:
      rows = file.read(stored, start * tensor.row_bytes, stop * tensor.row_bytes)
      return rows.reshape(stop - start, tensor.row_bytes)
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}[stored.dtype]
    vector = file.read(stored, 0, stored.nbytes).view(dtype).astype(np.float32)
    return vector.view(np.uint8)[None][start:stop]

  def release(self, name: str) -> None:
    """See `Checkpoint.release`."""
    if name != _ROPE_FREQS:
      file, stored = self._place(name)
      file.release(stored)

  def close(self) -> None:
    """See `Checkpoint.close`."""
    for file in self._files.values():
      file.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _place(self, name: str) -> tuple[SafetensorsFile, StoredTensor]:
    file = self._files[self._stored[hf_name(name)]]
    return file, file.tensors[hf_name(name)]

  def _names(self, config: HFConfig) -> frozenset[str]:
    """The names from which `from_gguf` sees what kind of model it is."""
    arch = config.metadata["general.architecture"]
    names = {
      "output.weight": not config.tied,
      _ROPE_FREQS: config.rope_factors is not None,
      "blk.0.attn_q.bias": arch == "qwen2" or hf_name("blk.0.attn_q.bias") in self._stored,
      "blk.0.attn_q_norm.weight": arch == "qwen3",
    }
    return frozenset(name for name, there in names.items() if there)

  def _format(self, name: str, shape: tuple[int, ...]) -> str:
    """The format of a tensor, which must be there with this shape."""
    if name == _ROPE_FREQS:
      return "f32"
    if hf_name(name) not in self._stored:
      raise FormatError(
        f"{self.path}: tensor '{hf_name(name)}' is missing; {CONFIG} asks for it. The folder is "
        "incomplete: download it again."
      )
    file, stored = self._place(name)
    if stored.shape != shape:
      raise FormatError(
        f"{file.path}: tensor '{hf_name(name)}' has shape {list(stored.shape)}; {CONFIG} asks for "
        f"{list(shape)}."
      )
    if stored.dtype not in _FORMATS:
      raise FormatError(
        f"{file.path}: tensor '{hf_name(name)}' is of type {stored.dtype}; q4jax reads "
        f"{', '.join(_FORMATS)}."
      )
    return _FORMATS[stored.dtype] if len(shape) > 1 else "f32"


def _tokenizer(folder: Path, vocab_size: int) -> dict[str, Any]:
  """GGUF's keys of the folder's tokenizer.json, else of its tokenizer.model, else none."""
  if (folder / TOKENIZER).exists():
    return hf_metadata.tokenizer_metadata(folder / TOKENIZER, vocab_size)
  if (folder / SENTENCEPIECE).exists():
    return spm_metadata.tokenizer_metadata(folder / SENTENCEPIECE, vocab_size)
  return {}


def _join(path: str, files: Mapping[str, SafetensorsFile]) -> dict[str, str]:
  """The file of each tensor."""
  found: dict[str, str] = {}
  for file_name, file in files.items():
    for name in file.tensors:
      if name in found:
        raise FormatError(
          f"{path}: tensor '{name}' is in {found[name]} and in {file_name}; the files do not "
          "belong together. Download them again, all from one place."
        )
      if not name.endswith(_DERIVED):
        found[name] = file_name
  return found
