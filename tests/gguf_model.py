"""Writes complete GGUF models: any mix of types, any shape of a Llama or Qwen, split or whole.

Matrices are random blocks of their type, vectors random floats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import random_blocks

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class ModelSpec:
  """One model.

  Attributes:
    type: of a matrix by its GGUF name; one type for all, or a function.
    rope_factors: the `rope_freqs.weight` to write, of head_dim / 2.
    bias, qk_norm: whether to write these vectors; by default as the architecture has them.
    vocabulary: "spm" or "bpe".
    keys: metadata added, or put in place of what is written otherwise.
  """

  architecture: str = "llama"
  d_model: int = 64
  d_ffn: int = 96
  layers: int = 2
  heads: int = 4
  kv_heads: int = 2
  head_dim: int = 16
  vocab: int = 293
  tied: bool = True
  type: str | Callable[[str], str] = "f32"
  rope_factors: tuple[float, ...] | None = None
  bias: bool | None = None
  qk_norm: bool | None = None
  vocabulary: str = "spm"
  keys: Mapping[str, Any] = field(default_factory=dict)
  seed: int = 0

  def type_of(self, name: str) -> str:
    return self.type if isinstance(self.type, str) else self.type(name)


def vectors_and_matrices(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
  """Shapes by GGUF name; matrices are (outputs, inputs)."""
  d, q, kv = spec.d_model, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
  shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (spec.vocab, d)}
  if spec.rope_factors is not None:
    shapes["rope_freqs.weight"] = (len(spec.rope_factors),)
  for i in range(spec.layers):
    layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (d,), "ffn_norm.weight": (d,)}
    layer |= {"attn_q.weight": (q, d), "attn_k.weight": (kv, d), "attn_v.weight": (kv, d)}
    layer |= {"attn_output.weight": (d, q), "ffn_down.weight": (d, spec.d_ffn)}
    layer |= {"ffn_gate.weight": (spec.d_ffn, d), "ffn_up.weight": (spec.d_ffn, d)}
    if spec.bias if spec.bias is not None else spec.architecture == "qwen2":
      layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if spec.qk_norm if spec.qk_norm is not None else spec.architecture == "qwen3":
      layer |= {f"attn_{x}_norm.weight": (spec.head_dim,) for x in "qk"}
    shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
  shapes["output_norm.weight"] = (d,)
  return shapes if spec.tied else shapes | {"output.weight": (spec.vocab, d)}


def matrix(rng: np.random.Generator, type: str, n: int, k: int) -> np.ndarray:
  """uint8[n, row_bytes] of random blocks whose weights have a mean square of 1 / k."""
  seed, few = rng.integers(2**32), min(n, 64)
  trial = random_blocks.random_rows(np.random.default_rng(seed), type, few, k, scale=0.01)
  size = np.sqrt(np.square(random_blocks.dequantize(trial, type), dtype=np.float64).mean())
  scale = 0.01 / size / np.sqrt(k)
  return random_blocks.random_rows(np.random.default_rng(seed), type, n, k, scale=scale)


def write(path: Path, spec: ModelSpec, max_tensors: int = 0) -> Path:
  """Writes the model; with `max_tensors`, as shards of so many. The file to open."""
  writer = gguf.GGUFWriter(path, spec.architecture, split_max_tensors=max_tensors)
  for key, value in {**_keys(spec), **_vocabulary(spec), **spec.keys}.items():
    writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
  rng = np.random.default_rng(spec.seed)
  for name, shape in vectors_and_matrices(spec).items():
    if name == "rope_freqs.weight":
      writer.add_tensor(name, np.array(spec.rope_factors, np.float32))
    elif len(shape) == 1:
      around = 0.0 if name.endswith("bias") else 1.0
      writer.add_tensor(name, rng.normal(around, 0.2, shape).astype(np.float32))
    else:
      type = spec.type_of(name)
      writer.add_tensor(name, matrix(rng, type, *shape), raw_dtype=random_blocks.ggml_type(type))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return next(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if max_tensors else path


def _keys(spec: ModelSpec) -> dict[str, Any]:
  values = {
    "block_count": spec.layers,
    "context_length": 256,
    "embedding_length": spec.d_model,
    "feed_forward_length": spec.d_ffn,
    "attention.head_count": spec.heads,
    "attention.head_count_kv": spec.kv_heads,
    "attention.key_length": spec.head_dim,
    "attention.value_length": spec.head_dim,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10_000.0,
  }
  return {f"{spec.architecture}.{key}": value for key, value in values.items()}


def _vocabulary(spec: ModelSpec) -> dict[str, Any]:
  if spec.vocabulary == "spm":
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *LETTERS]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 27]
    model = {"tokenizer.ggml.model": "llama"}
  else:
    tokens = [*_byte_letters(), *(f"{a}{b}" for a, b in pairwise(LETTERS))]
    kinds = [1] * len(tokens)
    merges = [f"{a} {b}" for a, b in pairwise(LETTERS)]
    model = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}
    model |= {"tokenizer.ggml.merges": merges}  # type: ignore[dict-item]
  spare = spec.vocab - len(tokens)
  assert spare >= 0, f"vocab={spec.vocab} is less than the {len(tokens)} tokens of the stand-in"
  return {
    **model,
    "tokenizer.ggml.tokens": tokens + [f"<spare {i}>" for i in range(spare)],
    "tokenizer.ggml.scores": [-float(i) for i in range(spec.vocab)],
    "tokenizer.ggml.token_type": kinds + [1] * spare,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
  }


def _byte_letters() -> list[str]:
  """The 256 printable letters that stand for bytes in GPT-2's vocabularies."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [b for b in range(256) if b not in plain]
  return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


def large(mib: int) -> ModelSpec:
  """A model of about this size in Q4_K, six equal matrices nearly all of it."""
  row_bytes = 1024 // 256 * 144
  return ModelSpec(
    d_model=1024,
    d_ffn=mib * 2**20 // 6 // row_bytes // 256 * 256,
    heads=8,
    kv_heads=2,
    head_dim=128,
    type="q4_k",
  )
