"""Retrieval: tasks by a reader of our own, the trained file, resuming, a small run of curves."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import gguf
import jax
import numpy as np
import pytest

import q4jax
from experiments import kv_retrieval, train_retrieval
from experiments.retrieval import steps, tasks
from experiments.retrieval.tasks import (
  ASK,
  BOS,
  FILLER,
  KEYS,
  PASS,
  TASKS,
  VALUES,
  dialogue,
  held_out,
)
from q4jax.errors import ConfigError
from q4jax.kv.policy import get_policy, policy_names
from q4jax.model.model import Model

SIZES = tasks.Sizes(context=64, pairs=8, asked=3)
FILE = Path(train_retrieval.__file__).parent / "retrieval/retrieval.f16.gguf"


def answer(context: list[int], question: int, length: int) -> list[int]:
  """What a reader finds: the tokens after the only place where the question stands."""
  (place,) = [i for i, token in enumerate(context) if token == question]
  return context[place + 1 : place + 1 + length]


@pytest.mark.parametrize("task", TASKS)
def test_answers_stand_in_the_context(task: str) -> None:
  samples = held_out(task, 3, 40, SIZES)
  length = 4 if task == "passkey" else 1
  asked = SIZES.asked if task == "mqar" else 1
  assert samples.context.shape == (40, 64) and samples.questions.shape == (40, asked)
  assert samples.answers.shape == (40, asked, length)
  pairs = 1 if task == "passkey" else 8
  for context, questions, answers in zip(
    samples.context.tolist(), samples.questions.tolist(), samples.answers.tolist(), strict=True
  ):
    assert context[0] == BOS
    assert sum(t in FILLER for t in context) == 63 - (5 if task == "passkey" else 16)
    assert sum(t in KEYS or t == PASS for t in context) == pairs
    assert len(set(questions)) == asked
    for question, said in zip(questions, answers, strict=True):
      assert answer(context, question, length) == said and all(t in VALUES for t in said)
  starts = (samples.context[:, 1:17] >= FILLER.start).any(axis=1)
  assert starts.all() if task == "multikey" else not starts.any() if task == "mqar" else True


def test_places_are_everywhere() -> None:
  rng = np.random.default_rng(0)
  found = tasks.multikey(rng, 2000, tasks.Sizes(10, 3, 1)).context
  assert set(np.flatnonzero(np.isin(found, KEYS).any(axis=0))) == set(range(1, 9))
  found = tasks.passkey(rng, 500, tasks.Sizes(10, 0, 1)).context
  assert set(np.flatnonzero((found == PASS).any(axis=0))) == set(range(1, 6))


def test_seeds_reproduce_and_held_out_samples_are_others() -> None:
  for task in TASKS:
    one, again, other = (held_out(task, seed, 40, SIZES) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.context, again.context)
    np.testing.assert_array_equal(one.answers, again.answers)
    assert (one.context != other.context).any(axis=1).all()
  config = dataclasses.replace(TOY, contexts=(64,), pairs=(8,), symbols=(64,), batches=(96,))
  held = {
    row.tobytes() for t in TASKS for row in held_out(t, 0, 40, SIZES).context.astype(np.int32)
  }
  trained = [train_retrieval.batch(config, 0, step)[0][:, :64] for step in range(20)]
  np.testing.assert_array_equal(train_retrieval.batch(config, 0, 3)[0][:, :64], trained[3])
  rows = [row.astype(np.int32).tobytes() for part in trained for row in part]
  assert len(set(rows)) == len(rows) and not held & set(rows)


def test_no_two_purposes_share_a_stream() -> None:
  streams = [
    tasks.generator(purpose, seed, number).random()
    for purpose in get_args(tasks.Purpose)
    for seed in range(3)
    for number in range(3)
  ]
  assert len(set(streams)) == 18


def test_a_dialogue() -> None:
  samples = held_out("mqar", 0, 40, SIZES)
  (q, r, s), (a, b, c) = samples.questions[0], samples.answers[0, :, 0]
  prompt, rest, scored = dialogue(samples, twice=False)
  np.testing.assert_array_equal(prompt, samples.context)
  assert rest[0].tolist() == [ASK, q, a, ASK, r, b, ASK, s, c]
  assert scored.tolist() == [False, False, True] * 3
  prompt, again, _ = dialogue(samples, twice=True)
  assert prompt[0, 64:].tolist() == [ASK, q, ASK, r, ASK, s] and (again == rest).all()


TOY = train_retrieval.Config(
  layers=1, d_model=32, d_ffn=32, heads=2, kv_heads=1, head_dim=16,
  contexts=(16, 16), pairs=(3, 4), symbols=(8, 64), batches=(12, 12), asked=2,
  enough=0.0, last_steps=3, warmup=2, report_every=2,
)  # fmt: skip


def test_targets_are_the_answers() -> None:
  tokens, targets = train_retrieval.batch(TOY, 0, 0)
  assert tokens.shape == targets.shape == (12, 16 + 10 - 1)
  for row, said in zip(tokens.tolist(), targets.tolist(), strict=True):
    for i in np.flatnonzero(np.array(said) >= 0):
      # The last answer of a row that is not padded is no input.
      assert said[i] in VALUES and (i + 1 == len(row) or row[i + 1] == said[i])
      before = row[:16]
      assert said[i] == before[before.index(row[i]) + 1]
  answers = (targets >= 0).sum(axis=1)
  assert answers.tolist() == [4] * 4 + [2] * 8


def test_training_resumes_and_exports(tmp_path: Path) -> None:
  whole = dataclasses.replace(TOY, out=str(tmp_path / "whole"))
  result = train_retrieval.run(whole)
  assert result is not None and result["steps"] > 3
  parts = dataclasses.replace(TOY, out=str(tmp_path / "parts"), resume=1, seconds=1e-9)
  assert train_retrieval.run(parts) is None  # One step.
  again = train_retrieval.run(dataclasses.replace(parts, seconds=0))
  assert again is not None and again["steps"] == result["steps"]
  a, b = (np.load(tmp_path / name / "state.npz") for name in ("whole", "parts"))
  for name in a.files:
    if name != "progress":
      np.testing.assert_array_equal(a[name], b[name])
  lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
  assert json.loads(lines[-1])["stage"] == 1
  model = q4jax.load(result["file"])
  assert dataclasses.replace(model.config, norm_eps=1e-5) == TOY.model
  ids = model.tokenizer.encode_parts([" aab kac vbb ! ahh ? kac"], add_eos=False)
  expected = [BOS, FILLER[1], KEYS[2], VALUES[9], PASS, FILLER[63], ASK, KEYS[2]]
  assert list(ids) == expected


@pytest.fixture(scope="module")
def model() -> Model:
  return q4jax.load(FILE)


def test_the_trained_model(model: Model) -> None:
  assert FILE.stat().st_size < 2e6
  shares = train_retrieval.accuracy(model, train_retrieval.Config(seed=77), 60)
  assert set(shares) == set(TASKS) and min(shares.values()) >= 0.95, shares


SMALL = kv_retrieval.Config(
  str(FILE), ("snapkv", "random"), (0.3,), ("dense",),
  samples=16, batch=8, context=96, pairs=10, asked=2, recent=4,
)  # fmt: skip


def test_curves() -> None:
  compiled = []

  def hear(event: str, *_: object, **__: object) -> None:
    if event.endswith("backend_compile_duration"):
      compiled.append(event)

  records = kv_retrieval.run(SMALL)
  jax.monitoring.register_event_duration_secs_listener(hear)
  counts = []
  try:
    for samples in (8, 24):
      compiled.clear()
      config = dataclasses.replace(SMALL, seed=1, samples=samples, policies=("random",))
      kv_retrieval.run(config)
      counts.append(len(compiled))
  finally:
    jax.monitoring.unregister_event_duration_listener(hear)
  assert counts[0] == counts[1], "more samples, more programs"

  by = {(r["row"], r["task"], r["mode"]): r for r in records}
  assert len(records) == len(by) == 3 * 3 * 2
  for task in TASKS:
    for mode in ("agnostic", "aware"):
      dense, evicted = by["dense", task, mode], by["keep30+random", task, mode]
      assert dense["right"] >= 14 and dense["kept"] == 1 and dense["policy"] is None
      assert dense["low"] < dense["accuracy"] <= dense["high"] <= 1
      assert (evicted["keep"], evicted["policy"]) == (0.3, "random")
      assert 0.29 < evicted["kept"] < 0.32
      assert evicted["right"] <= dense["right"]
    assert evicted["right"] < 12 or task == "multikey"
  lines = kv_retrieval.table(records)
  assert len(lines) == 4 and {len(line) for line in lines} == {8}
  assert kv_retrieval.run(SMALL, records) == records


def test_right_is_what_the_model_says(model: Model) -> None:
  """The dense row against logits without any cache, sample by sample."""
  programs = steps.Programs(model)
  sizes = tasks.Sizes(64, 6, 2)
  (batch,) = steps.read(model, programs, seed=0, samples=8, size=8, sizes=sizes)
  found, _ = steps.right(model, programs, batch, None)
  expected = []
  for task in TASKS:
    for twice in (False, True):
      prompt, rest, scored = dialogue(held_out(task, 0, 8, sizes), twice)
      for row, said in zip(prompt, rest, strict=True):
        text = np.concatenate([row, said])
        likeliest = np.asarray(model.logits(text))[0, :-1].argmax(-1)
        places = len(row) + np.flatnonzero(scored)
        expected.append((likeliest[places - 1] == text[places]).all())
  assert found.tolist() == expected


class Oracle:
  """The model in float64, over whole texts; RoPE turns neighbours, as rows lie in the file."""

  def __init__(self) -> None:
    tensors = gguf.GGUFReader(FILE).tensors
    self.w = {t.name: np.asarray(t.data, np.float64).reshape(t.shape[::-1]) for t in tensors}

  def logits(self, tokens: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[T, V] of tokens [T]; seen bool[T, T]: what each token (a row) attends to."""
    angle = np.arange(len(tokens))[:, None, None] * 1e4 ** (-np.arange(16) / 16)
    turn = np.exp(1j * angle)
    x = self.w["token_embd.weight"][tokens]
    for i in range(2):
      w = {name.removeprefix(f"blk.{i}."): a for name, a in self.w.items()}
      y = self.norm(x, w["attn_norm.weight"])
      q, k, v = ((y @ w[f"attn_{n}.weight"].T).reshape(len(x), -1, 32) for n in "qkv")
      q, k = ((a[..., ::2] + 1j * a[..., 1::2]) * turn for a in (q, k))
      k, v = k.repeat(2, axis=1), v.repeat(2, axis=1)
      z = np.einsum("qhd,khd->hqk", q, k.conj()).real / 32**0.5
      e = np.where(seen, np.exp(z - z.max(-1, keepdims=True)), 0)
      y = np.einsum("hqk,khd->qhd", e / e.sum(-1, keepdims=True), v).reshape(len(x), -1)
      x = x + y @ w["attn_output.weight"].T
      y = self.norm(x, w["ffn_norm.weight"])
      gate = y @ w["ffn_gate.weight"].T
      x = x + (gate / (1 + np.exp(-gate)) * (y @ w["ffn_up.weight"].T)) @ w["ffn_down.weight"].T
    return self.norm(x, self.w["output_norm.weight"]) @ self.w["token_embd.weight"].T

  def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def test_what_eviction_loses_is_what_no_question_sees(model: Model) -> None:
  sizes, size = tasks.Sizes(96, 10, 2), 24
  (batch,) = steps.read(model, steps.Programs(model), 0, size, size, sizes)
  kv = kv_retrieval.kv_config("keep40+streaming", SMALL, 32)
  found, kept = steps.right(model, steps.Programs(model), batch, kv)
  assert kept == pytest.approx(0.4, abs=0.01)
  prompt, rest, scored = dialogue(held_out("multikey", 0, size, sizes), twice=False)
  oracle, (answered,) = Oracle(), np.flatnonzero(scored)
  text = np.concatenate([prompt, rest], axis=1)
  seen = np.tri(99, dtype=bool)
  # The questions see 4 sinks and the newest of 39 tokens that stay.
  seen[96:, 4 : 96 - 35] = False
  said = [oracle.logits(row, seen)[96 + answered - 1].argmax() for row in text]
  expected = said == rest[:, answered]
  assert 3 < expected.sum() < 20
  assert found[2 * size : 3 * size].tolist() == expected.tolist()


def test_wilson() -> None:
  # Newcombe 1998, table I: 81/263 and 0/20.
  assert kv_retrieval.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
  assert kv_retrieval.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_each_policy_once() -> None:
  names = kv_retrieval.policies(kv_retrieval.Config())
  kinds = [type(get_policy(name)) for name in names]
  assert len(set(kinds)) == len(kinds) and set(kinds) == {
    type(get_policy(n)) for n in policy_names()
  }


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"samples": 12}, "--samples=12 are no whole number of batches of --batch=8"),
    ({"policies": ("nosuch",)}, "'nosuch' is none of"),
    ({"block_size": 8}, "block_size is 8"),
  ],
)
def test_refuses(changes: dict, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    kv_retrieval.run(dataclasses.replace(SMALL, **changes))
