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

from q4jax import config as config_lib
from q4jax.config import INTERLEAVED_ARCHITECTURES, LlamaConfig
from q4jax.errors import ConfigError, FormatError, TokenizerError
from q4jax.formats.gguf import GGUFFile
from q4jax.formats.gguf_types import TensorInfo
from q4jax.formats.hub import resolve
from q4jax.model.layers import Matmul, Quantized, Weight
from q4jax.model.llama import Llama
from q4jax.model.model import Model
from q4jax.text.tokenizer import Tokenizer
from q4jax_kernels import ffi
from q4jax_kernels.block_array import ROWS, BlockArray, dequantize_blocks, interleave_tile
from q4jax_kernels.int4_matmul import dispatch
from q4jax_kernels.int4_matmul.prepare import layout_for, prepared

_FLOATS = ("f32", "f16", "bf16")
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
  """Loads a Llama (or Qwen 2 / 3) from a GGUF file.

  Every tensor keeps the type the file gives it; quantised matrices stay quantised (`BlockArray`).
  Memory: the model's size plus at most one tensor and 64 MiB while loading.

  Args:
    model: a path to a .gguf file (any shard of a split one), the alias `tiny` (the model that comes
      with q4jax), or `hf://org/repo/file.gguf`, downloaded once and cached.
    tokenizer: a `tokenizer.json` to use instead of the file's own vocabulary.
    device: where the weights go; the default device if None.
    implementation: of the int4 matmul, by name (`q4jax_kernels.int4_matmul.IMPLEMENTATIONS`): it
      then multiplies with every quantised matrix, whatever it costs. None takes the best.
    progress: see `Progress`.

  Raises:
    q4jax.Q4JaxError: the model cannot be found, read, or run; the message says what to do.
  """
  path = resolve(str(model))
  device = device or jax.local_devices()[0]
  with GGUFFile.open(path) as file:
    config = config_lib.from_gguf(file.metadata, frozenset(file.tensors), str(path))
    text = _tokenizer(file.metadata, tokenizer, path)
    source = _Weights(file, config, str(path), device, implementation, progress)
    module = Llama(config, source.make, Matmul(_matmul_dtype(device), implementation))
    source.check_all_used()
    metadata = {k: v for k, v in file.metadata.items() if not k.startswith("tokenizer.ggml.")}
  return Model(module, text, metadata, str(path))


def _tokenizer(metadata: Mapping[str, Any], external: str | Path | None, path: Path) -> Tokenizer:
  if external is not None:
    return Tokenizer.from_tokenizer_json(external)
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
    file: GGUFFile,
    config: LlamaConfig,
    path: str,
    device: jax.Device,
    implementation: str | None,
    progress: Progress | None,
  ):
    self.file, self.config, self.path, self.device = file, config, path, device
    self.implementation = implementation
    # A CPU's tiles are made as the file is read, other layouts from whole matrices.
    tiles = device.platform == "cpu" and ffi.available()
    self.layout = "x16" if tiles else layout_for(device)
    self.progress = progress
    self.threads = ThreadPoolExecutor(os.cpu_count())
    self.used: set[str] = set()
    self.done, self.total = 0, sum(info.nbytes for info in file.tensors.values())

  def make(self, name: str, shape: tuple[int, ...]) -> Weight:
    info = self._info(name, shape)
    self.used.add(name)
    value: Weight
    if len(shape) == 1:
      value = self._vector(info)
    elif self.layout == "x16":
      value = self._tiles(info)
    else:
      value = self._rows(info)
    if self.implementation is not None and isinstance(value, Quantized):
      self._check(info, value, self.implementation)
    self.done += info.nbytes
    if self.progress:
      self.progress(self.done, self.total)
    return value

  def _check(self, info: TensorInfo, value: Quantized, implementation: str) -> None:
    try:
      dispatch.check(implementation, [value])
    except (ValueError, NotImplementedError) as error:
      raise ConfigError(
        f"implementation '{implementation}' of the int4 matmul cannot be used for '{info.name}' "
        f"({info.format}) on {self.device.platform}: {error} Leave it out to get the best."
      ) from None

  def check_all_used(self) -> None:
    unused = [n for n in self.file.tensors if n not in self.used and not _REDUNDANT.fullmatch(n)]
    if unused:
      raise FormatError(
        f"{self.path}: {len(unused)} tensor(s) are not part of a {self.config.architecture} model "
        f"as q4jax knows it, first '{unused[0]}'. Leaving them out would give wrong results; "
        "this variant of the architecture is not supported."
      )

  def _info(self, name: str, shape: Sequence[int]) -> TensorInfo:
    info = self.file.tensors.get(name)
    if info is None:
      raise FormatError(
        f"{self.path}: tensor '{name}' is missing; a {self.config.architecture} model of "
        f"{self.config.num_layers} layers needs it. The file is incomplete; download it again."
      )
    if info.shape != tuple(shape):
      raise FormatError(
        f"{self.path}: tensor '{name}' has shape {list(info.shape)}; the file's metadata asks for "
        f"{list(shape)}. The file is inconsistent; convert the model again."
      )
    return info

  def _row_order(self, info: TensorInfo) -> np.ndarray | None:
    """Which file row each row of memory is, where the file interleaves RoPE's pairs; else None."""
    heads = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", info.name)
    if heads is None or self.config.architecture not in INTERLEAVED_ARCHITECTURES:
      return None
    count = self.config.num_heads if heads[1] == "q" else self.config.num_kv_heads
    order = np.arange(count * self.config.head_dim)
    return order.reshape(count, self.config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)

  def _vector(self, info: TensorInfo) -> jax.Array:
    if info.format not in _FLOATS:
      raise FormatError(
        f"{self.path}: the vector '{info.name}' is of type {info.format}; expected a float type."
      )
    raw = self.file.read_rows(info, 0, 1).reshape(info.shape[0], -1)
    values = np.asarray(dequantize_blocks(jnp.asarray(raw), info.format)).reshape(-1)
    order = self._row_order(info)
    return jax.device_put(values if order is None else values[order], self.device)

  def _rows(self, info: TensorInfo) -> Weight:
    order = self._row_order(info)
    data = self.file.read_rows(info, 0, info.num_rows)
    if order is not None:
      data = data[order]
    if info.format in _FLOATS:
      dtype = {"f32": "float32", "f16": "float16", "bf16": jnp.bfloat16}[info.format]
      value: Weight = jax.device_put(data.view(jnp.dtype(dtype)), self.device)
    else:
      value = prepared(data, info.format, self.device, self.layout)
    jax.block_until_ready(value)
    self.file.release(info)
    return value

  def _tiles(self, info: TensorInfo) -> BlockArray:
    order = self._row_order(info)
    tiles = -(-info.num_rows // ROWS)
    out = aligned_empty((tiles, ROWS * info.row_bytes))

    def interleave(tile: int) -> None:
      begin, end = tile * ROWS, min((tile + 1) * ROWS, info.num_rows)
      if order is None:
        rows = self.file.read_rows(info, begin, end)
      else:
        rows = self.file.read_rows(info, 0, info.num_rows)[order[begin:end]]
      interleave_tile(rows, info.format, out[tile])

    step = max(1, _CHUNK_BYTES // out.shape[1])
    for first in range(0, tiles, step):
      # Threads help: the copying is in C, which lets go of the interpreter.
      list(self.threads.map(interleave, range(first, min(first + step, tiles))))
      self.file.release(info)
    return BlockArray(jax.device_put(out, self.device), info.format, info.num_rows, "x16")


def aligned_empty(shape: tuple[int, ...], alignment: int = 64) -> np.ndarray:
  """An uninitialised uint8 array that JAX's CPU backend takes without a copy (64-byte aligned)."""
  size = int(np.prod(shape))
  raw = np.empty(size + alignment, np.uint8)
  offset = -raw.ctypes.data % alignment
  return raw[offset : offset + size].reshape(shape)
