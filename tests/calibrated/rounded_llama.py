"""A Llama in numpy float64 that rounds what flows into its matrices, and keys and values."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

Rounding = Mapping[str, tuple[np.ndarray, np.ndarray, int, int]]


def logits(path: Path, tokens: np.ndarray, rounding: Rounding) -> np.ndarray:
  """int[T] -> float64[T, V]; `rounding` by stream: "0.attn_q", "1.key", "head"."""
  reader = gguf.GGUFReader(path)
  w = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(float)
       for t in reader.tensors}  # fmt: skip
  meta = {key.split(".", 1)[1]: field.contents() for key, field in reader.fields.items()}
  n, h = meta["attention.head_count"], meta["attention.key_length"]

  def q(name: str, x: np.ndarray) -> np.ndarray:
    if name not in rounding:
      return x
    scale, zero, low, high = rounding[name]
    shape = (-1, 1) if x.ndim == 3 else (-1,)
    scale, zero = scale.astype(float).reshape(shape), zero.reshape(shape)
    return scale * (np.clip(np.rint(x / scale) + zero, low, high) - zero)

  def norm(x: np.ndarray, name: str) -> np.ndarray:
    rms = np.sqrt((x * x).mean(-1, keepdims=True) + meta["attention.layer_norm_rms_epsilon"])
    return x / rms * w[f"{name}.weight"]

  def rope(x: np.ndarray) -> np.ndarray:  # interleaved, as the file of arch llama has it
    angle = np.arange(len(x))[:, None] * meta["rope.freq_base"] ** (-np.arange(0, h, 2) / h)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

  x = w["token_embd.weight"][tokens]
  for i in range(meta["block_count"]):
    p, seen = f"blk.{i}.", np.tril(np.ones((len(tokens), len(tokens)), bool))
    y = q(f"{i}.attn_q", norm(x, f"{p}attn_norm"))
    heads = [(y @ w[f"{p}attn_{m}.weight"].T).reshape(len(tokens), -1, h) for m in "qkv"]
    query, key, value = rope(heads[0]), q(f"{i}.key", rope(heads[1])), q(f"{i}.value", heads[2])
    key, value = (np.repeat(a, n // a.shape[1], axis=1) for a in (key, value))
    scores = np.where(seen, np.einsum("tnh,snh->nts", query, key) / np.sqrt(h), -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("nts,snh->tnh", weight / weight.sum(-1, keepdims=True), value)
    x = x + q(f"{i}.attn_output", out.reshape(len(tokens), -1)) @ w[f"{p}attn_output.weight"].T
    y = q(f"{i}.ffn_gate", norm(x, f"{p}ffn_norm"))
    gate, up = y @ w[f"{p}ffn_gate.weight"].T, y @ w[f"{p}ffn_up.weight"].T
    x = x + q(f"{i}.ffn_down", gate / (1 + np.exp(-gate)) * up) @ w[f"{p}ffn_down.weight"].T
  return q("head", norm(x, "output_norm")) @ w["token_embd.weight"].T
