"""Comparisons against numpy in float64: a model with itself, and with others of its vocabulary."""

from pathlib import Path

import numpy as np
import pytest

from gguf_model import ModelSpec, write
from q4jax.compare import Reference
from q4jax.errors import ConfigError, PromptError
from q4jax.evaluate import perplexity
from q4jax.loading import load
from q4jax.model.model import Model

CTX = 16


def model(folder: Path, name: str, **options) -> Model:
  return load(write(folder / f"{name}.gguf", ModelSpec(**options)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model, np.ndarray]:
  folder = tmp_path_factory.mktemp("compare")
  tokens = np.random.default_rng(1).integers(3, 290, 5 * CTX)
  return model(folder, "a", seed=0), model(folder, "b", seed=3), tokens


def softmax64(logits: np.ndarray) -> np.ndarray:
  shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
  return shifted / shifted.sum(-1, keepdims=True)


def test_a_model_is_itself(pair: tuple[Model, Model, np.ndarray]) -> None:
  a, _, tokens = pair
  same = Reference(a, tokens, CTX).compare(a)
  assert (same.kl, same.kl_p99, same.top1, same.ratio, same.ratio_stderr) == (0, 0, 1, 1, 0)
  assert same.ppl == pytest.approx(perplexity(a, tokens, CTX).ppl, rel=1e-5)


def test_every_figure_is_numpys(pair: tuple[Model, Model, np.ndarray]) -> None:
  a, b, tokens = pair
  got = Reference(a, tokens, CTX, chunks=4).compare(b)
  p_loss, q_loss, kls, same = [], [], [], []
  for i in range(4):
    row = tokens[i * CTX : (i + 1) * CTX].copy()
    row[0] = 1  # BOS
    p, q = (softmax64(np.asarray(m.logits(row))[0]) for m in (a, b))
    for t in range(CTX // 2, CTX - 1):
      p_loss.append(-np.log(p[t, row[t + 1]]))
      q_loss.append(-np.log(q[t, row[t + 1]]))
      kls.append((p[t] * np.log(p[t] / q[t])).sum())
      same.append(p[t].argmax() == q[t].argmax())
  assert got.tokens == len(kls)
  assert got.reference_ppl == pytest.approx(np.exp(np.mean(p_loss)), rel=1e-5)
  assert got.ppl == pytest.approx(np.exp(np.mean(q_loss)), rel=1e-5)
  assert got.kl == pytest.approx(np.mean(kls), rel=1e-4) and got.kl > 0.01
  assert got.kl_stderr == pytest.approx(np.std(kls, ddof=1) / len(kls) ** 0.5, rel=1e-4)
  assert got.kl_p99 == pytest.approx(np.percentile(kls, 99), rel=1e-4)
  assert got.top1 == np.mean(same)
  spread = np.std(np.subtract(q_loss, p_loss), ddof=1) / len(kls) ** 0.5
  assert got.ratio_stderr == pytest.approx(got.ratio * spread, rel=1e-4)


def test_another_vocabulary_is_refused(
  pair: tuple[Model, Model, np.ndarray], tmp_path: Path
) -> None:
  a, _, tokens = pair
  with pytest.raises(ConfigError, match="vocabulary of 300 where the reference has 293"):
    Reference(a, tokens, CTX).compare(model(tmp_path, "c", vocab=300))
  with pytest.raises(PromptError, match="needs at least"):
    Reference(a, tokens[:CTX], CTX)
