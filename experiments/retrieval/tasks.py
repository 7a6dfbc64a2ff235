"""Three retrieval tasks over made-up symbols, drawn on the fly: what is asked always stands before.

  passkey   filler with `!` and four values somewhere;               ? ! -> the four values
  multikey  key-value pairs hidden in filler, one of them asked;     ? k -> v
  mqar      pairs first, then filler, several asked in turn (multi-query associative recall,
            Zoology, arXiv 2312.04927);                              ? k -> v  ? k -> v ...

A question may be read twice: all of them once without answers, then each with its answer. So a
cache can be compressed between the two, by someone who knows what will be asked.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]

BOS, EOS, ASK, PASS = range(4)
KEYS, VALUES, FILLER = range(4, 68), range(68, 132), range(132, 196)
VOCAB_SIZE = 198  # Two are never used: see export.py.
PASSKEY_LENGTH = 4


@dataclass(frozen=True)
class Sizes:
  """Of a sample.

  Attributes:
    context: tokens before the questions, BOS among them.
    pairs: in the contexts of multikey and mqar.
    asked: questions; passkey has one.
    symbols: of the keys, values and filler, the first so many alone are used.
  """

  context: int
  pairs: int
  asked: int
  symbols: int = len(KEYS)


@dataclass(frozen=True)
class Samples:
  """B samples of equal shape.

  Attributes:
    context: int32[B, C], BOS first.
    questions: int32[B, Q], what is asked for, in turn.
    answers: int32[B, Q, A].
  """

  context: Ints
  questions: Ints
  answers: Ints


def passkey(rng: np.random.Generator, count: int, sizes: Sizes) -> Samples:
  """One secret of PASSKEY_LENGTH distinct values."""
  tokens = _filler(rng, count, sizes)
  secret = _distinct(rng, VALUES[: sizes.symbols], count, PASSKEY_LENGTH)
  start = rng.integers(1, sizes.context - PASSKEY_LENGTH, count)
  _put(tokens, start, np.concatenate([np.full((count, 1), PASS), secret], axis=1))
  return Samples(tokens, np.full((count, 1), PASS, np.int32), secret[:, None])


def multikey(rng: np.random.Generator, count: int, sizes: Sizes) -> Samples:
  """Pairs at random places that do not overlap."""
  # Distinct places in a text where each pair is one token, made into places where it is two.
  places = _distinct(rng, range(sizes.context - 1 - sizes.pairs), count, sizes.pairs)
  return _recall(rng, 1 + np.sort(places, axis=1) + np.arange(sizes.pairs), sizes)


def mqar(rng: np.random.Generator, count: int, sizes: Sizes) -> Samples:
  """Pairs one after the other, at the beginning."""
  places = 1 + 2 * np.arange(sizes.pairs)
  return _recall(rng, np.broadcast_to(places, (count, sizes.pairs)), sizes)


Purpose = Literal["training", "held out"]
Task = Callable[[np.random.Generator, int, Sizes], Samples]
TASKS: dict[str, Task] = {"passkey": passkey, "multikey": multikey, "mqar": mqar}


def generator(purpose: Purpose, seed: int, number: int) -> np.random.Generator:
  """Draws samples. Other purposes, seeds and numbers (of a step, of a task) give other samples."""
  return np.random.default_rng([get_args(Purpose).index(purpose), seed, number])


def held_out(name: str, seed: int, count: int, sizes: Sizes) -> Samples:
  """Samples of the task of that name which no training draws; of multikey, one pair is asked."""
  rng = generator("held out", seed, list(TASKS).index(name))
  return TASKS[name](rng, count, replace(sizes, asked=1) if name == "multikey" else sizes)


def _recall(rng: np.random.Generator, places: Ints, sizes: Sizes) -> Samples:
  """Pairs at places int[B, P]."""
  count = len(places)
  tokens = _filler(rng, count, sizes)
  keys, values = (
    _distinct(rng, symbols[: sizes.symbols], count, sizes.pairs) for symbols in (KEYS, VALUES)
  )
  for i in range(sizes.pairs):
    _put(tokens, places[:, i], np.stack([keys[:, i], values[:, i]], axis=1))
  which = _distinct(rng, range(sizes.pairs), count, sizes.asked)
  take = np.take_along_axis
  return Samples(tokens, take(keys, which, axis=1), take(values, which, axis=1)[..., None])


def _filler(rng: np.random.Generator, count: int, sizes: Sizes) -> Ints:
  tokens = FILLER.start + rng.integers(0, sizes.symbols, (count, sizes.context), np.int32)
  tokens[:, 0] = BOS
  return tokens


def _distinct(rng: np.random.Generator, of: range, count: int, amount: int) -> Ints:
  """int32[count, amount], no number twice in a row."""
  order = np.argsort(rng.random((count, len(of))), axis=1)[:, :amount]
  return (of.start + order).astype(np.int32)


def _put(tokens: Ints, start: Ints, what: Ints) -> None:
  rows = np.arange(len(tokens))[:, None]
  tokens[rows, np.asarray(start)[:, None] + np.arange(what.shape[1])] = what


def dialogue(samples: Samples, twice: bool) -> tuple[Ints, Ints, NDArray[np.bool_]]:
  """The samples as text.

  Args:
    twice: all questions are read once more before they are answered.

  Returns:
    The prompts int32[B, P]: contexts, and the questions if `twice`. What follows, int32[B, T]: each
    question with its answer. Which of these T are answers, bool[T].
  """
  count, asked = samples.questions.shape
  asks = np.full((count, asked), ASK, np.int32)
  questions = np.stack([asks, samples.questions], axis=-1)  # [B, Q, 2]
  answered = np.concatenate([questions, samples.answers], axis=-1)  # [B, Q, 2 + A]
  prompt = samples.context
  if twice:
    prompt = np.concatenate([prompt, questions.reshape(count, -1)], axis=1)
  length = samples.answers.shape[2]
  return prompt, answered.reshape(count, -1), np.tile([False] * 2 + [True] * length, asked)
