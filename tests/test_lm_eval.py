"""The adapter of lm-evaluation-harness: scores against whole logits, and the harness itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import q4jax
from q4jax import lm_eval_adapter as adapter
from q4jax.errors import ConfigError, PromptError
from q4jax.evaluate import token_nll
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy
from q4jax.kv.protect import Protect
from q4jax.kv.quality import stepped_quality
from q4jax.kv.select import UnionRank
from q4jax.scoring import Scorer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model():
  return q4jax.load("tiny")


def by_logits(model, context, continuation):
  """In float64, from the logits of all positions."""
  logits = np.asarray(model.logits([*context, *continuation]), np.float64)[0, len(context) - 1 : -1]
  logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
  logp -= logits.max(-1, keepdims=True)
  rows = np.arange(len(continuation))
  return logp[rows, continuation].sum(), bool((logits.argmax(-1) == continuation).all())


def test_scores_are_those_of_whole_logits(model):
  random = np.random.default_rng(0)
  lengths = ((1, 1), (3, 5), (70, 2), (9, 80), (12, 1))
  pairs = [(random.integers(2, 4000, a).tolist(), random.integers(2, 4000, b).tolist())
           for a, b in lengths]  # fmt: skip
  likely = model.tokenizer.encode("Returns the number of")
  best = int(np.asarray(model.logits(likely))[0, -1].argmax())
  pairs.append((likely, [best]))
  found = Scorer(model, batch=3).scores(pairs)
  for score, pair in zip(found, pairs, strict=True):
    logprob, greedy = by_logits(model, *pair)
    # Sums in another order may round an activation to another of its 8 bits.
    assert abs(score.logprob - logprob) < 5e-3 * abs(logprob) and score.greedy == greedy
    losses = token_nll(model, [*pair[0], *pair[1]])[0, len(pair[0]) - 1 :]
    assert abs(score.logprob + losses.sum()) < 1e-3
  assert [score.greedy for score in found] == [False] * 5 + [True]


def test_through_a_compressed_cache_as_stepping_has_it(model):
  """Rows of unequal lengths; each as kv/quality.py finds it, alone and from the second token on."""
  text = model.tokenizer.encode((ROOT / "q4jax/data/held_out.txt").read_text())
  kv = KVConfig(
    policy=get_policy("snapkv"), select=UnionRank(0.4), protect=Protect(4, 16, 0), block_size=16
  )
  scorer = Scorer(model, kv, batch=2)
  scorer.engine.kv_dtype = np.dtype("float32")
  for prompt, total in ((160, 200), (120, 180)):
    ids = text[:total]
    whole, first = scorer.scores([(ids[:prompt], ids[prompt:]), (ids[:prompt], [ids[prompt]])])
    quality = stepped_quality(model, np.array([ids]), prompt, kv)
    assert abs(quality.ratio - 1) > 1e-3  # eviction is seen
    expected = -np.log(quality.ppl) * (total - prompt - 1)
    assert abs(whole.logprob - first.logprob - expected) < 0.01
  pairs = [(text[:160], text[160:200]), (text[:120], text[120:180])]
  together = scorer.scores(pairs)
  alone = [scorer.scores([pair])[0] for pair in pairs]
  for a, b in zip(together, alone, strict=True):
    assert abs(a.logprob - b.logprob) < 1e-3


@pytest.mark.parametrize(("n", "limit"), [(1, 8), (8, 8), (9, 8), (23, 8), (5, 1), (16, 4)])
def test_windows_score_each_token_once_with_all_that_fits(n, limit):
  ids = list(range(1, n + 1))
  found = list(adapter.windows([0], ids, limit))
  assert [i for _, after in found for i in after] == ids
  for before, after in found:
    assert before and len(before) + len(after) - 1 <= limit
    assert [*before, *after] == list(range(before[0], after[-1] + 1))
  for before, after in found[1:]:
    assert len(before) + len(after) - 1 == limit  # the last is full too


def test_rolling_is_the_sum_over_windows(model):
  text = "Returns a new array with the elements of the given shape. " * 8
  ids = model.tokenizer.encode(text, add_special=False)
  whole = by_logits(model, adapter.prefix(model), ids)[0]
  long, short = (adapter.rolling(Scorer(model, max_length=n), [text, "a"]) for n in (None, 32))
  assert abs(long[0] - whole) < 5e-3 * abs(whole) and long[1] == pytest.approx(short[1], abs=1e-3)
  assert short[0] < long[0]  # less context


def test_pairs(model):
  encode, decode = model.tokenizer.encode, model.tokenizer.decode
  for context, continuation in (("Returns the", " number"), ("Returns the ", "number")):
    before, after = adapter.encode_pair(model, context, continuation)
    assert before == encode("Returns the") and decode(before + after) == "Returns the number"
  before, after = adapter.encode_pair(model, "", "Returns")
  assert before == adapter.prefix(model) and decode(after) == "Returns"
  with pytest.raises(PromptError, match="nothing to score"):
    adapter.encode_pair(model, "", "")


def test_sampling():
  assert adapter.sampling({"until": "\n", "do_sample": False, "temperature": 0.7}) == (
    {"stop": ["\n"], "temperature": 0.0}, 256
  )  # fmt: skip
  assert adapter.sampling({"until": ["a", ""], "max_gen_toks": 3, "temperature": 0.5}) == (
    {"stop": ["a"], "temperature": 0.5}, 3
  )  # fmt: skip
  with pytest.raises(ConfigError, match="num_beams are not known"):
    adapter.sampling({"num_beams": 2})


def test_generate_is_the_engines(model):
  prompts = ["Returns the", "Raises a"]
  scorer = Scorer(model, batch=1)
  texts = adapter.generate(scorer, prompts, {"until": ["\n"], "max_gen_toks": 6})
  engine = q4jax.Engine(model)
  assert texts == [engine.generate(p, max_tokens=6, temperature=0, stop="\n").text for p in prompts]
  with pytest.raises(ConfigError, match="max_gen_toks is 5000"):
    adapter.generate(scorer, prompts, {"max_gen_toks": 5000})


def test_a_continuation_that_cannot_fit(model):
  with pytest.raises(PromptError, match="continuation has 9 tokens; the context of 8"):
    Scorer(model, max_length=8).scores([([5], [5] * 9)])


def test_the_harness_runs_local_tasks(tmp_path, model):
  pytest.importorskip("lm_eval")
  environment = {
    **os.environ, "PYTHONPATH": ".:kernels", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": str(tmp_path / "hf"),
  }  # fmt: skip
  done = subprocess.run(
    [
      sys.executable, "-m", "q4jax.lm_eval_adapter", "--model", "q4jax",
      "--model_args", "pretrained=tiny", "--batch_size", "4",
      "--include_path", "tests/data/lm_eval",
      "--tasks", "q4jax_docstrings,q4jax_rolling,q4jax_generate",
      "--output_path", str(tmp_path / "out"),
    ],
    cwd=ROOT, env=environment, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  [path] = (tmp_path / "out").rglob("results_*.json")
  results = json.loads(path.read_text())["results"]
  lines = (ROOT / "tests/data/lm_eval/docstrings.jsonl").read_text().splitlines()
  docs = [json.loads(line) for line in lines]
  # The same figures by hand, a document at a time.
  right = 0
  for doc in docs:
    scores = [
      by_logits(model, *adapter.encode_pair(model, doc["context"], f" {choice}"))[0]
      for choice in doc["choices"]
    ]
    right += int(np.argmax(scores)) == doc["answer"]
  assert results["q4jax_docstrings"]["acc,none"] == pytest.approx(right / len(docs))
  nats = [
    by_logits(model, adapter.prefix(model), adapter.plain(model, doc["context"]))[0] for doc in docs
  ]
  size = sum(len(doc["context"].encode()) for doc in docs)
  expected = -sum(nats) / size / np.log(2)
  assert results["q4jax_rolling"]["bits_per_byte,none"] == pytest.approx(expected, rel=5e-3)


def test_without_the_harness(monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  with pytest.raises(q4jax.MissingDependencyError, match="q4jax\\[eval\\]"):
    adapter.register()
