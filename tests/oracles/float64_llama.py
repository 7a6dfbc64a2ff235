"""A Llama in numpy float64, straight from the file by gguf-py: what exact arithmetic would answer.

It shares no code with q4jax. Weights are dequantised, activations never rounded, and arch `llama`
rotates the file's interleaved rows as they are.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np


class Float64Llama:
  """Logits of a GGUF of arch llama, qwen2 or qwen3."""

  def __init__(self, path: Path) -> None:
    reader = gguf.GGUFReader(path)
    self.fields = {key: field.contents() for key, field in reader.fields.items()}
    self.arch = self.fields["general.architecture"]
    self.w = {
      t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
      for t in reader.tensors
    }

  def logits(self, tokens: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
    """int[T] -> float64[T, V]; `hidden` bool[L, T, T]: keys (last) that a query may not see."""
    x = self.w["token_embd.weight"][tokens]
    for i in range(self._get("block_count")):
      p = f"blk.{i}."
      y = self._norm(x, p + "attn_norm")
      x = x + self._attention(y, p, None if hidden is None else hidden[i])
      h = self._norm(x, p + "ffn_norm")
      gate, up = h @ self.w[p + "ffn_gate.weight"].T, h @ self.w[p + "ffn_up.weight"].T
      x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[p + "ffn_down.weight"].T
    head = self.w.get("output.weight", self.w["token_embd.weight"])
    return self._norm(x, "output_norm") @ head.T

  def _get(self, key: str, default: Any = None) -> Any:
    return self.fields.get(f"{self.arch}.{key}", default)

  def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
    eps = self._get("attention.layer_norm_rms_epsilon")
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.w[name + ".weight"]

  def _attention(self, x: np.ndarray, p: str, hidden: np.ndarray | None) -> np.ndarray:
    heads = self._get("attention.head_count")
    head_dim = self._get("attention.key_length", x.shape[-1] // heads)

    def heads_of(name: str) -> np.ndarray:
      y = x @ self.w[f"{p}{name}.weight"].T + self.w.get(f"{p}{name}.bias", 0)
      return y.reshape(len(x), -1, head_dim)

    q, k, v = heads_of("attn_q"), heads_of("attn_k"), heads_of("attn_v")
    if self.arch == "qwen3":
      q, k = self._norm(q, p + "attn_q_norm"), self._norm(k, p + "attn_k_norm")
    q, k = self._rotate(q), self._rotate(k)
    k, v = (np.repeat(a, heads // a.shape[1], axis=1) for a in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(head_dim)
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    if hidden is not None:
      scores[:, hidden] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights, v).reshape(len(x), -1) @ (
      self.w[p + "attn_output.weight"].T
    )

  def _rotate(self, x: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    freqs = self._get("rope.freq_base", 10_000.0) ** (-np.arange(half) / half)
    freqs = freqs / self.w.get("rope_freqs.weight", 1.0)
    turn = np.exp(1j * np.arange(len(x))[:, None, None] * freqs)
    if self.arch == "llama":
      z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
      return np.stack([z.real, z.imag], -1).reshape(x.shape)
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)
