"""Sequences of tokens to calibrate with, drawn from a text."""

import numpy as np
from numpy.typing import NDArray

from q4jax.errors import PromptError
from q4jax.formats.checkpoint import Checkpoint
from q4jax.text.tokenizer import Tokenizer


def sequences(
  checkpoint: Checkpoint, text: str, ctx: int, count: int, seed: int
) -> NDArray[np.int32]:
  """int32[B, ctx]: pieces of the text in their order, B at most `count`.

  The text is cut into pieces that fill a sequence; where there are more than `count`, the seed
  draws which. Each sequence begins with BOS where the model wants it.

  Raises:
    PromptError: the text is shorter than one sequence, or ctx longer than the model's context.
  """
  if ctx > checkpoint.config.context_length:
    raise PromptError(
      f"ctx is {ctx}; {checkpoint.path} has a context of {checkpoint.config.context_length}."
    )
  tokenizer = Tokenizer.from_gguf_metadata(checkpoint.metadata)
  start = tokenizer.encode_parts([], add_eos=False)
  tokens = np.asarray(tokenizer.encode_parts([text], add_eos=False), np.int32)[len(start) :]
  length = ctx - len(start)
  pieces = len(tokens) // length
  if not pieces:
    raise PromptError(
      f"the text has {len(tokens)} tokens; one sequence needs {length}. Give a longer text, or a "
      "smaller --ctx."
    )
  chosen = np.arange(pieces)
  if pieces > count:
    chosen = np.sort(np.random.default_rng(seed).permutation(pieces)[:count])
  rows = tokens[: pieces * length].reshape(pieces, length)[chosen]
  begin = np.broadcast_to(np.asarray(start, np.int32), (len(rows), len(start)))
  return np.concatenate([begin, rows], axis=1)
