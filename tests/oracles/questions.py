"""What the peers are asked, so that a live answer and a recorded one are to the same question.

An answer is an array by name, kept in `tests/data/<peer>.npz`; its JSON twin says which versions
gave it and how. Names: `small/<spec>`, logits of a model of `models.py`. Of a shared model (the
file's stem): `top1/<stem>`, its likeliest next token at each position of `chunks`; `logits/<stem>`
of a float model at some of them; `error/<stem>` of a quantised one, the root mean square of logits
minus those of float64 arithmetic, over all of them; `greedy/<stem>`, its text from BOS alone.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oracles.models import Spec, prompt

DATA = Path(__file__).parents[1] / "data"
TEXT = "texts/tinystories_eval_a.txt"
BOS = 1

# Positions of the small models' prompts whose logits are kept: the rest shows in their attention.
SMALL = slice(16, None)


@dataclass(frozen=True)
class SharedModel:
  """A model of the shared data, and how it is questioned.

  Attributes:
    stem: the file is `models/<stem>.gguf`.
    ctx, chunks: of the perplexity in the shared `golden.json`.
    greedy_tokens: sampled at temperature 0 from BOS alone.
  """

  stem: str
  ctx: int
  chunks: int
  greedy_tokens: int = 255

  @property
  def file(self) -> str:
    return f"models/{self.stem}.gguf"

  @property
  def is_float(self) -> bool:
    return self.stem.endswith("-f32")


SHARED = {
  model.stem: model
  for model in (
    *(SharedModel(f"stories260K-{t}", 512, 40) for t in ("f32", "Q8_0")),
    *(SharedModel(f"babyllama361-{t}", 256, 80) for t in ("f32", "Q8_0", "Q5_0", "Q4_1", "Q4_0")),
  )
}
# Where a float model's logits are asked for: the first 200 tokens of the text.
TEXT_TOKENS = slice(0, 200)
# ... and which of them are recorded.
RECORDED = slice(7, 200, 8)
# Chunks of the text that the other questions are about.
CHUNKS = 8


def chunks(tokens: np.ndarray, model: SharedModel) -> np.ndarray:
  """int32[CHUNKS, ctx]: the text's first chunks, each begun with BOS."""
  rows = tokens[: CHUNKS * model.ctx].reshape(CHUNKS, model.ctx).copy()
  rows[:, 0] = BOS
  return rows


def rms(x: np.ndarray) -> float:
  return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


# A small model whose perplexity llama-perplexity measures, on a text made here.
PERPLEXITY_SPEC, PERPLEXITY_CTX, PERPLEXITY_CHUNKS = "llama-q4_k", 64, 9


def perplexity_text(spec: Spec) -> str:
  """A random text of the letters that the small models' vocabulary has, a newline at its end."""
  letters = "abcdefghijklmnopqrstuvwxyz.,!?'-  "
  ids = np.tile(prompt(spec, 200), 4)
  return "".join(letters[i % len(letters)] for i in ids) + "\n"
