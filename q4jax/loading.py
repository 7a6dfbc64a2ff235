"""`q4jax.load`: from a model's name to a model in memory, its weights still quantised."""

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.errors import ConfigError, FormatError, TokenizerError
from q4jax.formats.checkpoint import FLOAT_FORMATS, Checkpoint, Tensor, floats
from q4jax.formats.open import open_checkpoint
from q4jax.formats.qbin import QbinCheckpoint
from q4jax.model.layers import Matmul, Quantized, Weight
from q4jax.model.llama import Llama
from q4jax.model.model import Model
from q4jax.text.tokenizer import Tokenizer
from q4jax_kernels import ffi
from q4jax_kernels.block_array import ROWS, BlockArray, interleave_tile
from q4jax_kernels.int4_matmul import dispatch
from q4jax_kernels.int4_matmul.prepare import layout_for, prepared

# Tensors that some converters add and that hold nothing a model needs.
_REDUNDANT = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")
# Bytes interleaved between two releases of the mapped file's pages.
_CHUNK_BYTES = 16 << 20


class Progress(Protocol):
  """Called after each tensor with the bytes done and the bytes in all."""

  def __call__(self, done: int, total: int) -> None: ...


def load(
  model: str | Path,
  *,
  tokenizer: str | Path | None = None,
  device: jax.Device | None = None,
  implementation: str | None = None,
  progress: Progress | None = None,
) -> Model:
  """Loads a Llama (or Qwen 2 / 3) from a GGUF or .qbin file, or a Hugging Face folder.

  Every tensor keeps the type the file gives it; quantised matrices stay quantised (`BlockArray`),
  and the floats of Hugging Face's folders stay floats.
  Memory: the model's size plus at most one tensor and 64 MiB while loading. On a CPU, the matrices
  of a .qbin are the mapped file itself: nothing is copied, what is used is read when it is, the
  system may drop it again, and processes share it. The file must then stay as it is while the model
  lives: replace it by renaming another over it.

  Args:
    model: a path to a .gguf file (any shard of a split one), a .qbin, a folder with config.json and
      .safetensors files, or an .orbax folder; the alias `tiny` (the model that comes with q4jax);
      `hf://org/repo/file.gguf` or `hf://org/repo`, downloaded once and cached.
    tokenizer: a `tokenizer.json` or `tokenizer.model` to use instead of the file's own vocabulary.
    device: where the weights go; the default device if None.
    implementation: of the int4 matmul, by name (`q4jax_kernels.int4_matmul.IMPLEMENTATIONS`): it
      then multiplies with every quantised matrix, whatever it costs. None takes the best.
    progress: see `Progress`.

  Raises:
    q4jax.Q4JaxError: the model cannot be found, read, or run; the message says what to do.
  """
  with open_checkpoint(model) as checkpoint:
    return load_checkpoint(
      checkpoint,
      tokenizer=tokenizer,
      device=device,
      implementation=implementation,
      progress=progress,
    )


def load_checkpoint(
  checkpoint: Checkpoint,
  *,
  tokenizer: str | Path | None = None,
  device: jax.Device | None = None,
  implementation: str | None = None,
  progress: Progress | None = None,
) -> Model:
  """`load` of an open checkpoint, wherever it lies."""
  device = device or jax.local_devices()[0]
  text = _tokenizer(checkpoint.metadata, tokenizer, checkpoint.path)
  weights = _Weights(checkpoint, device, implementation, progress)
  module = Llama(checkpoint.config, weights.make, Matmul(_matmul_dtype(device), implementation))
  weights.check_all_used()
  metadata = {k: v for k, v in checkpoint.metadata.items() if not k.startswith("tokenizer.ggml.")}
  return Model(module, text, metadata, checkpoint.path)


def _tokenizer(metadata: Mapping[str, Any], external: str | Path | None, path: str) -> Tokenizer:
  if external is not None:
    return Tokenizer.from_file(external)
  try:
    return Tokenizer.from_gguf_metadata(metadata)
  except TokenizerError as error:
    raise TokenizerError(f"{path}: {error}") from None


def _matmul_dtype(device: jax.Device) -> jnp.dtype:
  return jnp.dtype(jnp.float32 if device.platform == "cpu" else jnp.bfloat16)


class _Weights:
  """Reads parameters by name, one at a time, into the layout the device wants."""

  def __init__(
    self,
    source: Checkpoint,
    device: jax.Device,
    implementation: str | None,
    progress: Progress | None,
  ):
    self.source, self.device, self.implementation = source, device, implementation
    # A CPU's tiles are made as the file is read, other layouts from whole matrices.
    tiles = device.platform == "cpu" and ffi.available()
    self.layout = "x16" if tiles else layout_for(device)
    self.progress = progress
    self.threads = ThreadPoolExecutor(os.cpu_count())
    self.used: set[str] = set()
    self.done, self.total = 0, sum(tensor.nbytes for tensor in source.tensors.values())

  def make(self, name: str, shape: tuple[int, ...]) -> Weight:
    tensor = self._tensor(name, shape)
    self.used.add(name)
    value: Weight
    if len(shape) == 1:
      value = self._vector(tensor)
    elif self.layout == "x16":
      value = self._mapped(tensor) or self._tiles(tensor)
    else:
      value = self._rows(tensor)
    if self.implementation is not None and isinstance(value, Quantized):
      self._check(tensor, value, self.implementation)
    self.done += tensor.nbytes
    if self.progress:
      self.progress(self.done, self.total)
    return value

  def _check(self, tensor: Tensor, value: Quantized, implementation: str) -> None:
    try:
      dispatch.check(implementation, [value])
    except (ValueError, NotImplementedError) as error:
      raise ConfigError(
        f"implementation '{implementation}' of the int4 matmul cannot be used for '{tensor.name}' "
        f"({tensor.format}) on {self.device.platform}: {error} Leave it out to get the best."
      ) from None

  def check_all_used(self) -> None:
    names = self.source.tensors
    unused = [n for n in names if n not in self.used and not _REDUNDANT.fullmatch(n)]
    if unused:
      raise FormatError(
        f"{self.source.path}: {len(unused)} tensor(s) are not part of a "
        f"{self.source.config.architecture} model "
        f"as q4jax knows it, first '{unused[0]}'. Leaving them out would give wrong results; "
        "this variant of the architecture is not supported."
      )

  def _tensor(self, name: str, shape: Sequence[int]) -> Tensor:
    tensor, config = self.source.tensors.get(name), self.source.config
    if tensor is None:
      raise FormatError(
        f"{self.source.path}: tensor '{name}' is missing; a {config.architecture} model of "
        f"{config.num_layers} layers needs it. The file is incomplete; download it again."
      )
    if tensor.shape != tuple(shape):
      raise FormatError(
        f"{self.source.path}: tensor '{name}' has shape {list(tensor.shape)}; the file's metadata "
        f"asks for {list(shape)}. The file is inconsistent; convert the model again."
      )
    return tensor

  def _vector(self, tensor: Tensor) -> jax.Array:
    if tensor.format not in FLOAT_FORMATS:
      raise FormatError(
        f"{self.source.path}: the vector '{tensor.name}' is of type {tensor.format}; expected a "
        "float type."
      )
    return jax.device_put(floats(self.source, tensor.name), self.device)

  def _rows(self, tensor: Tensor) -> Weight:
    data = self.source.rows(tensor.name)
    if tensor.format in FLOAT_FORMATS:
      dtype = {"f32": "float32", "f16": "float16", "bf16": jnp.bfloat16}[tensor.format]
      value: Weight = jax.device_put(data.view(jnp.dtype(dtype)), self.device)
    else:
      value = prepared(data, tensor.format, self.device, self.layout)
    jax.block_until_ready(value)
    self.source.release(tensor.name)
    return value

  def _mapped(self, tensor: Tensor) -> BlockArray | None:
    """The tiles of a file that has them, where they lie in it; None if it does not."""
    source = self.source
    if not isinstance(source, QbinCheckpoint) or not source.places[tensor.name].mappable:
      return None
    # On pages of their own, so aligned: JAX takes the mapped memory as it is, and keeps it mapped.
    data = jax.device_put(source.stored(tensor.name), self.device)
    return BlockArray(data, tensor.format, tensor.num_rows, "x16")

  def _tiles(self, tensor: Tensor) -> BlockArray:
    tiles = -(-tensor.num_rows // ROWS)
    out = aligned_empty((tiles, ROWS * tensor.row_bytes))

    def interleave(tile: int) -> None:
      end = min((tile + 1) * ROWS, tensor.num_rows)
      rows = self.source.rows(tensor.name, tile * ROWS, end)
      interleave_tile(rows, tensor.format, out[tile])

    step = max(1, _CHUNK_BYTES // out.shape[1])
    for first in range(0, tiles, step):
      # Threads help: the copying is in C, which lets go of the interpreter.
      list(self.threads.map(interleave, range(first, min(first + step, tiles))))
      self.source.release(tensor.name)
    return BlockArray(jax.device_put(out, self.device), tensor.format, tensor.num_rows, "x16")


def aligned_empty(shape: tuple[int, ...], alignment: int = 64) -> np.ndarray:
  """An uninitialised uint8 array that JAX's CPU backend takes without a copy (64-byte aligned)."""
  size = int(np.prod(shape))
  raw = np.empty(size + alignment, np.uint8)
  offset = -raw.ctypes.data % alignment
  return raw[offset : offset + size].reshape(shape)
