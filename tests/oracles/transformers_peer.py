"""Hugging Face transformers on the float models of `models.py`: their logits in float32.

Needs torch and transformers (`make oracles` installs them).
"""

import numpy as np
import torch
import transformers

from oracles.models import Spec, weights

VERSION = f"transformers {transformers.__version__}, torch {torch.__version__}"

_CLASSES = {
  "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
  "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
  "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
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


def logits(spec: Spec, tokens: np.ndarray) -> np.ndarray:
  """int[T] -> float32[T, V] of the transformers model with `models.weights(spec)`."""
  config_class, model_class = _CLASSES[spec.architecture]
  model = model_class(config_class(**_config(spec))).float().eval()
  state = {_hf_name(name): torch.from_numpy(w) for name, w in weights(spec).items()}
  # The rotary factors are derived from the config, as a user of transformers gets them.
  state.pop("rope_freqs.weight", None)
  missing, unexpected = model.load_state_dict(state, strict=False)
  assert not unexpected, unexpected
  assert missing == (["lm_head.weight"] if spec.tied else []), missing
  model.tie_weights()
  with torch.no_grad():
    return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()


def _config(spec: Spec) -> dict:
  rope: dict[str, object] = {"rope_type": "default", "rope_theta": spec.theta}
  if spec.rope_scaling:
    factor, low, high, original = spec.rope_scaling
    rope |= {
      "rope_type": "llama3",
      "factor": factor,
      "low_freq_factor": low,
      "high_freq_factor": high,
      "original_max_position_embeddings": original,
    }
  return {
    "vocab_size": spec.vocab,
    "hidden_size": spec.d_model,
    "intermediate_size": spec.d_ffn,
    "num_hidden_layers": spec.layers,
    "num_attention_heads": spec.heads,
    "num_key_value_heads": spec.kv_heads,
    "head_dim": spec.head_dim,
    "max_position_embeddings": spec.context,
    "rms_norm_eps": spec.norm_eps,
    "tie_word_embeddings": spec.tied,
    "rope_parameters": rope,
    "attn_implementation": "eager",
  }


def _hf_name(name: str) -> str:
  whole = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
  }
  if not name.startswith("blk."):
    return whole.get(name, name)
  _, layer, module, kind = name.split(".")
  return f"model.layers.{layer}.{_MODULES[module]}.{kind}"
