"""What fixes a Llama's computation: dimensions and constants, read from a GGUF's metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from q4jax.errors import FormatError

# Rows of Q and K are stored interleaved (pairs 2i, 2i+1 rotate together) by these architectures
# and half-split (pairs i, i + head_dim/2) by the others. In memory they are always half-split.
INTERLEAVED_ARCHITECTURES = frozenset({"llama"})
ARCHITECTURES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class LlamaConfig:
  """Dimensions and constants of one model.

  Attributes:
    rope_theta: base of the rotary frequencies `theta ** (-2i / head_dim)`.
    rope_scale: linear position scaling; positions are divided by it.
    rope_factors: whether the model carries per-frequency divisors (`rope_freqs.weight`, Llama 3).
    tied: the output projection is the embedding table.
    qkv_bias: Q, K and V have biases (Qwen 2).
    qk_norm: each head of Q and K is RMS-normalised before RoPE (Qwen 3).
  """

  architecture: str
  vocab_size: int
  context_length: int
  d_model: int
  d_ffn: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  norm_eps: float = 1e-5
  rope_theta: float = 10_000.0
  rope_scale: float = 1.0
  rope_factors: bool = False
  tied: bool = False
  qkv_bias: bool = False
  qk_norm: bool = False

  @property
  def kv_bytes_per_token(self) -> int:
    """Bytes of K and V that one token adds at two bytes a value."""
    return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim


def from_gguf(metadata: Mapping[str, Any], tensor_names: frozenset[str], path: str) -> LlamaConfig:
  """Reads the config out of GGUF metadata (key names: gguf specification, ggml/docs/gguf.md).

  Args:
    metadata: the file's key-value pairs.
    tensor_names: names of all tensors, which decide `tied`, `qkv_bias` and `rope_factors`.
    path: the file's name, for errors.

  Raises:
    FormatError: an architecture, scaling or feature that is not supported, a required key that is
      missing, or a value of the wrong type or out of range. The message names the key.
  """
  return _MetadataReader(metadata, path).config(tensor_names)


class _MetadataReader:
  def __init__(self, metadata: Mapping[str, Any], path: str):
    self.metadata, self.path = metadata, path
    arch = self._get("general.architecture", str)
    if arch not in ARCHITECTURES:
      raise FormatError(
        f"{path}: general.architecture is '{arch}', which q4jax does not run. It runs "
        f"{', '.join(ARCHITECTURES)} (Llama 1-3, TinyLlama, SmolLM, Mistral; Qwen 2 and 3)."
      )
    self.arch: str = arch

  def config(self, names: frozenset[str]) -> LlamaConfig:
    self._refuse_unsupported()
    heads = self._int("attention.head_count")
    d_model = self._int("embedding_length")
    kv_heads = self._int("attention.head_count_kv", heads)
    head_dim = self._head_dim(d_model, heads)
    if heads % kv_heads:
      raise FormatError(
        f"{self.path}: {heads} attention heads cannot share {kv_heads} KV heads "
        f"({self.arch}.attention.head_count / head_count_kv): the first must be a multiple."
      )
    return LlamaConfig(
      architecture=self.arch,
      vocab_size=self._vocab_size(),
      context_length=self._int("context_length"),
      d_model=d_model,
      d_ffn=self._int("feed_forward_length"),
      num_layers=self._int("block_count", limit=1024),
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=head_dim,
      norm_eps=self._positive("attention.layer_norm_rms_epsilon"),
      rope_theta=self._positive("rope.freq_base", 10_000.0),
      rope_scale=self._rope_scale(),
      rope_factors="rope_freqs.weight" in names,
      tied="output.weight" not in names,
      qkv_bias="blk.0.attn_q.bias" in names,
      qk_norm="blk.0.attn_q_norm.weight" in names,
    )

  def _refuse_unsupported(self) -> None:
    experts = self._count("expert_count")
    if experts:
      raise FormatError(
        f"{self.path}: {self.arch}.expert_count is {experts}: mixture-of-experts models are not "
        "supported. Use a dense model."
      )
    window = self._count("attention.sliding_window")
    if 0 < window < self._int("context_length"):
      raise FormatError(
        f"{self.path}: {self.arch}.attention.sliding_window is {window}: sliding-window attention "
        "is not supported. Use a model with full attention."
      )

  def _head_dim(self, d_model: int, heads: int) -> int:
    if d_model % heads and f"{self.arch}.attention.key_length" not in self.metadata:
      raise FormatError(
        f"{self.path}: {self.arch}.embedding_length {d_model} is not a multiple of "
        f"{self.arch}.attention.head_count {heads}, and attention.key_length is missing."
      )
    head_dim = self._int("attention.key_length", d_model // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
      found = self._int(key, head_dim)
      if found != head_dim:
        raise FormatError(
          f"{self.path}: {self.arch}.{key} is {found} where attention.key_length is {head_dim}; "
          "q4jax supports only models where they are equal."
        )
    if head_dim % 2:
      raise FormatError(f"{self.path}: the head dimension {head_dim} is odd; RoPE needs pairs.")
    return head_dim

  def _vocab_size(self) -> int:
    key = "tokenizer.ggml.tokens"
    if key not in self.metadata:
      return self._int("vocab_size")
    tokens = self._get(key, list)
    if not tokens:
      raise FormatError(f"{self.path}: {key} is empty; expected the vocabulary.")
    return len(tokens)

  def _rope_scale(self) -> float:
    # llama.cpp takes a factor without a type as linear. Old files call it `rope.scale_linear`.
    key = f"{self.arch}.rope.scaling.type"
    kind = self._get(key, str) if key in self.metadata else None
    if kind == "none":
      return 1.0
    if kind not in (None, "linear"):
      raise FormatError(
        f"{self.path}: {key} is '{kind:.80}'. q4jax supports 'none', 'linear' and Llama 3's "
        "scaling (stored as rope_freqs.weight); use a file without this scaling."
      )
    names = ("rope.scaling.factor", "rope.scale_linear")
    name = next((n for n in names if f"{self.arch}.{n}" in self.metadata), names[0])
    return self._positive(name, 1.0 if kind is None else None)

  def _get(self, key: str, kind: type) -> Any:
    if key not in self.metadata:
      raise FormatError(
        f"{self.path}: the required key {key} is missing. The file is incomplete or was written "
        "by a converter that q4jax does not know; convert the model again."
      )
    value = self.metadata[key]
    # bool is an int in Python, not in a GGUF; a float key may hold an integer.
    good = isinstance(value, (int, float) if kind is float else kind)
    if not good or isinstance(value, bool):
      raise FormatError(
        f"{self.path}: {key} is {value!r:.80} ({type(value).__name__}); expected {kind.__name__}."
      )
    return value

  def _int(self, key: str, default: int | None = None, limit: int = 2**31) -> int:
    key = f"{self.arch}.{key}"
    if default is not None and key not in self.metadata:
      return default
    value = self._get(key, int)
    if not 0 < value < limit:
      raise FormatError(f"{self.path}: {key} is {value}; expected 1..{limit - 1}.")
    return int(value)

  def _count(self, key: str) -> int:
    """The value of a key that may be 0 or missing, which means the same."""
    key = f"{self.arch}.{key}"
    value = self._get(key, int) if key in self.metadata else 0
    if value < 0:
      raise FormatError(f"{self.path}: {key} is {value}; expected 0 or more.")
    return int(value)

  def _positive(self, key: str, default: float | None = None) -> float:
    key = f"{self.arch}.{key}"
    if default is not None and key not in self.metadata:
      return default
    value = float(self._get(key, float))
    if not 0 < value < float("inf"):
      raise FormatError(f"{self.path}: {key} is {value}; expected a positive number.")
    return value
