"""GGUF files made part by part, so that any part can be made to lie, and a good one to change."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import gguf
import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_NUMBERS = (U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64)
_PACK = dict(zip(_NUMBERS, "BbHhIifBQqd", strict=True))
TYPES = gguf.GGMLQuantizationType
Stage = Literal["open", "load"]
MAIN = "model.gguf"


def u32(value: int) -> bytes:
  return struct.pack("<I", value)


def u64(value: int) -> bytes:
  return struct.pack("<Q", value)


def string(text: str | bytes, length: int | None = None) -> bytes:
  data = text.encode() if isinstance(text, str) else text
  return u64(len(data) if length is None else length) + data


@dataclass(frozen=True)
class Value:
  """A key's value as it lies in the file, after its type."""

  type: int
  data: bytes


def scalar(type: int, value: float) -> Value:
  return Value(type, struct.pack("<" + _PACK[type], value))


def text(value: str | bytes, length: int | None = None) -> Value:
  return Value(STRING, string(value, length))


def array(type: int, values: list, length: int | None = None) -> Value:
  count = len(values) if length is None else length
  pack = string if type == STRING else lambda value: struct.pack("<" + _PACK[type], value)
  return Value(ARRAY, u32(type) + u64(count) + b"".join(map(pack, values)))


@dataclass(frozen=True)
class Tensor:
  name: str | bytes
  ne: tuple[int, ...]
  type: int
  data: bytes
  offset: int | None = None  # None: after the tensor before it.
  num_dims: int | None = None
  name_length: int | None = None


@dataclass(frozen=True)
class Gguf:
  """A GGUF file in parts, any of which may lie."""

  keys: tuple[tuple[str | bytes, Value], ...]
  tensors: tuple[Tensor, ...]
  magic: bytes = b"GGUF"
  version: int = 3
  num_tensors: int | None = None
  num_keys: int | None = None
  alignment: int = 32

  def parts(self) -> list[tuple[str, bytes]]:
    """The file as labelled pieces, in order."""
    num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
    num_keys = len(self.keys) if self.num_keys is None else self.num_keys
    parts = [("magic", self.magic), ("version", u32(self.version))]
    parts += [("tensor count", u64(num_tensors)), ("key count", u64(num_keys))]
    for name, value in self.keys:
      parts += [("key", string(name)), ("value type", u32(value.type))]
      kind = {STRING: "string", ARRAY: "array"}.get(value.type, "scalar")
      parts.append((kind, value.data))
    end = 0
    data = []
    for tensor in self.tensors:
      offset = end if tensor.offset is None else tensor.offset
      num_dims = len(tensor.ne) if tensor.num_dims is None else tensor.num_dims
      parts += [("tensor name", string(tensor.name, tensor.name_length))]
      parts += [("dimensions", u32(num_dims)), ("ne", b"".join(map(u64, tensor.ne)))]
      parts += [("tensor type", u32(tensor.type)), ("offset", u64(offset))]
      padding = bytes(-len(tensor.data) % self.alignment)
      data.append(("tensor data", tensor.data + padding))
      end += len(tensor.data) + len(padding)
    header = sum(len(part) for _, part in parts)
    return [*parts, ("padding", bytes(-header % self.alignment)), *data]

  def encode(self) -> bytes:
    return b"".join(part for _, part in self.parts())

  def with_key(self, name: str | bytes, value: Value | None) -> "Gguf":
    """The same file with a key's value changed, or the key added at the end, or removed."""
    keys = tuple((k, value if k == name else v) for k, v in self.keys)
    if name not in dict(self.keys):
      keys += ((name, value),)
    return replace(self, keys=tuple((k, v) for k, v in keys if v is not None))

  def with_tensor(self, index: int, **changes: object) -> "Gguf":
    changed = replace(self.tensors[index], **changes)  # type: ignore[arg-type]
    before, after = self.tensors[:index], self.tensors[index:][1:]
    return replace(self, tensors=(*before, changed, *after))


def good() -> Gguf:
  """A loadable Llama: one layer, two heads, mixed types, SPM vocabulary with all bytes."""
  rng = np.random.default_rng(0)
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
  pieces += ["▁", *(chr(ord("a") + i) for i in range(26)), "▁a", "▁the", "th"]
  types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259)
  scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)]
  dim, ffn, heads = 32, 64, 2

  def tensor(name: str, *shape: int, type: TYPES = TYPES.F32) -> Tensor:
    weights = rng.normal(0, 0.1, shape).astype(np.float32)
    return Tensor(name, shape[::-1], int(type), gguf.quantize(weights, type).tobytes())

  keys = [
    ("general.architecture", text("llama")),
    ("general.name", text("good")),
    ("llama.block_count", scalar(U32, 1)),
    ("llama.context_length", scalar(U32, 64)),
    ("llama.embedding_length", scalar(U32, dim)),
    ("llama.feed_forward_length", scalar(U32, ffn)),
    ("llama.attention.head_count", scalar(U32, heads)),
    ("llama.attention.head_count_kv", scalar(U32, 1)),
    ("llama.attention.layer_norm_rms_epsilon", scalar(F32, 1e-5)),
    ("llama.rope.freq_base", scalar(F32, 10000.0)),
    ("tokenizer.ggml.model", text("llama")),
    ("tokenizer.ggml.tokens", array(STRING, pieces)),
    ("tokenizer.ggml.scores", array(F32, scores)),
    ("tokenizer.ggml.token_type", array(I32, types)),
    ("tokenizer.ggml.bos_token_id", scalar(U32, 1)),
    ("tokenizer.ggml.eos_token_id", scalar(U32, 2)),
    ("tokenizer.ggml.add_bos_token", scalar(BOOL, 1)),
  ]
  tensors = [
    tensor("token_embd.weight", len(pieces), dim, type=TYPES.Q8_0),
    tensor("blk.0.attn_norm.weight", dim),
    tensor("blk.0.attn_q.weight", dim, dim, type=TYPES.Q4_0),
    tensor("blk.0.attn_k.weight", dim // 2, dim, type=TYPES.Q4_0),
    tensor("blk.0.attn_v.weight", dim // 2, dim, type=TYPES.Q5_1),
    tensor("blk.0.attn_output.weight", dim, dim, type=TYPES.Q4_1),
    tensor("blk.0.ffn_norm.weight", dim),
    tensor("blk.0.ffn_gate.weight", ffn, dim, type=TYPES.F16),
    tensor("blk.0.ffn_up.weight", ffn, dim, type=TYPES.BF16),
    tensor("blk.0.ffn_down.weight", dim, ffn, type=TYPES.Q5_0),
    tensor("output_norm.weight", dim),
  ]
  return Gguf(tuple(keys), tuple(tensors))


@dataclass(frozen=True)
class Case:
  """Files that must be refused.

  Attributes:
    files: by name; the first is the one to open.
    says: a text that the error contains.
    stage: who must refuse: "open" the reader, "load" the config, the tokenizer or the loader.
  """

  files: dict[str, bytes]
  says: str
  stage: Stage = "open"

  def write(self, directory: Path) -> Path:
    """Writes the files; the path of the one to open."""
    directory.mkdir(parents=True)
    for name, data in self.files.items():
      (directory / name).write_bytes(data)
    return directory / next(iter(self.files))


Cases = Iterator[tuple[str, Case]]


def one_file(data: "Gguf | bytes", says: str, stage: Stage = "open") -> Case:
  return Case({MAIN: data.encode() if isinstance(data, Gguf) else data}, says, stage)
