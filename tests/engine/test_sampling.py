"""Sampling against a brute-force NumPy version of the same rules."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from q4jax.engine.sampling import SamplingArrays, SamplingParams, sample
from q4jax.errors import ConfigError

VOCAB = 50


def draw(
  logits: np.ndarray, seen: np.ndarray | None = None, count: int = 1, **settings: Any
) -> np.ndarray:
  """Tokens int[count] drawn from one row of logits with seeds 0, 1, ..."""
  rows = [SamplingParams(**{"seed": i, **settings}) for i in range(count)]
  tiled = jnp.asarray(np.tile(logits, (count, 1)), jnp.float32)
  mask = np.zeros((count, len(logits)), bool) if seen is None else np.tile(seen, (count, 1))
  position = jnp.full((count,), 7, jnp.int32)
  return np.asarray(sample(tiled, SamplingArrays.of(rows), jnp.asarray(mask), position))


def support(logits: np.ndarray, settings: dict[str, Any]) -> set[int]:
  """The tokens that may be drawn, by sorting, in float64."""
  x = logits.astype(np.float64) / settings["temperature"]
  order = np.argsort(-x)
  keep = order[: settings["top_k"]] if settings["top_k"] else order
  p = np.exp(x[keep] - x.max())
  p /= p.sum()
  keep = keep[: int(np.searchsorted(np.cumsum(p), settings["top_p"] - 1e-12)) + 1]
  p = np.exp(x - x.max())
  return {int(i) for i in keep if p[i] >= settings["min_p"]}


@given(
  st.integers(0, 1000),
  st.sampled_from([0.3, 1.0, 2.0]),
  st.sampled_from([0, 1, 3, 50]),
  st.sampled_from([0.1, 0.5, 0.9, 1.0]),
  st.sampled_from([0.0, 0.05, 1.0]),
)
def test_only_allowed_tokens_are_drawn_and_all_of_them(
  seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
  # Well-spaced logits: no draw hangs on the last bit of a cumulative sum.
  logits = np.random.default_rng(seed).permutation(np.linspace(-3, 3, VOCAB)).astype(np.float32)
  settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
  allowed = support(logits, settings)
  drawn = draw(logits, count=1024, **settings)
  assert set(drawn.tolist()) <= allowed
  likely = [i for i in allowed if np.exp((logits[i] - logits.max()) / temperature) > 0.2]
  if len(allowed) <= 10:
    assert set(likely) <= set(drawn.tolist())


def test_frequencies_are_the_softmax() -> None:
  logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)) * 2
  counts = np.bincount(draw(logits, count=8192, temperature=2.0), minlength=4) / 8192
  np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.02)


def test_frequencies_over_many_blocks_of_tokens() -> None:
  """700 tokens are three blocks of 256, the last one not full; most tokens are impossible."""
  p = np.zeros(700)
  p[[0, 3, 255, 256, 300, 512, 699]] = [0.25, 0.1, 0.05, 0.2, 0.15, 0.05, 0.2]
  with np.errstate(divide="ignore"):
    logits = np.log(p)
  drawn = draw(logits, count=16384, temperature=1.0)
  np.testing.assert_allclose(np.bincount(drawn, minlength=700) / 16384, p, atol=0.015)
  within = draw(np.where(np.arange(700) // 256 == 1, 0.0, -np.inf), count=4096, temperature=1.0)
  assert set(within.tolist()) == set(range(256, 512))


@given(st.integers(0, 1000), st.sampled_from([1, 255, 256, 257, 700]))
def test_greedy_is_the_first_of_the_best(seed: int, vocab: int) -> None:
  """As NumPy's argmax, of ties the first, and of NaN the first."""
  rng = np.random.default_rng(seed)
  rows = rng.integers(0, 5, (6, vocab)).astype(np.float32)
  rows[1] = -np.inf
  rows[2, rng.integers(0, vocab, 2)] = np.nan
  rows[3] = rng.normal(size=vocab)
  for logits in rows:
    assert draw(logits, temperature=0.0)[0] == np.argmax(logits)


def test_ties_at_the_threshold_stay() -> None:
  drawn = draw(np.zeros(VOCAB), count=2048, temperature=1.0, top_k=1)
  assert set(drawn.tolist()) == set(range(VOCAB))


def test_zero_temperature_is_the_best_token_whatever_else_is_set() -> None:
  logits = np.random.default_rng(0).normal(size=VOCAB)
  drawn = draw(logits, count=64, temperature=0.0, top_k=5, top_p=0.3)
  assert set(drawn.tolist()) == {int(np.argmax(logits))}


def test_one_batch_mixes_settings() -> None:
  logits = jnp.asarray(np.tile(np.linspace(0, 1, VOCAB), (3, 1)), jnp.float32)
  params = SamplingArrays.of(
    [SamplingParams(0.0), SamplingParams(1.0, top_k=1), SamplingParams(5.0, top_k=2)]
  )
  tokens = sample(logits, params, jnp.zeros((3, VOCAB), bool), jnp.zeros(3, jnp.int32))
  assert tokens[0] == VOCAB - 1
  assert tokens[1] == VOCAB - 1
  assert tokens[2] >= VOCAB - 2


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
  seen = np.array([True, False, True, False])
  logits = np.array([1.9, 1.0, -1.0, -1.9])
  assert draw(logits, seen, temperature=0.0, repetition_penalty=1.5)[0] == 0
  assert draw(logits, seen, temperature=0.0, repetition_penalty=2.0)[0] == 1
  assert draw(np.array([-9, -9, -1.0, -1.9]), seen, temperature=0.0, repetition_penalty=2.0)[0] == 3


def test_seed_and_position_fix_the_draw() -> None:
  logits = np.zeros(VOCAB)
  a, b = draw(logits, count=32, temperature=1.0), draw(logits, count=32, temperature=1.0)
  assert (a == b).all()
  assert len(set(a.tolist())) > 10  # Different seeds differ.


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("min_p", 2.0),
    ("repetition_penalty", 0.0),
    ("seed", -1),
    ("seed", 2**32),
  ],
)
def test_a_setting_out_of_range_is_named(name: str, value: float) -> None:
  with pytest.raises(ConfigError, match=name):
    SamplingParams(**{name: value})  # type: ignore[arg-type]
