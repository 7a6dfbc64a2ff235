"""The training script at toy size: the model it trains is ours, data order, schedule, resuming."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import train_tiny
from experiments.tiny import checkpoint
from experiments.tiny.data import gather, windows
from experiments.tiny.forward import forward, initial_params
from q4jax.errors import FormatError
from q4jax.model.llama import Llama

TOY = train_tiny.Config(
  steps=6,
  layers=1,
  d_model=32,
  d_ffn=64,
  heads=2,
  kv_heads=1,
  head_dim=16,
  vocab_size=64,
  context=16,
  batch=4,
  short_context=16,
  short_part=0.0,
  dtype="float32",
  warmup=2,
  eval_every=2,
  steps_per_call=2,
)


@pytest.fixture
def toy(tmp_path):
  """A config whose text repeats itself: something can be learnt in a few steps."""
  row = np.tile(np.arange(2, 10, dtype=np.uint16), 100)
  for split in ("train", "validation"):
    row.tofile(tmp_path / f"{split}.bin")
  digests = {s: {"sha256": "0"} for s in ("train", "validation", "held_out")}
  (tmp_path / "corpus.json").write_text(json.dumps(digests))
  folder = str(tmp_path)
  return dataclasses.replace(TOY, data=folder, out=folder, state=f"{folder}/state.npz")


def test_forward_is_the_model_and_dropout_is_unbiased():
  params = initial_params(TOY.model, 0)
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 64)
  expected = Llama(TOY.model, lambda name, shape: params[name])(tokens)
  found = forward(params, TOY.model, tokens, jnp.dtype(jnp.float32))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

  def dropped(key, rate):
    return forward(params, TOY.model, tokens, jnp.dtype(jnp.float32), key=key, rate=rate)

  np.testing.assert_allclose(dropped(jax.random.key(0), 0.0), expected, rtol=1e-5, atol=1e-6)
  a, b = dropped(jax.random.key(0), 0.2), dropped(jax.random.key(1), 0.2)
  assert np.abs(a - expected).max() > 1e-3 and np.abs(a - b).max() > 1e-3


def test_an_epoch_covers_every_token_once_and_no_window_leaves_the_row():
  length, context, batch = 1000, 16, 7
  stream = windows(length, context, batch, seed=3)
  starts = np.concatenate([next(stream) for _ in range(200)])
  assert starts.min() >= 0 and starts.max() + context + 1 <= length
  first = np.sort(starts[: len(range(starts[:61].min(), length - context, context))])
  assert (np.diff(first) == context).all()
  assert len({int(s) % context for s in starts}) > 8  # Each epoch is shifted anew.
  again = windows(length, context, batch, seed=3)
  np.testing.assert_array_equal(next(again), starts[:batch])


def test_windows_begin_with_bos_and_targets_are_the_next_tokens():
  row = jnp.arange(100, dtype=jnp.int32)
  tokens, targets = gather(row, jnp.array([5, 40]), 4)
  assert tokens.tolist() == [[0, 6, 7, 8], [0, 41, 42, 43]]
  assert targets.tolist() == [[6, 7, 8, 9], [41, 42, 43, 44]]


def test_one_step_is_adamw():
  config = dataclasses.replace(TOY, dropout=0.0, warmup=1)
  params = initial_params(config.model, 0)
  row = jax.random.randint(jax.random.key(2), (200,), 2, 64)
  starts = np.array([[0, 30, 60, 90]], np.int32)
  tokens, targets = gather(row, jnp.asarray(starts[0]), config.context)

  def objective(params):
    logits = Llama(config.model, lambda name, shape: params[name])(tokens)
    p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(p, targets[..., None], axis=-1).mean()

  value, grads = jax.value_and_grad(objective)(params)
  oracle = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      config.learning_rate,
      b2=0.95,
      weight_decay=config.weight_decay,
      mask={name: "norm" not in name for name in params},
    ),
  )
  params_before = {name: np.asarray(p) for name, p in params.items()}
  updates, _ = oracle.update(grads, oracle.init(params), params)
  expected = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
  train = train_tiny.make_train(config, jnp.dtype(jnp.float32), "xla")
  state = train_tiny.optimizer(config).init(params)
  new, _, loss, norm = train(params, state, row, starts, np.int32(0), np.float32(10))
  np.testing.assert_allclose(loss, value, rtol=1e-5)
  size = math.sqrt(sum(float(np.square(g).sum()) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(norm, size, rtol=1e-4)
  for name, want in expected.items():
    if name.startswith("blk.") and params_before[name].ndim == 2:
      _check_muon(params_before[name], grads[name], np.asarray(new[name]), config)
    else:
      # Adam divides a gradient by its size: where that is near 0, rounding decides.
      assert np.mean(np.abs(new[name] - want) < 1e-5) > 0.99, name


def _check_muon(before, gradient, after, config):
  """The step lies along U V^T of the gradient's singular value decomposition."""
  rate = float(train_tiny.learning_rate(np.float32(0), np.float32(10), config))
  step = (before * (1 - rate * config.weight_decay) - after) / rate
  u, s, vt = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
  kept = s > 0.05 * s[0]  # Five Newton-Schulz steps leave the smallest behind.
  scaled = (u.T @ step @ vt.T).diagonal()[kept] / (0.2 * max(before.shape) ** 0.5)
  assert ((scaled > 0.5) & (scaled < 1.4)).all(), scaled


def test_short_windows_come_first(toy, capsys):
  toy = dataclasses.replace(toy, steps=12, short_context=4, short_part=0.5)
  record = train_tiny.run(toy)
  assert record["step"] == 12 and record["tokens"] == 12 * 64
  assert np.isfinite(record["validation"])


def test_learning_rate_rises_stays_and_falls_to_zero():
  steps = np.arange(101, dtype=np.float32)
  config = dataclasses.replace(TOY, warmup=20, learning_rate=2.0, short_part=0.6)
  rates = np.array([train_tiny.learning_rate(s, np.float32(100), config) for s in steps])
  np.testing.assert_allclose(rates[:20], np.arange(1, 21) / 10, rtol=1e-6)
  np.testing.assert_allclose(rates[19:61], 2.0, rtol=1e-6)
  np.testing.assert_allclose(rates[60:], np.linspace(2, 0, 41), rtol=1e-5, atol=1e-6)


def test_short_steps_go_on_towards_another_number_of_steps(toy):
  toy = dataclasses.replace(toy, steps=40, short_context=8, short_part=0.5)
  train_tiny.run(toy)
  with np.load(toy.state) as arrays:
    straight = {name: arrays[name] for name in arrays.files}
  _stop_after(dataclasses.replace(toy, steps=1000, context=8, batch=8), 10)
  train_tiny.run(dataclasses.replace(toy, resume=True))
  with np.load(toy.state) as arrays:
    for name, value in straight.items():
      if name != "progress":
        np.testing.assert_allclose(arrays[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_training_learns_saves_and_resumes_to_the_same_weights(toy, tmp_path):
  toy = dataclasses.replace(toy, steps=40, learning_rate=0.02)
  record = train_tiny.run(toy)
  assert record["validation"] < 0.8 * math.log(64)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [m["step"] for m in lines] == list(range(2, 41, 2))
  assert record["validation"] == min(m["validation"] for m in lines)
  params, config, saved = checkpoint.load(tmp_path)
  assert saved == record and config == toy.model
  shapes = {name: p.shape for name, p in initial_params(config, 0).items()}
  assert {name: p.shape for name, p in params.items()} == shapes

  # Stopped after 20 of 40 steps, as a kill leaves it, and resumed: the same final state.
  with np.load(toy.state) as arrays:
    straight = {name: arrays[name] for name in arrays.files}
  _stop_after(toy, 20)
  train_tiny.run(dataclasses.replace(toy, resume=True))
  with np.load(toy.state) as arrays:
    for name, value in straight.items():
      if name != "progress":
        np.testing.assert_allclose(arrays[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def _stop_after(config, steps):
  """Leaves the state file as it was at `steps`."""
  params = initial_params(config.model, config.seed)
  state = train_tiny.optimizer(config).init(params)
  train = train_tiny.make_train(config, jnp.dtype(jnp.float32), "xla")
  row = jnp.asarray(np.fromfile(f"{config.data}/train.bin", np.uint16).astype(np.int32))
  stream = windows(len(row), config.context, config.batch, config.seed)
  starts = np.stack([next(stream) for _ in range(steps)])
  params, state, *_ = train(params, state, row, starts, np.int32(0), np.float32(config.steps))
  checkpoint.save_state(
    train_tiny.Path(config.state), params, state, (steps, config.steps, math.inf)
  )


def test_a_time_budget_sets_the_number_of_steps(toy):
  toy = dataclasses.replace(toy, steps=0, minutes=0.4, warmup=8, eval_every=100_000)
  with pytest.raises(ValueError, match="either --minutes or --steps"):
    train_tiny.run(dataclasses.replace(toy, steps=5))
  record = train_tiny.run(toy)
  # The budget is less than the reserve for evaluation and saving: the warm-up at most, and saved.
  assert 2 <= record["step"] <= 8 and record["total"] in (0, 8)


def test_checkpoints_come_in_parts_that_belong_together(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, "PART_BYTES", 10_000)
  params = {n: np.asarray(p) for n, p in initial_params(TOY.model, 0).items()}
  paths = checkpoint.save(tmp_path, params, TOY.model, {"step": 1})
  assert len(paths) > 2 and not list(tmp_path.glob("*.tmp"))
  loaded, config, record = checkpoint.load(tmp_path)
  assert config == TOY.model and record == {"step": 1}
  for name, value in params.items():
    np.testing.assert_array_equal(loaded[name], value.astype(loaded[name].dtype))
    assert loaded[name].dtype == (np.float32 if "norm" in name else np.float16)
  other = paths[1].read_bytes()
  checkpoint.save(tmp_path, params, TOY.model, {"step": 2})
  paths[1].write_bytes(other)
  with pytest.raises(FormatError, match="part2.npz is of another checkpoint"):
    checkpoint.load(tmp_path)
  paths[1].unlink()
  with pytest.raises(FormatError, match="part2.npz does not exist"):
    checkpoint.load(tmp_path)
