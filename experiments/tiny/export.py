r"""Writes the trained `tiny` as GGUF: the float16 twin and the Q4_K_M file that is package data.

  python -m experiments.tiny.export --checkpoint=runs/tiny --out=runs/tiny

Needs 30 seconds on one core. Writes tiny.f16.gguf (24 MB) and tiny.Q4_K_M.gguf (under 8 MB) from
tiny-f16.part*.npz, tokenizer.json and corpus.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from absl import app, flags
from numpy.typing import NDArray
from tokenizers import Tokenizer

from experiments.tiny import checkpoint, tokenizer
from q4jax.config import LlamaConfig
from q4jax.quant import kquants

MAX_BYTES = 8_000_000
Array = NDArray[Any]


def interleave(rows: Array, head_dim: int) -> Array:
  """Rows of Q or K from half-split RoPE to the interleaved order of arch `llama` in GGUF.

  In each head, row 2i of the result is row i, and row 2i + 1 is row i + head_dim / 2.
  """
  split = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
  return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


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
  writer = gguf.GGUFWriter(path, config.architecture)
  for key, text in about.items():
    writer.add_string(key, text)
  kind = gguf.LlamaFileType.MOSTLY_Q4_K_M if quantized else gguf.LlamaFileType.MOSTLY_F16
  writer.add_file_type(kind)
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  _add_config(writer, config)
  _add_vocabulary(writer, vocabulary)
  for name, value in params.items():
    if name.endswith(("attn_q.weight", "attn_k.weight")):
      value = interleave(value, config.head_dim)
    if value.ndim == 1:
      writer.add_tensor(name, value.astype(np.float32))
    elif quantized:
      format = q4_k_m_format(name, config.num_layers)
      blocks = kquants.quantize(value.astype(np.float32), format)
      writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[format.upper()])
    else:
      writer.add_tensor(name, value.astype(np.float16))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _add_config(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
  writer.add_vocab_size(config.vocab_size)
  writer.add_context_length(config.context_length)
  writer.add_embedding_length(config.d_model)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(config.d_ffn)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_layer_norm_rms_eps(config.norm_eps)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: tokenizer.GGUFVocabulary) -> None:
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(tokenizer.PRE)
  writer.add_token_list(vocabulary.tokens)
  writer.add_token_types(vocabulary.types)
  writer.add_token_merges(vocabulary.merges)
  writer.add_bos_token_id(tokenizer.BOS_ID)
  writer.add_eos_token_id(tokenizer.EOS_ID)
  writer.add_add_bos_token(True)
  writer.add_add_eos_token(False)


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
