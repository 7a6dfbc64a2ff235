"""Hugging Face's config.json as GGUF metadata: the same model in the other's words.

What would change the computation and is not known here is refused by its name.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4jax.errors import FormatError

# The architecture that GGUF calls each class's.
CLASSES = {
  "LlamaForCausalLM": "llama",
  "MistralForCausalLM": "llama",
  "Qwen2ForCausalLM": "qwen2",
  "Qwen3ForCausalLM": "qwen3",
}


class HFConfig:
  """A config.json that has been checked.

  Attributes:
    metadata: GGUF's keys of the architecture; numbers of float32 where GGUF has these.
    tied: the output projection is the embedding table.
    vocab_size: rows of the embedding table; often more than the tokenizer has tokens.
    rope_factors: float32[head_dim / 2], what `rope_freqs.weight` holds of Llama 3's scaling; None
      without it.

  Raises:
    FormatError: a class, a scaling or a feature that q4jax does not run, a value of a wrong type,
      or one that is missing.
  """

  def __init__(self, document: Mapping[str, Any], path: Path):
    self._document, self._path = document, path
    self._refuse_unsupported()
    arch = self._architecture()
    self.vocab_size = self._int("vocab_size")
    self.tied = bool(document.get("tie_word_embeddings", False))
    rope = self._rope()
    heads = self._int("num_attention_heads")
    head_dim = self._int("head_dim", default=self._int("hidden_size") // heads)
    # Llama's default is one KV head a query head; those of other classes are of other sizes.
    like_llama = document["architectures"] == ["LlamaForCausalLM"]
    kv_heads = self._int("num_key_value_heads", heads if like_llama else None)
    theta = self._float("rope_theta", rope.get("rope_theta", 10_000.0))
    self.metadata: dict[str, Any] = {
      "general.architecture": arch,
      f"{arch}.vocab_size": self.vocab_size,
      f"{arch}.context_length": self._int("max_position_embeddings"),
      f"{arch}.embedding_length": self._int("hidden_size"),
      f"{arch}.block_count": self._int("num_hidden_layers"),
      f"{arch}.feed_forward_length": self._int("intermediate_size"),
      f"{arch}.attention.head_count": heads,
      f"{arch}.attention.head_count_kv": kv_heads,
      f"{arch}.attention.key_length": head_dim,
      f"{arch}.attention.value_length": head_dim,
      f"{arch}.attention.layer_norm_rms_epsilon": self._float("rms_norm_eps", 1e-6),
      f"{arch}.rope.dimension_count": head_dim,
      f"{arch}.rope.freq_base": theta,
    }
    self.rope_factors = None
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
      self.metadata[f"{arch}.rope.scaling.type"] = "linear"
      self.metadata[f"{arch}.rope.scaling.factor"] = self._float("factor", section=rope)
    elif kind == "llama3":
      self.rope_factors = self._llama3_factors(rope, theta, head_dim)
    elif kind != "default":
      raise self._error(
        f"rope_scaling is of type {kind!r:.80}; q4jax runs 'default', 'linear' and 'llama3'."
      )
    window = self._window()
    if window is not None:
      self.metadata[f"{arch}.attention.sliding_window"] = window

  def _architecture(self) -> str:
    classes = self._document.get("architectures")
    name = classes[0] if isinstance(classes, list) and len(classes) == 1 else classes
    if not isinstance(name, str) or name not in CLASSES:
      raise self._error(f"architectures is {classes!r:.200}; q4jax runs {', '.join(CLASSES)}.")
    return CLASSES[name]

  def _refuse_unsupported(self) -> None:
    quantized = self._document.get("quantization_config")
    if quantized is not None:
      method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
      raise self._error(
        f"quantization_config says {method!r:.80}: the weights are quantised already, in a way "
        "that q4jax does not read. Use the model's float weights, or a GGUF file."
      )
    expected = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "mlp_bias": False}
    for key, value in expected.items():
      if self._document.get(key, value) != value:
        raise self._error(f"{key} is {self._document[key]!r:.80}; q4jax runs only {value!r}.")

  def _rope(self) -> Mapping[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_scaling`; empty without scaling."""
    for key in ("rope_parameters", "rope_scaling"):
      rope = self._document.get(key)
      if isinstance(rope, Mapping):
        return rope
      if rope is not None:
        raise self._error(f"{key} is {rope!r:.80}; expected an object or null.")
    return {}

  def _window(self) -> int | None:
    """Mistral uses the window that is given, Qwen only with `use_sliding_window`."""
    qwen = "use_sliding_window" in self._document
    used = self._document["use_sliding_window"] if qwen else True
    given = self._document.get("sliding_window") is not None
    return self._int("sliding_window") if used and given else None

  def _llama3_factors(
    self, rope: Mapping[str, Any], theta: float, head_dim: int
  ) -> NDArray[np.float32]:
    """What the rotary frequencies are divided by (Llama 3.1; transformers' `llama3` scaling).

    A frequency that turns fewer than low_freq_factor times in the original context is divided by
    `factor`, one that turns more than high_freq_factor times stays, and those between are mixed.
    """
    factor, low, high = (
      self._float(key, section=rope) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    original = self._int("original_max_position_embeddings", section=rope)
    if not low < high:
      raise self._error(f"low_freq_factor {low} is not below high_freq_factor {high}.")
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = original * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)  # Of the unscaled frequency.
    return (1 / ((1 - share) / factor + share)).astype(np.float32)

  def _int(
    self, key: str, default: int | None = None, section: Mapping[str, Any] | None = None
  ) -> int:
    value = self._value(key, default, section)
    if type(value) is not int or not 0 < value < 2**31:
      raise self._error(f"{key} is {value!r:.80}; expected an integer from 1 to {2**31 - 1}.")
    return value

  def _float(
    self, key: str, default: float | None = None, section: Mapping[str, Any] | None = None
  ) -> float:
    value = self._value(key, default, section)
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 < value < 1e38:
      raise self._error(f"{key} is {value!r:.80}; expected a positive number.")
    return float(np.float32(value))

  def _value(self, key: str, default: Any, section: Mapping[str, Any] | None) -> Any:
    value = (self._document if section is None else section).get(key)
    if value is None and default is None:
      raise self._error(f"{key} is missing.")
    return default if value is None else value

  def _error(self, what: str) -> FormatError:
    return FormatError(f"{self._path}: {what}")
