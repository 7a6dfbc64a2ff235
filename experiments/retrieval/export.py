"""The trained retrieval model as a GGUF file that `q4jax.load` opens."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from experiments.tiny import export as tiny
from experiments.tiny.tokenizer import GGUFVocabulary
from q4jax.config import LlamaConfig
from q4jax.text.vocabulary import Kind, byte_alphabet


def vocabulary() -> GGUFVocabulary:
  """Words for the tasks' symbols, in the order of their ids, each with the space before it:
  " ?", " !", keys " kaa" to " khh", values " vaa", filler " aaa".
  """
  ends = [a + b for a in "abcdefgh" for b in "abcdefgh"]
  symbols = [letter + end for letter in "kva" for end in ends]
  # A byte-level vocabulary must have a merge, so there is one that no task uses.
  words = ["?", "!", *symbols]
  space = byte_alphabet()[ord(" ")]
  texts = ["<|bos|>", "<|eos|>", *(space + word for word in words), ".", ".."]
  kinds = [Kind.CONTROL] * 2 + [Kind.NORMAL] * (len(texts) - 2)
  return GGUFVocabulary(texts, [int(kind) for kind in kinds], [". ."])


def export(
  path: Path, params: Mapping[str, NDArray[Any]], config: LlamaConfig, record: Mapping[str, Any]
) -> None:
  """Writes float16 matrices, float32 norms; `record`: how it was trained."""
  about = {
    "general.type": "model",
    "general.name": "q4jax retrieval",
    "general.description": (
      "Finds values by their keys in a context of made-up symbols (passkey, multi-key, MQAR); "
      "trained from scratch on random samples by q4jax, to measure KV-cache eviction."
    ),
    "general.license": "apache-2.0",
    "q4jax.training": json.dumps(record),
  }
  tiny.export(path, params, config, vocabulary(), quantized=False, about=about)
