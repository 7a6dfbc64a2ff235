r"""Trains the embedded model `tiny`: a Llama of 4.2 million weights, on the text of Python's docs.

  python -m experiments.tiny.prepare --out=runs/tiny        # once: tokenizer and token arrays
  XLA_FLAGS=--xla_cpu_use_xnnpack=true python -m experiments.train_tiny --minutes=150

Expected, with two Zen 3 cores to itself and --dtype=float32: 1.8 s a step of 6144 tokens while
windows are short, 2.4 s after that. The model in q4jax/data had
`--dtype=float32 --steps=1200 --short_part=0.75 --steps_per_call=10 --eval_every=50` (7.4 million
tokens; interrupted and resumed): 3.258 nats a token of validation text. `--steps=3` shows that it
runs.

Muon for the matrices, Adam for the rest, float32 master weights, bfloat16 products (twice as fast
where the CPU has AVX512-BF16; slower where it has not). Each epoch cuts the row of all documents in
windows at a fresh random shift, so that a long document goes on from one into the next. Most
steps have windows of --short_context tokens, the last ones of --context: attention costs less that
way, and long context is learnt last. Every window starts with BOS. The learning rate warms up,
stays while windows are short and falls in a line while they are long, so an interrupted run may go
on towards another number of steps (--resume --steps) as if it had been meant from the start.

`--minutes` measures the speed and fits the schedule to the time, which must include compilation:
give less than any hard limit, and expect fewer steps to fit if long windows are slower. The number
of steps is recorded; `--steps` repeats a run exactly. Writes --out/metrics.jsonl and the checkpoint
of lowest validation loss (tiny-f16.part*.npz), as training goes. --state is where training resumes
from after an interruption (--resume).
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from absl import app, flags

from experiments.tiny import checkpoint
from experiments.tiny.data import gather, windows
from experiments.tiny.forward import Attention, Params, forward, initial_params, pick_attention
from q4jax.config import LlamaConfig

Train = Callable[..., tuple[Params, optax.OptState, jax.Array, jax.Array]]
_ENDLESS = 10**9  # Steps.
_BEGIN = time.monotonic()  # Loading libraries and data counts towards --minutes.


def _setting(default: Any, help: str) -> Any:
  return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Config:
  """A training run; each field is also a flag."""

  data: str = _setting("runs/tiny", "Folder of train.bin and validation.bin.")
  out: str = _setting("runs/tiny", "Folder for metrics.jsonl and the best checkpoint.")
  state: str = _setting("runs/tiny/state.npz", "File to save the whole state in once a minute.")
  resume: bool = _setting(False, "Go on from --state.")
  minutes: float = _setting(0.0, "Time for everything; the schedule is fitted to it.")
  steps: int = _setting(0, "Exact number of steps, instead of --minutes.")
  seed: int = _setting(0, "Seed of the weights, the data order and dropout.")
  layers: int = _setting(4, "Transformer layers.")
  d_model: int = _setting(256, "Width; a multiple of 256 for the k-quants.")
  d_ffn: int = _setting(768, "Feed-forward width; a multiple of 256.")
  heads: int = _setting(2, "Query heads.")
  kv_heads: int = _setting(1, "Key and value heads.")
  head_dim: int = _setting(128, "Dimensions of a head.")
  vocab_size: int = _setting(4096, "Tokens of the tokenizer.")
  context: int = _setting(2048, "Tokens in a window.")
  batch: int = _setting(3, "Windows in a step.")
  short_context: int = _setting(512, "Tokens in a window at first; a step has as many tokens.")
  short_part: float = _setting(0.85, "Part of the steps that have short windows.")
  learning_rate: float = _setting(4e-3, "Largest learning rate.")
  warmup: int = _setting(80, "Steps of linear warm-up.")
  weight_decay: float = _setting(0.05, "Of matrices, times the learning rate.")
  dropout: float = _setting(0.0, "Of embeddings and residual branches.")
  eval_every: int = _setting(200, "Steps between evaluations.")
  steps_per_call: int = _setting(20, "Steps in one jitted call.")
  dtype: str = _setting("bfloat16", "Operands of the matrix products: bfloat16 or float32.")
  attention: str = _setting("auto", "xla, cudnn, or auto: cudnn where it works.")

  @property
  def model(self) -> LlamaConfig:
    return LlamaConfig(
      architecture="llama",
      vocab_size=self.vocab_size,
      context_length=self.context,
      d_model=self.d_model,
      d_ffn=self.d_ffn,
      num_layers=self.layers,
      num_heads=self.heads,
      num_kv_heads=self.kv_heads,
      head_dim=self.head_dim,
      tied=True,
    )


def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Nats a token."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def _norm(tree: Params) -> jax.Array:
  return jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree)))


def _matrices(params: Params) -> Any:
  # Without this optax stumbles over the parameters that are not Muon's.
  return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)


def optimizer(config: Config) -> optax.GradientTransformation:
  """Muon for the layers' matrices, Adam for the embedding and norms, before the learning rate.

  Muon (Jordan et al. 2024) steps along the gradient's orthogonal factor; its updates are scaled to
  the root mean square of Adam's, 0.2 (arXiv 2502.16982), so that one learning rate serves both.
  """
  muon = optax.chain(
    optax.contrib.scale_by_muon(weight_dimension_numbers=_matrices),
    optax.stateless(
      lambda updates, _: jax.tree.map(lambda u: 0.2 * max(u.shape) ** 0.5 * u, updates)
    ),
  )
  adam = optax.scale_by_adam(b1=0.9, b2=0.95)

  def labels(params: Params) -> dict[str, str]:
    return {
      n: "muon" if p.ndim == 2 and n.startswith("blk.") else "adam" for n, p in params.items()
    }

  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.multi_transform({"muon": muon, "adam": adam}, labels),
    optax.add_decayed_weights(
      config.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    ),
  )


def learning_rate(step: jax.Array, total: jax.Array, config: Config) -> jax.Array:
  """Linear warm-up, constant while windows are short, then a line down to 0 at `total`."""
  turn = config.short_part * total
  left = jnp.clip((total - step) / jnp.maximum(total - turn, 1), 0, 1)
  warm = jnp.minimum(1.0, (step + 1) / config.warmup)
  return config.learning_rate * warm * left


def make_train(config: Config, dtype: jnp.dtype, attention: Attention) -> Train:
  """A jitted function that takes many steps in one call; its first two arguments are donated."""
  transform = optimizer(config)

  def train(
    params: Params,
    opt_state: optax.OptState,
    row: jax.Array,
    starts: jax.Array,
    first_step: jax.Array,
    total: jax.Array,
  ) -> tuple[Params, optax.OptState, jax.Array, jax.Array]:
    """`starts` int32[steps, B] -> new (params, opt_state), mean loss and largest gradient norm."""

    def one(
      carry: tuple[Params, optax.OptState], inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[Params, optax.OptState], tuple[jax.Array, jax.Array]]:
      params, opt_state = carry
      step, start = inputs
      key = jax.random.fold_in(jax.random.key(config.seed), step)
      tokens, targets = gather(row, start, config.context)

      def objective(params: Params) -> jax.Array:
        logits = forward(params, config.model, tokens, dtype, attention, key, config.dropout)
        return loss(logits, targets)

      value, grads = jax.value_and_grad(objective)(params)
      updates, opt_state = transform.update(grads, opt_state, params)
      rate = learning_rate(step.astype(jnp.float32), total, config)
      params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
      return (params, opt_state), (value, _norm(grads))

    steps = first_step + jnp.arange(len(starts), dtype=jnp.int32)
    (params, opt_state), (values, norms) = jax.lax.scan(one, (params, opt_state), (steps, starts))
    return params, opt_state, values.mean(), norms.max()

  return jax.jit(train, donate_argnums=(0, 1))


def make_evaluate(
  config: Config, dtype: jnp.dtype, attention: Attention
) -> Callable[[Params, jax.Array, np.ndarray], float]:
  """A function from params, a row of tokens and starts int32[W] to nats a token over windows."""

  @jax.jit
  def batch_loss(params: Params, row: jax.Array, starts: jax.Array) -> jax.Array:
    tokens, targets = gather(row, starts, config.context)
    return loss(forward(params, config.model, tokens, dtype, attention), targets)

  def evaluate(params: Params, row: jax.Array, starts: np.ndarray) -> float:
    # Equal batches, so that one compilation serves and every window counts the same.
    size = min(8, config.batch, len(starts))
    batches = starts[: len(starts) // size * size].reshape(-1, size)
    return float(np.mean([batch_loss(params, row, batch) for batch in batches]))

  return evaluate


def _short(config: Config) -> Config:
  """The first phase: shorter windows, more of them."""
  if config.context % config.short_context:
    raise ValueError("--context must be a multiple of --short_context.")
  more = config.context // config.short_context
  return dataclasses.replace(config, context=config.short_context, batch=config.batch * more)


def _turn(total: int, config: Config) -> int:
  """The step from which windows are long and the learning rate falls."""
  return int(config.short_part * total)


class _Phase:
  """The compiled function and the data of one length of windows."""

  def __init__(self, config: Config, dtype: jnp.dtype, attention: Attention, length: int):
    self.train = make_train(config, dtype, attention)
    self.batches = windows(length, config.context, config.batch, config.seed)

  def skip(self, steps: int) -> None:
    for _ in range(steps):
      next(self.batches)

  def next(self, steps: int) -> np.ndarray:
    return np.stack([next(self.batches) for _ in range(steps)])


def run(config: Config, begin: float | None = None) -> dict[str, Any]:
  """Trains and writes checkpoints. Returns the record of the best one.

  Args:
    begin: the `time.monotonic()` that --minutes counts from; now if None.
  """
  begin = time.monotonic() if begin is None else begin
  if bool(config.minutes) == bool(config.steps) and not config.resume:
    raise ValueError("give either --minutes or --steps.")
  deadline = begin + 60 * config.minutes if config.minutes else math.inf
  on_gpu = jax.default_backend() == "gpu"
  # CPUs with AVX512-BF16 multiply it twice as fast too.
  dtype = jnp.dtype(config.dtype)
  attention = pick_attention(config.attention) if on_gpu else "xla"
  row, validation_row = (
    np.fromfile(Path(config.data) / f"{split}.bin", np.uint16).astype(np.int32)
    for split in ("train", "validation")
  )
  on_device, validation = jnp.asarray(row), jnp.asarray(validation_row)
  whole = np.arange(0, len(validation_row) - config.context, config.context, dtype=np.int32)
  # As many windows of the training text show how far that is learnt by heart.
  sample = np.linspace(0, len(row) - config.context - 1, len(whole)).astype(np.int32)

  params = initial_params(config.model, config.seed)
  opt_state = optimizer(config).init(params)
  step, total, best = 0, config.steps, math.inf
  if config.resume:
    params, opt_state, stood = checkpoint.load_state(Path(config.state), opt_state)
    step, total, best = int(stood[0]), int(stood[1]), stood[2]
    total = config.steps or total
  phases = [_Phase(c, dtype, attention, len(row)) for c in (_short(config), config)]
  evaluate = make_evaluate(config, dtype, attention)
  turn = _turn(total or _ENDLESS, config)
  phases[0].skip(min(step, turn))
  phases[1].skip(max(step - turn, 0))
  record = _description(config, sum(p.size for p in params.values()), dtype, attention)
  print(json.dumps(record), file=sys.stderr)

  calls: list[float] = []
  saved = time.monotonic()
  last = False
  while not last:
    mark = time.monotonic()
    # Steps with short windows do not depend on how many there will be.
    planned = total or _ENDLESS
    turn = _turn(planned, config)
    phase = phases[step >= turn]
    steps = min(config.steps_per_call, planned - step, turn - step if step < turn else planned)
    starts = phase.next(steps)
    params, opt_state, train_loss, norm = phase.train(
      params, opt_state, on_device, starts, np.int32(step), np.float32(planned)
    )
    step += steps
    metrics = {"step": step, "total": total, "train_loss": float(train_loss)}
    calls.append(time.monotonic() - mark)
    if not total and len(calls) == 3:
      # The first call compiled. 6% and 25 seconds are for evaluating and saving.
      seconds_per_step = sum(calls[1:]) / (2 * config.steps_per_call)
      left = deadline - time.monotonic() - 25
      total = max(config.warmup, step + int(0.94 * left / seconds_per_step))
      print(f"{seconds_per_step:.4f} s a step: {total} steps fit", file=sys.stderr)
    last = step == total or time.monotonic() > deadline - 15
    due = total and step // config.eval_every > (step - steps) // config.eval_every
    if not due and not last:
      continue
    metrics |= {
      "tokens": step * config.batch * config.context,
      "validation": evaluate(params, validation, whole),
      "sample": evaluate(params, on_device, sample),
      "gradient_norm": float(norm),
      "seconds": time.monotonic() - begin,
    }
    if metrics["validation"] < best:
      best = metrics["validation"]
      host = {name: np.asarray(p) for name, p in params.items()}
      checkpoint.save(Path(config.out), host, config.model, record | metrics)
    _report(Path(config.out), metrics, best)
    if time.monotonic() - saved > 60 or last:
      saved = time.monotonic()
      checkpoint.save_state(Path(config.state), params, opt_state, (step, total, best))
  return checkpoint.load(Path(config.out))[2]


def _description(
  config: Config, count: int, dtype: jnp.dtype, attention: Attention
) -> dict[str, Any]:
  settings = dataclasses.asdict(config)
  for folder in ("data", "out", "state", "resume"):
    del settings[folder]
  corpus = json.loads((Path(config.data) / "corpus.json").read_text())
  return {
    "config": settings,
    "parameters": count,
    "device": jax.devices()[0].device_kind,
    "dtype": dtype.name,
    "attention": attention,
    "versions": {
      "python": sys.version.split()[0],
      "jax": jax.__version__,
      "flax": flax.__version__,
      "optax": optax.__version__,
    },
    "corpus": {s: corpus[s]["sha256"] for s in ("train", "validation", "held_out")},
  }


def _report(out: Path, metrics: dict[str, Any], best: float) -> None:
  out.mkdir(parents=True, exist_ok=True)
  with (out / "metrics.jsonl").open("a") as file:
    file.write(json.dumps(metrics) + "\n")
  done = metrics["step"] / max(metrics["total"], metrics["step"])
  print(
    f"[{'#' * int(30 * done):<30}] {metrics['step']}/{metrics['total']} "
    f"train {metrics['train_loss']:.4f} validation {metrics['validation']:.4f} (best {best:.4f}) "
    f"sample {metrics['sample']:.4f} norm {metrics['gradient_norm']:.2f} "
    f"{metrics['tokens'] / metrics['seconds'] / 1e3:.0f}k tok/s {metrics['seconds']:.0f} s",
    file=sys.stderr,
    flush=True,
  )


def main(_: list[str]) -> None:
  names = [f.name for f in dataclasses.fields(Config)]
  settings: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
  print(json.dumps(run(Config(**settings), _BEGIN)))


def _define_flags() -> None:
  define: dict[Any, Callable[..., Any]] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
  for field in dataclasses.fields(Config):
    define[field.type](field.name, field.default, field.metadata["help"])


if __name__ == "__main__":
  _define_flags()
  app.run(main)
