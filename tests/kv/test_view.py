"""What `view_prompt` shows, against NumPy and against what the engine really keeps."""

import numpy as np
import pytest

import q4jax
from q4jax.errors import ConfigError
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy
from q4jax.kv.protect import Protect
from q4jax.kv.select import UnionRank
from q4jax.kv.view import view_prompt


@pytest.fixture(scope="module")
def model():
  return q4jax.load("tiny")


@pytest.fixture(scope="module")
def tokens(model):
  return np.array(model.tokenizer.encode("Returns the number of elements in the array. " * 24))


def config(policy, keep=0.5):
  return KVConfig(
    policy=get_policy(policy), select=UnionRank(keep), protect=Protect(4, 32, 0), block_size=16
  )


@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
def test_kept_is_what_the_engine_keeps(model, tokens, policy):
  kv = config(policy)
  view = view_prompt(model, tokens, kv)
  engine = q4jax.Engine(model, kv=kv, kv_dtype="f32")
  usage = engine.generate(tokens.tolist(), max_tokens=1, temperature=0).timing.kv
  assert view.kept.sum(axis=1).mean() == usage.kept
  assert view.kept.shape == (model.config.num_layers, len(tokens))
  assert (view.kept.sum(axis=1) == -(-len(tokens) // 2)).all()
  assert view.kept[:, view.dense].all() and view.dense[:4].all() and view.dense[-32:].all()
  # Of what may go, the slot that a head likes most stays.
  assert view.score.shape == (model.config.num_layers, model.config.num_kv_heads, len(tokens))
  free = ~view.dense
  for score, kept in zip(view.score[..., free], view.kept[:, free], strict=True):
    assert kept[score.argmax(axis=1)].all() and not kept.all()


def test_attention_is_the_last_queries_softmax(model, tokens):
  wide = view_prompt(model, tokens, config("snapkv"), queries=3)
  np.testing.assert_allclose(wide.attention.sum(axis=-1), 1, atol=1e-5)
  assert wide.attention.shape == (model.config.num_layers, model.config.num_heads, len(tokens))
  # The mean over the last 3 queries is the mean of those of 3 prompts, each its last query's own.
  parts = [
    view_prompt(model, tokens[: len(tokens) - i], config("snapkv"), queries=1).attention
    for i in range(3)
  ]
  mean = sum(np.pad(a, ((0, 0), (0, 0), (0, len(tokens) - a.shape[2]))) for a in parts) / 3
  np.testing.assert_allclose(wide.attention, mean, atol=1e-5)


def test_without_a_policy_all_stays(model, tokens):
  view = view_prompt(model, tokens, KVConfig())
  assert view.score is None and view.kept.all()


@pytest.mark.parametrize("shape", [(8,), (2, 64), (4000,)])
def test_refused(model, shape):
  with pytest.raises(ConfigError, match="expected one prompt of 32"):
    view_prompt(model, np.zeros(shape, int), KVConfig())
