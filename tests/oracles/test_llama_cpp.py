"""The same files, the same tokens: q4jax's logits, greedy text and perplexity beside llama.cpp's.

Each test runs on recorded answers, and under `-m oracle` (`make oracles`) on live ones. For floats
the two agree to rounding. For quantised weights both round activations to int8, each in its own
order of operations, so neither is the truth: both are held against float64 arithmetic on the
dequantised weights, and q4jax must not be further from it than llama.cpp by more than a tenth.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import q4jax
from oracles import questions
from oracles.float64_llama import Float64Llama
from oracles.models import SPECS, prompt, write
from oracles.questions import DATA, SHARED, SharedModel
from q4jax.evaluate import perplexity
from shared_data import shared

ABOUT = json.loads((DATA / "llama_cpp.json").read_text())
Answer = Callable[[Any], Any]


@functools.cache
def recorded() -> dict[str, np.ndarray]:
  with np.load(DATA / "llama_cpp.npz") as file:
    return dict(file)


@pytest.fixture(params=["recorded", pytest.param("live", marks=pytest.mark.oracle)])
def live(request: pytest.FixtureRequest) -> bool:
  if request.param == "live":
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: `make oracles`")
  return request.param == "live"


@functools.cache
def live_answers(stem: str) -> dict[str, np.ndarray]:
  from oracles.record_llama_cpp import shared_answers

  model = SHARED[stem]
  return shared_answers(model, shared(model.file), shared(questions.TEXT).read_text())


@functools.lru_cache(maxsize=1)
def ours(stem: str) -> q4jax.Model:
  return q4jax.load(shared(SHARED[stem].file))


@functools.cache
def text_tokens(stem: str) -> np.ndarray:
  """The beginning of the text: as many tokens as the questions need."""
  text = shared(questions.TEXT).read_text()[:60_000]
  return np.array(ours(stem).tokenizer.encode(text), np.int32)


def rms(x: np.ndarray) -> float:
  return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def assert_as_exact(mine: np.ndarray, theirs: np.ndarray, truth: np.ndarray) -> None:
  """float: within rounding of llama.cpp. Quantised: errors at most a tenth above llama.cpp's."""
  assert rms(mine - truth) <= 1.1 * rms(theirs - truth)
  # Each flipped rounding of an activation moves all later values, so the largest error is noisy.
  assert np.abs(mine - truth).max() <= 1.5 * np.abs(theirs - truth).max()


@pytest.mark.parametrize("name", SPECS)
def test_small_models(name: str, live: bool, tmp_path: Path) -> None:
  spec = SPECS[name]
  path, tokens = write(spec, tmp_path / "model.gguf"), prompt(spec)
  if live:
    from oracles.record_llama_cpp import small_answer

    theirs = small_answer(spec, path).astype(np.float32)
  else:
    theirs = recorded()[f"small/{name}"].astype(np.float32)
  mine = np.asarray(q4jax.load(path).logits(tokens))[0, questions.SMALL]
  if spec.type == "f32":
    np.testing.assert_allclose(mine, theirs, atol=2e-5)
  else:
    assert_as_exact(mine, theirs, Float64Llama(path).logits(tokens)[questions.SMALL])


@pytest.mark.parametrize("stem", SHARED)
def test_logits_of_a_text(stem: str, live: bool) -> None:
  model = SHARED[stem]
  tokens = text_tokens(stem)[: model.text_tokens]
  at = slice(None) if live else questions.RECORDED
  theirs = (live_answers(stem) if live else recorded())[f"logits/{stem}"]
  mine = np.asarray(ours(stem).logits(tokens))[0, at]
  if model.is_float:
    np.testing.assert_allclose(mine, theirs, atol=2e-4)
  else:
    assert_as_exact(mine, theirs, Float64Llama(shared(model.file)).logits(tokens)[at])


@pytest.mark.parametrize("stem", SHARED)
def test_likeliest_tokens(stem: str, live: bool) -> None:
  model = SHARED[stem]
  theirs = (live_answers(stem) if live else recorded())[f"top1/{stem}"]
  rows = questions.chunks(text_tokens(stem), model)
  mine = np.asarray(ours(stem).logits(rows)).argmax(-1)
  assert np.mean(mine == theirs) >= (1.0 if model.is_float else 0.99)


@pytest.mark.parametrize("stem", SHARED)
def test_greedy_text(stem: str, live: bool) -> None:
  model = SHARED[stem]
  theirs = (live_answers(stem) if live else recorded())[f"greedy/{stem}"].tolist()
  engine = q4jax.Engine(ours(stem), kv_dtype="f32")
  mine = engine.generate([questions.BOS], max_tokens=model.greedy_tokens, temperature=0).tokens
  assert mine == theirs[: len(mine)]


def test_greedy_text_is_the_known_story() -> None:
  completion = q4jax.Engine(ours("stories260K-f32")).generate([1], max_tokens=256, temperature=0)
  assert completion.text.startswith(
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
  )


def test_perplexity_of_a_small_model(tmp_path: Path) -> None:
  spec = SPECS[questions.PERPLEXITY_SPEC]
  model = q4jax.load(write(spec, tmp_path / "model.gguf"))
  theirs = ABOUT["perplexity"][spec.name]
  text = questions.perplexity_text(spec)
  mine = perplexity(model, text, ctx=theirs["ctx"], chunks=theirs["chunks"])
  assert mine.ppl == pytest.approx(theirs["ppl"], rel=1e-3)
  assert mine.stderr == pytest.approx(theirs["stderr"], rel=3e-3)
  assert mine.chunks == theirs["chunks"]


@pytest.mark.slow
@pytest.mark.parametrize("stem", SHARED)
def test_perplexity_of_shared_models(stem: str) -> None:
  golden = json.loads(shared("golden.json").read_text())["perplexity"]
  theirs = next(entry for entry in golden if entry["model"] == f"{stem}.gguf")
  model = SHARED[stem]
  assert (theirs["ctx"], theirs["chunks"]) == (model.ctx, model.chunks)
  mine = perplexity(ours(stem), text_tokens(stem), ctx=model.ctx, chunks=model.chunks)
  assert mine.ppl == pytest.approx(theirs["ppl"], rel=2e-5 if model.is_float else 1e-3)
  assert mine.stderr == pytest.approx(theirs["stderr"], rel=1e-2)
