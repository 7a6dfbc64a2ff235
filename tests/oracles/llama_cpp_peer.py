"""llama.cpp through its Python binding: tokens, logits and greedy text.

Needs llama-cpp-python (`make oracles` installs it). Nothing else under tests/ imports it.
"""

from pathlib import Path

import llama_cpp
import numpy as np

VERSION = f"llama-cpp-python {llama_cpp.__version__}"
_GGML_TYPES = {"f32": 0, "f16": 1}


class LlamaCpp:
  """One model file on the CPU.

  Args:
    kv: the KV cache's type, "f32" or "f16" (llama.cpp's default).
  """

  def __init__(self, path: Path, context: int, kv: str = "f32") -> None:
    self.llama = llama_cpp.Llama(
      str(path),
      n_ctx=context,
      n_batch=context,
      n_ubatch=context,
      logits_all=True,
      type_k=_GGML_TYPES[kv],
      type_v=_GGML_TYPES[kv],
      verbose=False,
    )

  def encode(self, text: str) -> np.ndarray:
    """int32[T], with BOS where the file asks for it; control tokens in the text stay text."""
    return np.array(self.llama.tokenize(text.encode(), add_bos=True, special=False), np.int32)

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """int[T] -> float32[T, V], one batch from an empty cache."""
    self.llama.reset()
    self.llama.eval(tokens.tolist())
    return self.llama.scores[: len(tokens)].copy()

  def greedy(self, tokens: np.ndarray, count: int) -> list[int]:
    """The `count` likeliest next tokens, one at a time; does not stop at EOS."""
    self.llama.reset()
    self.llama.eval(tokens.tolist())
    out = []
    for _ in range(count):
      out.append(int(self.llama.scores[self.llama.n_tokens - 1].argmax()))
      if len(out) < count:
        self.llama.eval(out[-1:])
    return out
