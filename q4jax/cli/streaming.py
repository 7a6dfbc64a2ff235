"""Runs the engine for a command: text shown as it comes, Ctrl-C keeps what there is."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from q4jax.cli.speed import CompileClock, Speed
from q4jax.engine import Engine, Timing, TokenLogprobs


@dataclass
class Answer:
  """One prompt's output; `finish_reason` is "stop", "length" or "interrupted" (Ctrl-C)."""

  prompt_tokens: int
  text: str = ""
  tokens: list[int] = field(default_factory=list)
  finish_reason: str = "interrupted"
  logprobs: list[TokenLogprobs] = field(default_factory=list)

  def json(self) -> dict[str, Any]:
    """As a JSON object; log-probabilities only if there are any."""
    row: dict[str, Any] = {
      "text": self.text,
      "tokens": self.tokens,
      "finish_reason": self.finish_reason,
      "prompt_tokens": self.prompt_tokens,
    }
    if self.logprobs:
      row["logprobs"] = [
        {
          "token": entry.token,
          "logprob": entry.logprob,
          "top": [{"token": token, "logprob": value} for token, value in entry.top],
        }
        for entry in self.logprobs
      ]
    return row


def write(index: int, text: str) -> None:
  """Shows a piece of text at once, on stdout."""
  sys.stdout.write(text)
  sys.stdout.flush()


def discard(index: int, text: str) -> None:
  """Shows nothing: JSON and batches are printed at the end."""


def answer(
  engine: Engine,
  prompts: Sequence[list[int]],
  options: dict[str, Any],
  show: Callable[[int, str], None],
) -> tuple[list[Answer], Speed]:
  """Generates for a batch of prompts, token ids; `options` are `Engine.stream`'s.

  Args:
    show: called with each new piece of text and its prompt's index.
  """
  answers = [Answer(len(prompt)) for prompt in prompts]
  timing, clock = Timing(), CompileClock()
  began = time.perf_counter()
  try:
    for chunk in engine.stream(prompts, timing=timing, **options):
      mine = answers[chunk.index]
      mine.text += chunk.text
      if chunk.token is not None:
        mine.tokens.append(chunk.token)
      if chunk.logprobs is not None:
        mine.logprobs.append(chunk.logprobs)
      mine.finish_reason = chunk.finish_reason or mine.finish_reason
      if chunk.text:
        show(chunk.index, chunk.text)
  except KeyboardInterrupt:
    pass  # The answers that are not finished say so.
  finally:
    clock.close()
  return answers, Speed.of(timing, clock, began)


def interrupted(answers: Sequence[Answer]) -> bool:
  """Whether Ctrl-C ended any of them."""
  return any(answer.finish_reason == "interrupted" for answer in answers)
