r"""Trains the retrieval model: a Llama of 0.2 million weights that finds what its context says.

  python -m experiments.train_retrieval --out=runs/retrieval
  python -m experiments.train_retrieval --out=runs/retrieval --resume=1 --seconds=90   # in slices

The model answers the questions of experiments/retrieval/tasks.py; the loss is that of the answers
alone. It needs two heads in a row (an induction head): one that looks at the token before, one that
looks for the value before which the asked key stands. Neither is of use without the other, so
random weights stay long at guessing among the context's values: 1000 steps changed nothing. With
the first head given (--look_back) the second appeared within 200. Stages of the curriculum go from
short contexts with few pairs and symbols to long ones; the next begins when --enough answer tokens
are right. From there on in the last one the learning rate falls in a line to 0.

Muon for the matrices, Adam for the rest, as in experiments/train_tiny.py. The samples of a step
depend on --seed and the step's number alone, so an interrupted run goes on as if it had not been.

Writes to --out: metrics.jsonl, state.npz (every 200 steps and at the end), and when trained
retrieval.f16.gguf; prints its accuracy on held-out samples. About 1000 steps, 16 minutes on one
busy core. To see that it runs: `--contexts=12,24 --pairs=4,6 --symbols=8,16 --batches=96,96`.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app

import q4jax
from experiments import config_flags, train_tiny
from experiments.config_flags import option
from experiments.provenance import provenance
from experiments.retrieval.export import export
from experiments.retrieval.tasks import (
  EOS,
  PASSKEY_LENGTH,
  TASKS,
  VOCAB_SIZE,
  Ints,
  Sizes,
  dialogue,
  generator,
  held_out,
)
from experiments.tiny import checkpoint
from experiments.tiny.forward import Params, initial_params
from q4jax.config import LlamaConfig
from q4jax.model.llama import Llama
from q4jax.model.model import Model


@dataclasses.dataclass(frozen=True)
class Config:
  """A training run."""

  out: str = option("runs/retrieval", "Folder of the state and metrics.jsonl.")
  resume: int = option(0, "1: go on from the state in --out.")
  seconds: float = option(0.0, "Stop (and save) after this time; 0: when trained.")
  seed: int = option(0, "Seed of the weights and of the samples.")
  layers: int = option(2, "Layers.")
  d_model: int = option(128, "Width.")
  d_ffn: int = option(128, "Feed-forward width.")
  heads: int = option(4, "Query heads.")
  kv_heads: int = option(2, "Key and value heads.")
  head_dim: int = option(32, "Dimensions of a head.")
  contexts: tuple[int, ...] = option((12, 24, 64, 128, 256), "Tokens before questions, by stage.")
  pairs: tuple[int, ...] = option((4, 6, 8, 12, 16), "Pairs in a context, by stage.")
  symbols: tuple[int, ...] = option((8, 16, 32, 64, 64), "Keys and values in use, by stage.")
  batches: tuple[int, ...] = option((96, 96, 96, 48, 36), "Samples in a step, by stage.")
  asked: int = option(4, "Questions of mqar.")
  enough: float = option(0.97, "Share of right answer tokens that ends a stage.")
  last_steps: int = option(200, "Steps of the last stage once it is at that share: lr falls to 0.")
  look_back: float = option(0.6, "Size of the first weights that make a head look back; 0: none.")
  learning_rate: float = option(3e-3, "Largest learning rate.")
  warmup: int = option(50, "Steps of linear warm-up.")
  weight_decay: float = option(0.05, "Of matrices, times the learning rate.")
  report_every: int = option(50, "Steps between reports.")

  @property
  def model(self) -> LlamaConfig:
    return LlamaConfig(
      architecture="llama",
      vocab_size=VOCAB_SIZE,
      context_length=2 * self.contexts[-1],
      d_model=self.d_model,
      d_ffn=self.d_ffn,
      num_layers=self.layers,
      num_heads=self.heads,
      num_kv_heads=self.kv_heads,
      head_dim=self.head_dim,
      tied=True,
    )

  def sizes(self, stage: int) -> Sizes:
    return Sizes(self.contexts[stage], self.pairs[stage], self.asked, self.symbols[stage])


def batch(config: Config, stage: int, step: int) -> tuple[Ints, Ints]:
  """Tokens int32[B, T] and targets int32[B, T], -1 where nothing is asked: as many samples of each
  task, half of them with the questions read twice.
  """
  rng = generator("training", config.seed, step)
  sizes = config.sizes(stage)
  # The longest is mqar's with questions read twice, or passkey's: a question is 2 tokens.
  length = sizes.context + max(5 * config.asked, 4 + PASSKEY_LENGTH)
  rows, targets = [], []
  for task in TASKS.values():
    for twice in (False, True):
      count = config.batches[stage] // 6
      # Several questions in multikey too, for there is more to learn from them.
      samples = task(rng, count, sizes)
      prompt, rest, scored = dialogue(samples, twice)
      text = np.concatenate([prompt, rest], axis=1)
      said = np.concatenate([np.full_like(prompt, -1), np.where(scored, rest, -1)], axis=1)
      pad = ((0, 0), (0, length - text.shape[1]))
      rows.append(np.pad(text, pad, constant_values=EOS))
      targets.append(np.pad(said, pad, constant_values=-1))
  return np.concatenate(rows)[:, :-1], np.concatenate(targets)[:, 1:]


def first_params(config: Config) -> Params:
  """Random, but for head 0 of layer 0, which looks at the token before.

  All embeddings get the same number in channel 0, and query and key are made of it, so that their
  product after RoPE is a sum of cos(theta * (distance - 1)) over the fastest channels.
  """
  params = initial_params(config.model, config.seed)
  if not config.look_back:
    return params
  half = config.head_dim // 2
  angle = config.model.rope_theta ** (-np.arange(half) / half)
  size = np.where(np.arange(half) < half // 2, config.look_back, 0.0)
  query = np.concatenate([size, 0 * size])
  key = np.concatenate([size * np.cos(angle), size * np.sin(angle)])

  def put(name: str, column: np.ndarray) -> None:
    params[name] = params[name].at[: len(column), 0].set(column)

  put("token_embd.weight", np.full(VOCAB_SIZE, 0.2))
  put("blk.0.attn_q.weight", query)
  put("blk.0.attn_k.weight", key)
  return params


def optimizer(weight_decay: float) -> optax.GradientTransformation:
  """That of train_tiny, before the learning rate."""
  return train_tiny.optimizer(train_tiny.Config(weight_decay=weight_decay))


@functools.cache
def make_step(
  model: LlamaConfig, weight_decay: float
) -> Callable[..., tuple[Params, Any, jax.Array]]:
  """A jitted step; its first two arguments are donated. It also returns the loss and the share of
  right answer tokens, of all and of each task: float32[2 + tasks].
  """
  transform = optimizer(weight_decay)

  def objective(params: Params, tokens: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
    logits = Llama(model, lambda name, shape: params[name])(tokens)
    asked = targets >= 0
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets.clip(0))
    mean = jnp.sum(loss * asked) / asked.sum()
    right = (logits.argmax(-1) == targets) & asked
    # Rows of a task are neighbours.
    each = right.reshape(len(TASKS), -1).sum(-1) / asked.reshape(len(TASKS), -1).sum(-1)
    return mean, (right.sum() / asked.sum(), each)

  def step(
    params: Params, opt_state: Any, tokens: jax.Array, targets: jax.Array, rate: jax.Array
  ) -> tuple[Params, Any, jax.Array]:
    (loss, (right, each)), grads = jax.value_and_grad(objective, has_aux=True)(
      params, tokens, targets
    )
    updates, opt_state = transform.update(grads, opt_state, params)
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return params, opt_state, jnp.concatenate([jnp.stack([loss, right]), each])

  return jax.jit(step, donate_argnums=(0, 1))


@dataclasses.dataclass
class Progress:
  """Where training stands.

  Attributes:
    step: steps taken.
    stage: of the curriculum.
    since: the step in which the last stage was good enough, -1 before; the rate falls from there.
    mean: running mean of the share of right answer tokens in this stage.
    seconds: time taken by all runs that were joined.
  """

  step: int = 0
  stage: int = 0
  since: int = -1
  mean: float = 0.0
  seconds: float = 0.0

  def rate(self, config: Config) -> float:
    """The learning rate of the next step."""
    warm = min(1.0, (self.step + 1) / config.warmup)
    left = 1.0 if self.since < 0 else 1 - (self.step - self.since) / config.last_steps
    return config.learning_rate * warm * left

  def took(self, right: float, config: Config) -> None:
    """Counts a step with this share of right answer tokens."""
    self.step += 1
    self.mean += 0.05 * (right - self.mean)
    if self.mean < config.enough or self.since >= 0:
      return
    if self.stage < len(config.contexts) - 1:
      self.stage, self.mean = self.stage + 1, 0.0
    else:
      self.since = self.step

  def done(self, config: Config) -> bool:
    return self.since >= 0 and self.step >= self.since + config.last_steps


def run(config: Config) -> dict[str, Any] | None:
  """Trains until done and returns what `finish` does, or None when --seconds are over."""
  begin = time.monotonic()
  out = Path(config.out)
  params = first_params(config)
  opt_state = optimizer(config.weight_decay).init(params)
  at = Progress()
  if config.resume and (out / "state.npz").exists():
    params, opt_state, stood = checkpoint.load_state(out / "state.npz", opt_state)
    at = Progress(*map(int, stood[:3]), *stood[3:])
  step = make_step(config.model, config.weight_decay)
  before = at.seconds
  while not at.done(config):
    tokens, targets = batch(config, at.stage, at.step)
    rate = np.float32(at.rate(config))
    params, opt_state, measured = step(params, opt_state, tokens, targets, rate)
    loss, right, *by_task = np.asarray(measured).tolist()
    at.took(right, config)
    spent = time.monotonic() - begin
    at.seconds = before + spent
    late = 0 < config.seconds < spent
    if at.step % config.report_every == 0 or late or at.done(config):
      _report(out, config, at, loss, by_task)
    if at.step % 200 == 0 or late or at.done(config):
      checkpoint.save_state(out / "state.npz", params, opt_state, dataclasses.astuple(at))
    if late and not at.done(config):
      return None
  return finish(config, params, at)


def accuracy(model: Model, config: Config, samples: int) -> dict[str, float]:
  """Share of held-out samples of the last stage's size, by task, all of whose answers are right."""
  shares = {}
  for task in TASKS:
    drawn = held_out(task, config.seed, samples, config.sizes(-1))
    prompt, rest, scored = dialogue(drawn, twice=False)
    text = np.concatenate([prompt, rest], axis=1)
    said = np.asarray(model.logits(text)[:, prompt.shape[1] - 1 : -1]).argmax(-1)
    shares[task] = float(((said == rest) | ~scored).all(axis=1).mean())
  return shares


def finish(config: Config, params: Params, at: Progress) -> dict[str, Any]:
  """Writes the model file and returns what it is worth."""
  path = Path(config.out) / "retrieval.f16.gguf"
  settings = dataclasses.asdict(config)
  for name in ("out", "resume", "seconds"):
    del settings[name]
  record = {**provenance(), "config": settings, "steps": at.step, "seconds": round(at.seconds)}
  export(path, {name: np.asarray(p) for name, p in params.items()}, config.model, record)
  return {"steps": at.step, **accuracy(q4jax.load(path), config, 400), "file": str(path)}


def _report(out: Path, config: Config, at: Progress, loss: float, by_task: list[float]) -> None:
  out.mkdir(parents=True, exist_ok=True)
  shares = dict(zip(TASKS, by_task, strict=True))
  with (out / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({**dataclasses.asdict(at), "loss": loss, **shares}) + "\n")
  print(
    f"step {at.step} context {config.contexts[at.stage]} loss {loss:.4f} "
    f"{' '.join(f'{task} {100 * share:.0f} %' for task, share in shares.items())} "
    f"mean {100 * at.mean:.1f} % {at.seconds:.0f} s",
    file=sys.stderr,
    flush=True,
  )


def main(_: list[str]) -> None:
  result = run(config_flags.read(Config))
  print(json.dumps(result) if result else "not done: again with --resume=1.")


if __name__ == "__main__":
  config_flags.define(Config)
  app.run(main)
