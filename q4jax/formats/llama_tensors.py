"""The tensors of a Llama (Qwen 2 / 3) by their names in GGUF and in Hugging Face's checkpoints."""

from q4jax.config import LlamaConfig

_WHOLE = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_MODULES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
  """GGUF's name and the shape of each tensor, in the order of layers; matrices are (N, K)."""
  d, q, kv = (
    config.d_model,
    config.num_heads * config.head_dim,
    config.num_kv_heads * config.head_dim,
  )
  layer: dict[str, tuple[int, ...]] = {
    "attn_norm.weight": (d,),
    "attn_q.weight": (q, d),
    "attn_k.weight": (kv, d),
    "attn_v.weight": (kv, d),
    "attn_output.weight": (d, q),
    "ffn_norm.weight": (d,),
    "ffn_gate.weight": (config.d_ffn, d),
    "ffn_up.weight": (config.d_ffn, d),
    "ffn_down.weight": (d, config.d_ffn),
  }
  if config.qkv_bias:
    layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
  if config.qk_norm:
    layer |= {f"attn_{x}_norm.weight": (config.head_dim,) for x in "qk"}
  shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, d)}
  if config.rope_factors:
    shapes["rope_freqs.weight"] = (config.head_dim // 2,)
  for i in range(config.num_layers):
    shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
  shapes["output_norm.weight"] = (d,)
  return shapes if config.tied else shapes | {"output.weight": (config.vocab_size, d)}


def hf_name(name: str) -> str:
  """What Hugging Face's checkpoints call the tensor with this name in GGUF."""
  if not name.startswith("blk."):
    return _WHOLE[name]
  _, layer, module, kind = name.split(".")
  return f"model.layers.{layer}.{_MODULES[module]}.{kind}"
