"""Writes Hugging Face model folders with the safetensors library and a config.json by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models

from oracles.models import Spec, weights
from shared_data import shared

CLASSES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}
_MODULES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_WHOLE = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def config(spec: Spec, **changes: Any) -> dict[str, Any]:
  """A config.json as transformers 4 writes it."""
  scaling = None
  if spec.rope_scaling:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = {"rope_type": "llama3", **dict(zip(names, spec.rope_scaling, strict=True))}
  return {
    "architectures": [CLASSES[spec.architecture]],
    "model_type": spec.architecture,
    "hidden_act": "silu",
    "hidden_size": spec.d_model,
    "intermediate_size": spec.d_ffn,
    "num_hidden_layers": spec.layers,
    "num_attention_heads": spec.heads,
    "num_key_value_heads": spec.kv_heads,
    "head_dim": spec.head_dim,
    "max_position_embeddings": spec.context,
    "rms_norm_eps": spec.norm_eps,
    "rope_theta": spec.theta,
    "rope_scaling": scaling,
    "tie_word_embeddings": spec.tied,
    "torch_dtype": "float32",
    "vocab_size": spec.vocab,
  } | changes


def hf_name(name: str) -> str:
  if name in _WHOLE:
    return _WHOLE[name]
  _, layer, module, kind = name.split(".")
  return f"model.layers.{layer}.{_MODULES[module]}.{kind}"


def tensors(spec: Spec, dtype: str = "F32") -> dict[str, np.ndarray]:
  """`weights(spec)` by Hugging Face's names."""
  found = {n: w.astype(DTYPES[dtype]) for n, w in weights(spec).items() if n != "rope_freqs.weight"}
  return {hf_name(name): value for name, value in found.items()}


def write(
  folder: Path,
  config: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  shards: int = 1,
) -> Path:
  """Writes the folder; in several shards, tensor i in shard i modulo their number."""
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  if shards == 1:
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
  files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
  weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
  for file in files:
    part = {name: value for name, value in tensors.items() if weight_map[name] == file}
    save_file(part, folder / file, metadata={"format": "pt"})
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder


def llama2_tokenizer() -> tuple[tokenizers.Tokenizer, list[float]]:
  """Llama 2's real vocabulary as its tokenizer.json has it, and the scores of its pieces.

  The merges are derived from the scores as transformers' converter does.
  """
  from sentencepiece import SentencePieceProcessor

  model = SentencePieceProcessor(model_file=str(shared("tokenizers/tokenizer.model")))
  size = model.get_piece_size()
  vocabulary = {model.id_to_piece(id): id for id in range(size)}
  scores = [model.get_score(id) for id in range(size)]
  merges = []
  for piece, id in vocabulary.items():
    local = [
      (piece[:cut], piece[cut:], scores[id])
      for cut in range(1, len(piece))
      if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges += sorted(local, key=lambda m: (vocabulary[m[0]], vocabulary[m[1]]))
  merges.sort(key=lambda m: m[2], reverse=True)
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocabulary, [m[:2] for m in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
  )
  tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
  return tokenizer, scores
