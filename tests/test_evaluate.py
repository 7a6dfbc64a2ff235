"""Perplexity and losses by position, against float64 arithmetic written out plainly."""

import gc
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import q4jax
from oracles.float64_llama import Float64Llama
from oracles.models import Spec, prompt, write
from q4jax import evaluate
from q4jax.errors import ConfigError, PromptError
from q4jax.evaluate import perplexity, token_nll

SPEC = Spec(
  "evaluate", d_model=64, d_ffn=96, layers=1, heads=2, kv_heads=1, head_dim=32, context=700
)
CTX = 48


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return write(SPEC, tmp_path_factory.mktemp("evaluate") / "model.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> q4jax.Model:
  return q4jax.load(path)


@pytest.fixture(scope="module")
def exact(path: Path) -> Float64Llama:
  return Float64Llama(path)


def losses(exact: Float64Llama, tokens: np.ndarray) -> np.ndarray:
  """float64[T - 1]."""
  logits = exact.logits(tokens)[:-1]
  return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(tokens) - 1), tokens[1:]]


# Around the edges of the windows (64 to 256 tokens) that the sequence goes through the layers in.
@pytest.mark.parametrize("length", [2, 64, 65, 66, 257, 600])
def test_losses_by_position(length: int, model: q4jax.Model, exact: Float64Llama) -> None:
  tokens = prompt(SPEC, length)
  found = token_nll(model, tokens)
  assert found.shape == (1, length - 1) and found.dtype == np.float32
  np.testing.assert_allclose(found[0], losses(exact, tokens), atol=2e-5)


def test_losses_of_a_batch(model: q4jax.Model) -> None:
  rows = np.stack([prompt(SPEC, 70), prompt(SPEC, 70)[::-1]])
  alone = [token_nll(model, row)[0] for row in rows]
  np.testing.assert_allclose(token_nll(model, rows), alone, atol=2e-5)


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_perplexity_follows_the_protocol(
  batch: int | None, model: q4jax.Model, exact: Float64Llama
) -> None:
  tokens = prompt(SPEC, 4 * CTX + 17)  # The 17 tokens left over are dropped.
  scored = []
  for chunk in tokens[: 4 * CTX].reshape(4, CTX):
    chunk = np.concatenate([[1], chunk[1:]])  # BOS takes the place of the first token.
    scored.append(losses(exact, chunk)[CTX // 2 :])
  nll = np.concatenate(scored)
  calls: list[tuple[int, int]] = []
  found = perplexity(
    model, tokens, CTX, batch=batch, progress=lambda done, total: calls.append((done, total))
  )
  assert (found.chunks, found.tokens, found.ctx) == (4, nll.size, CTX)
  assert found.nll == pytest.approx(nll.mean(), abs=1e-5)
  assert found.ppl == pytest.approx(np.exp(nll.mean()), rel=1e-5)
  # The standard error of a mean, to first order through exp.
  assert found.stderr == pytest.approx(found.ppl * nll.std(ddof=1) / nll.size**0.5, rel=1e-4)
  assert calls[-1] == (4, 4) and calls == sorted(calls)


def test_chunks_limits_the_text(model: q4jax.Model) -> None:
  tokens = prompt(SPEC, 4 * CTX)
  assert perplexity(model, tokens, CTX, chunks=2) == perplexity(model, tokens[: 2 * CTX], CTX)
  assert perplexity(model, tokens, CTX, chunks=99).chunks == 4


def test_text_is_tokenised_as_llama_perplexity_does(model: q4jax.Model) -> None:
  text = "the quick brown fox. " * 20
  tokens = model.tokenizer.encode(text)
  assert tokens[0] == 1
  assert perplexity(model, text + "\n", CTX) == perplexity(model, tokens, CTX)


def test_one_program_serves_all_calls(model: q4jax.Model, monkeypatch: pytest.MonkeyPatch) -> None:
  traced = []
  window_nll = evaluate._window_nll

  def spy(*args: Any) -> jax.Array:
    traced.append(args)
    return window_nll(*args)

  monkeypatch.setattr(evaluate, "_window_nll", spy)
  tokens = prompt(SPEC, 5 * 40)
  perplexity(model, tokens, 40, batch=2)
  assert len(traced) == 1  # Three calls, the last of them half full.
  perplexity(model, tokens[::-1], 40, batch=2)
  assert len(traced) == 1


def test_logits_never_exist_at_once(
  model: q4jax.Model, exact: Float64Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
  limit = 16 * SPEC.vocab * 4
  monkeypatch.setattr(evaluate, "_LOGITS_BYTES", limit)
  tokens = prompt(SPEC, 130)
  program: Any = model.jit(evaluate._nll, static_argnums=2)
  lowered = program.lower(model.leaves, jax.numpy.asarray(tokens[None]), 0)
  assert f"x{SPEC.vocab}xf32" in lowered.as_text()
  widths = {
    int(np.prod([int(n) for n in shape.split("x")]))
    for shape in _shapes_ending_in(lowered.as_text(), SPEC.vocab)
    if shape != str(SPEC.d_model)
  }
  assert max(widths) <= 16
  found = np.asarray(program(model.leaves, jax.numpy.asarray(tokens[None]), 0))[0]
  np.testing.assert_allclose(found, losses(exact, tokens), atol=2e-5)


def _shapes_ending_in(text: str, last: int) -> set[str]:
  """The dimensions before `last` of every float32 tensor in the program."""
  return {
    part.removesuffix(f"x{last}xf32")
    for part in text.replace("<", " ").replace(">", " ").split()
    if part.endswith(f"x{last}xf32")
  }


def test_a_model_can_be_freed(path: Path) -> None:
  model = q4jax.load(path)
  token_nll(model, prompt(SPEC, 10))
  gone = weakref.ref(model)
  del model
  gc.collect()
  assert gone() is None


@pytest.mark.parametrize(
  ("error", "message", "options"),
  [
    (PromptError, "has 95 tokens.*at least 96", {"tokens": prompt(SPEC, 95)}),
    (PromptError, "293 is outside the vocabulary", {"tokens": [293] * 100}),
    (PromptError, "flat list of token ids", {"tokens": np.zeros((100, 2), np.int32)}),
    (PromptError, "flat list of token ids", {"tokens": np.zeros(100)}),
    (ConfigError, "ctx is 701; expected 4 to 700", {"ctx": 701}),
    (ConfigError, "ctx is 3", {"ctx": 3}),
    (ConfigError, "chunks is 0", {"chunks": 0}),
    (ConfigError, "batch is -1", {"batch": -1}),
  ],
)
def test_refuses(error: type[Exception], message: str, options: dict, model: q4jax.Model) -> None:
  arguments = {"tokens": prompt(SPEC, 200), "ctx": CTX} | options
  with pytest.raises(error, match=message):
    perplexity(model, arguments.pop("tokens"), **arguments)


@pytest.mark.parametrize(
  "tokens",
  [[1], [], np.zeros((0, 5), np.int32), [0.5, 1.0], np.zeros((1, 2, 3), np.int32), [1] * 701],
)
def test_losses_refuse(tokens: object, model: q4jax.Model) -> None:
  with pytest.raises(PromptError, match="token_nll"):
    token_nll(model, tokens)  # type: ignore[arg-type]
