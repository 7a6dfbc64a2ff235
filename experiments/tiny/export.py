r"""Writes the trained `tiny` as GGUF: the float16 twin and the Q4_K_M file that is package data.

  python -m experiments.tiny.export --checkpoint=runs/tiny --out=runs/tiny

Needs 30 seconds on one core. Writes tiny.f16.gguf (24 MB) and tiny.Q4_K_M.gguf (under 8 MB) from
tiny-f16.part*.npz, tokenizer.json and corpus.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from numpy.typing import NDArray
from tokenizers import Tokenizer

from experiments.tiny import checkpoint, tokenizer
from q4jax.config import LlamaConfig
from q4jax.formats.checkpoint import Tensor
from q4jax.formats.gguf_sink import GGUFSink
from q4jax.quant import kquants

MAX_BYTES = 8_000_000
_F16, _Q4_K_M = 1, 15  # llama.h: enum llama_ftype.
Array = NDArray[Any]


def q4_k_m_format(name: str, layers: int) -> str:
  """The format that llama.cpp's Q4_K_M mix gives a matrix of a model with tied embeddings."""
  if not name.startswith("blk."):
    return "q6_k"
  _, index, kind, _ = name.split(".")
  i, eighth = int(index), layers // 8
  more_bits = i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2
  return "q6_k" if kind in ("attn_v", "ffn_down") and more_bits else "q4_k"


def export(
  path: Path,
  params: Mapping[str, Array],
  config: LlamaConfig,
  vocabulary: tokenizer.GGUFVocabulary,
  quantized: bool,
  about: Mapping[str, str],
) -> None:
  """Writes one GGUF file.

  Args:
    params: by GGUF name, half-split RoPE, as `checkpoint.load` gives them.
    quantized: Q4_K_M; else matrices stay float16.
    about: general.* strings by key, and the training record.
  """
  formats = {name: _format(name, value, config, quantized) for name, value in params.items()}
  tensors = [Tensor(name, value.shape, formats[name]) for name, value in params.items()]
  metadata = {
    "general.architecture": config.architecture,
    **about,
    "general.file_type": _Q4_K_M if quantized else _F16,
    "general.quantization_version": 2,  # ggml.h: GGML_QNT_VERSION
    **_config(config),
    **_vocabulary(vocabulary),
  }
  with GGUFSink(path, config, metadata, tensors) as sink:
    for tensor in tensors:
      sink.write(tensor, _rows(params[tensor.name], tensor.format))


def _format(name: str, value: Array, config: LlamaConfig, quantized: bool) -> str:
  if value.ndim == 1:
    return "f32"
  return q4_k_m_format(name, config.num_layers) if quantized else "f16"


def _rows(value: Array, format: str) -> NDArray[np.uint8]:
  """The rows of a parameter in one of the formats above."""
  if format not in ("f32", "f16"):
    return kquants.quantize(value.astype(np.float32), format)
  floats = np.ascontiguousarray(value, np.float32 if format == "f32" else np.float16)
  return np.atleast_2d(floats).view(np.uint8)


def _config(config: LlamaConfig) -> dict[str, Any]:
  values = {
    "vocab_size": config.vocab_size,
    "context_length": config.context_length,
    "embedding_length": config.d_model,
    "block_count": config.num_layers,
    "feed_forward_length": config.d_ffn,
    "attention.head_count": config.num_heads,
    "attention.head_count_kv": config.num_kv_heads,
    "attention.key_length": config.head_dim,
    "attention.value_length": config.head_dim,
    "rope.dimension_count": config.head_dim,
    "rope.freq_base": float(config.rope_theta),
    "attention.layer_norm_rms_epsilon": config.norm_eps,
  }
  return {f"{config.architecture}.{key}": value for key, value in values.items()}


def _vocabulary(vocabulary: tokenizer.GGUFVocabulary) -> dict[str, Any]:
  values = {
    "model": "gpt2",
    "pre": tokenizer.PRE,
    "tokens": vocabulary.tokens,
    "token_type": vocabulary.types,
    "merges": vocabulary.merges,
    "bos_token_id": tokenizer.BOS_ID,
    "eos_token_id": tokenizer.EOS_ID,
    "add_bos_token": True,
    "add_eos_token": False,
  }
  return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def about(record: Mapping[str, Any], corpus: Mapping[str, Any], quantized: bool) -> dict[str, str]:
  """The general.* strings of the file."""
  sources = ", ".join(f"{name} {s['version']}" for name, s in corpus["sources"].items())
  return {
    "general.type": "model",
    "general.name": f"q4jax tiny {'Q4_K_M' if quantized else 'f16'}",
    "general.basename": "tiny",
    "general.description": (
      "A base language model of Python documentation, trained from scratch by q4jax on the "
      f"language reference and on the docstrings and comments of: {sources}."
    ),
    "general.license": "apache-2.0",
    "general.quantized_by": "q4jax",
    "q4jax.training": json.dumps(record),
  }


def run(source: Path, data: Path, out: Path) -> dict[str, int]:
  """Writes both files. Returns their sizes in bytes by name."""
  params, config, record = checkpoint.load(source)
  corpus = json.loads((data / "corpus.json").read_text())
  vocabulary = tokenizer.gguf_vocabulary(Tokenizer.from_file(str(data / "tokenizer.json")))
  sizes = {}
  for name, quantized in (("tiny.f16.gguf", False), ("tiny.Q4_K_M.gguf", True)):
    text = about(record, corpus, quantized)
    export(out / name, params, config, vocabulary, quantized, text)
    sizes[name] = (out / name).stat().st_size
  return sizes


def _define_flags() -> None:
  flags.DEFINE_string("checkpoint", "runs/tiny", "Folder of the trained checkpoint.")
  flags.DEFINE_string("data", "runs/tiny", "Folder of tokenizer.json and corpus.json.")
  flags.DEFINE_string("out", "runs/tiny", "Folder to write to.")


def main(_: list[str]) -> None:
  f = flags.FLAGS
  sizes = run(Path(f.checkpoint), Path(f.data), Path(f.out))
  print(json.dumps(sizes))
  if sizes["tiny.Q4_K_M.gguf"] > MAX_BYTES:
    raise SystemExit(f"tiny.Q4_K_M.gguf is over {MAX_BYTES} bytes: choose a smaller model.")


if __name__ == "__main__":
  _define_flags()  # Not where it is imported: other scripts that export have an --out too.
  app.run(main)
