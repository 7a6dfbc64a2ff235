"""Which format each matrix of a model gets: llama.cpp's mixes by their names.

Source of the rules: llama_tensor_get_type_impl and tensor_type_fallback in llama.cpp
(src/llama-quant.cpp), for dense Llamas and Qwens.
"""

import re

from q4jax.config import LlamaConfig
from q4jax.errors import ConfigError

# By name: what most matrices get, and llama.cpp's number of the mix (general.file_type).
MIXES: dict[str, tuple[str, int]] = {
  "q4_0": ("q4_0", 2),
  "q4_1": ("q4_1", 3),
  "q8_0": ("q8_0", 7),
  "q5_0": ("q5_0", 8),
  "q5_1": ("q5_1", 9),
  "q4_k_s": ("q4_k", 14),
  "q4_k_m": ("q4_k", 15),
  "q5_k_s": ("q5_k", 16),
  "q5_k_m": ("q5_k", 17),
  "q6_k": ("q6_k", 18),
}
# What stands in for a type with blocks of 256 where rows are no multiple of it.
_NARROW = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_MATRIX = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def mix_format(
  mix: str, name: str, columns: int, config: LlamaConfig, importance: bool = False
) -> str:
  """The format of a matrix in one of MIXES.

  Args:
    name: of the tensor, as GGUF has it.
    columns: K.
    importance: whether there are importances: then Q4_0 and Q5_0 give the first layers' ffn_down a
      minimum.

  Raises:
    ConfigError: no such mix.
  """
  if mix not in MIXES:
    raise ConfigError(f"there is no type '{mix}'; choose one of {', '.join(MIXES)}.")
  chosen = _wanted(mix, name, config, importance)
  if columns % 256 and chosen in _NARROW:
    chosen = _NARROW[chosen]
  return chosen if columns % 32 == 0 else "f16"


def _wanted(mix: str, name: str, config: LlamaConfig, importance: bool) -> str:
  base = MIXES[mix][0]
  head = "token_embd.weight" if config.tied else "output.weight"
  if name == head:
    return base if mix == "q8_0" else "q6_k"
  block = _MATRIX.fullmatch(name)
  if block is None:
    return base
  layer, kind, layers = int(block[1]), block[2], config.num_layers
  eighth = layers // 8
  more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
  if kind in ("attn_v", "ffn_down") and mix in ("q4_k_m", "q5_k_m") and more:
    return "q6_k"
  # 70B: eight heads share V, so more bits for it cost little.
  if kind == "attn_v" and base == "q4_k" and _is_70b(config):
    return "q5_k"
  if mix == "q4_k_s" and layer < (4 if kind == "attn_v" else eighth):
    return "q5_k" if kind in ("attn_v", "ffn_down") else base
  if kind == "ffn_down" and mix in ("q4_0", "q5_0") and importance and layer < eighth:
    return {"q4_0": "q4_1", "q5_0": "q5_1"}[mix]
  return base


def _is_70b(config: LlamaConfig) -> bool:
  return config.num_layers == 80 and config.num_heads != config.num_kv_heads
