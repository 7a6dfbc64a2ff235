"""Trains a student end to end: one compiled step, on one device or a mesh of them.

A step draws its windows by (seed, step), so a run that was killed goes on from its last checkpoint
exactly as if nothing had happened. The batch is split over the mesh's axis "data", matrices by
their outputs over "model"; XLA adds the communication.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from q4jax.errors import ConfigError, MissingDependencyError, TrainingError
from q4jax.model.layers import Matmul
from q4jax.model.llama import Llama
from q4jax.qat.checkpoints import Checkpoints
from q4jax.qat.data import Windows
from q4jax.qat.loss import LOSSES, Loss, cross_entropy, kl
from q4jax.qat.metrics import Metrics
from q4jax.qat.rates import with_rates
from q4jax.qat.student import Student, with_rounding
from q4jax.qat.variants import Recipe, trained

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How to train.

  Attributes:
    steps: of the optimizer.
    loss: ce (the text), kl (to the float model's predictions), or both, added.
    weight_rate, quantizer_rate: largest learning rates of AdamW; None for `rates.suited`.
    warmup: share of the steps in which rates rise; they then fall as a cosine to a tenth.
    weight_decay: of weights.
    accumulate: parts a batch is run in, one after another; divides it.
    dtype: of matrix products, "float32" or "bfloat16"; parameters are float32.
    save_every: steps between checkpoints.
    data, model: the mesh.
  """

  steps: int = 200
  loss: Loss = "kl"
  weight_rate: float | None = None
  quantizer_rate: float | None = None
  warmup: float = 0.05
  weight_decay: float = 0.0
  clip: float = 1.0
  accumulate: int = 1
  dtype: str = "float32"
  save_every: int = 100
  data: int = 1
  model: int = 1

  def __post_init__(self) -> None:
    if self.loss not in LOSSES or self.dtype not in ("float32", "bfloat16"):
      raise ConfigError(
        f"loss={self.loss!r} must be one of {', '.join(LOSSES)}, dtype={self.dtype!r} float32 or "
        "bfloat16."
      )
    for name in ("steps", "accumulate", "save_every", "data", "model"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
    devices = len(jax.devices())
    if self.data * self.model > devices:
      raise ConfigError(
        f"a mesh of {self.data} x {self.model} needs as many devices; there are {devices}."
      )


def train(
  student: Student,
  recipe: Recipe,
  teacher: Mapping[str, Any],
  windows: Windows,
  config: TrainConfig,
  folder: Path | None = None,
  *,
  resume: bool = False,
  progress: Progress | None = None,
  on_step: Callable[[dict[str, float]], None] | None = None,
) -> Student:
  """The trained student.

  Args:
    student: as `variants.initial` made it; it is not changed.
    recipe: which of its variables learn.
    teacher: the float parameters by name, for the loss kl.
    windows: what it reads; its batch is divisible by config.accumulate times config.data.
    config: how.
    folder: of checkpoints and metrics.jsonl; None to keep nothing.
    resume: go on from the folder's last checkpoint.
    progress: called with steps done and in all.
    on_step: called with each step's metrics.

  Raises:
    TrainingError: the loss is not finite: checkpoints are left as they were.
    ConfigError: the folder holds another run's checkpoints; or the batch cannot be split.
  """
  if recipe.variant == "ptq":
    return student
  if windows.batch % (config.accumulate * config.data):
    raise ConfigError(
      f"batch={windows.batch} must be a multiple of accumulate={config.accumulate} times the mesh's"
      f" data={config.data}."
    )
  config = with_rates(config, student)
  student = with_rounding(student, dtype=jnp.dtype(config.dtype))
  filters = trained(recipe)
  graph, weights, quantizers, frozen = nnx.split(  # type: ignore[misc]
    student, filters["weights"], filters["quantizers"], ...
  )
  mesh = jax.make_mesh(
    (config.data, config.model), ("data", "model"), axis_types=(AxisType.Auto,) * 2
  )
  learning = _shard(
    {"weights": nnx.to_pure_dict(weights), "quantizers": nnx.to_pure_dict(quantizers)}, mesh
  )
  optimizer = _optimizer(config)
  # Zeros like the parameters lie where they do, the rest on all devices.
  state = {"learning": learning, "optimizer": _shard(optimizer.init(learning), mesh)}
  fixed = _shard({"rest": nnx.to_pure_dict(frozen), "teacher": _teacher(teacher, config)}, mesh)
  templates = weights, quantizers, frozen

  def rebuilt(learning: Any, rest: Any) -> Student:
    states = [jax.tree.map(lambda x: x, template) for template in templates]
    for old, new in zip(states, (learning["weights"], learning["quantizers"], rest), strict=True):
      nnx.replace_by_pure_dict(old, new)
    return nnx.merge(graph, *states)

  step_function = _make_step(rebuilt, student, config, optimizer, mesh)
  checkpoints = metrics = None
  first = 0
  if folder is not None:
    about = _about(recipe, config, windows)
    checkpoints = Checkpoints(folder / "checkpoints", about)
    if not resume and checkpoints.latest is not None:
      raise ConfigError(f"{folder} holds a run; resume it, or give another folder.")
    if resume:
      first, state = checkpoints.restore(state)
    metrics = Metrics(folder, first)
  try:
    for step in range(first, config.steps):
      begin = time.perf_counter()
      tokens = jax.device_put(windows[step], NamedSharding(mesh, PartitionSpec("data", None)))
      state, values = step_function(state, fixed, tokens)
      record = {"step": step + 1, **{n: float(v) for n, v in values.items()}}
      record["seconds"] = time.perf_counter() - begin
      if not math.isfinite(record["loss"]) or not math.isfinite(record["gradient_norm"]):
        raise TrainingError(_diverged(step + 1, record, config, checkpoints))
      if metrics is not None:
        metrics.write(record)
      if on_step is not None:
        on_step(record)
      if checkpoints is not None and (
        (step + 1) % config.save_every == 0 or step + 1 == config.steps
      ):
        checkpoints.save(step + 1, state)
      if progress is not None:
        progress(step + 1, config.steps)
  finally:
    if checkpoints is not None:
      checkpoints.close()
    if metrics is not None:
      metrics.close()
  return rebuilt(jax.device_get(state["learning"]), jax.device_get(fixed["rest"]))


def _make_step(
  rebuilt: Callable[[Any, Any], Student],
  student: Student,
  config: TrainConfig,
  optimizer: Any,
  mesh: Mesh,
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
  matmul = Matmul(jnp.dtype(config.dtype))

  def objective(learning: Any, fixed: Any, tokens: jax.Array) -> tuple[jax.Array, dict]:
    logits = rebuilt(learning, fixed["rest"])(tokens[:, :-1])
    parts = {"ce": cross_entropy(logits, tokens[:, 1:])}
    if config.loss != "ce":
      weights = fixed["teacher"]
      teacher = Llama(student.config, lambda name, _: weights[name], matmul)
      parts["kl"] = kl(teacher(tokens[:, :-1]), logits)
    loss = parts["ce"] + parts["kl"] if config.loss == "both" else parts[config.loss]
    return loss, {"loss": loss, **parts}

  gradient = jax.grad(objective, has_aux=True)

  def step(state: Any, fixed: Any, tokens: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    learning = state["learning"]
    parts = tokens.reshape(config.accumulate, -1, tokens.shape[1])
    parts = jax.lax.with_sharding_constraint(
      parts, NamedSharding(mesh, PartitionSpec(None, "data", None))
    )

    def add(total: Any, part: jax.Array) -> tuple[Any, dict]:
      grads, values = gradient(learning, fixed, part)
      return jax.tree.map(jnp.add, total, grads), values

    if config.accumulate == 1:
      grads, values = gradient(learning, fixed, parts[0])
    else:
      zero = jax.tree.map(jnp.zeros_like, learning)
      grads, values = jax.lax.scan(add, zero, parts)
      grads = jax.tree.map(lambda g: g / config.accumulate, grads)
    values = {n: v.mean() for n, v in values.items()}
    values["gradient_norm"] = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    updates, opt = optimizer.update(grads, state["optimizer"], learning)
    learning = jax.tree.map(jnp.add, learning, updates)
    return {"learning": learning, "optimizer": opt}, values

  return jax.jit(step, donate_argnums=0)


def _optimizer(config: TrainConfig) -> Any:
  assert config.weight_rate is not None and config.quantizer_rate is not None
  try:
    import optax
  except ImportError:
    raise MissingDependencyError("training needs optax: pip install 'q4jax[train]'.") from None

  def adam(rate: float, decay: float) -> Any:
    warmup = max(1, round(config.warmup * config.steps))
    schedule = optax.warmup_cosine_decay_schedule(
      rate / warmup, rate, warmup, max(config.steps, warmup + 1), rate / 10
    )
    return optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=decay)

  rates = {
    "weights": adam(config.weight_rate, config.weight_decay),
    "quantizers": adam(config.quantizer_rate, 0.0),
  }

  def labels(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {kind: jax.tree.map(lambda _: kind, part) for kind, part in tree.items()}  # noqa: B023

  return optax.chain(optax.clip_by_global_norm(config.clip), optax.multi_transform(rates, labels))


def _teacher(weights: Mapping[str, Any], config: TrainConfig) -> dict[str, jax.Array]:
  return {} if config.loss == "ce" else {n: jnp.asarray(w) for n, w in weights.items()}


def _shard(tree: Any, mesh: Mesh) -> Any:
  """Matrices [N, ...] over "model" where it divides N; the rest on all devices."""
  size = mesh.shape["model"]

  def put(x: Any) -> jax.Array:
    split = np.ndim(x) == 2 and np.shape(x)[0] % size == 0
    spec = PartitionSpec("model", None) if split else PartitionSpec()
    # A copy: the step donates what it is given.
    return jax.device_put(np.array(x), NamedSharding(mesh, spec))

  return jax.tree.map(put, tree)


def _about(recipe: Recipe, config: TrainConfig, windows: Windows) -> dict[str, Any]:
  """What must not change between a checkpoint and what goes on from it."""
  settings = dataclasses.asdict(config)
  for name in ("save_every", "data", "model"):
    del settings[name]
  data = {"ctx": windows.ctx, "batch": windows.batch, "seed": windows.seed, "text": windows.digest}
  return {"recipe": dataclasses.asdict(recipe), **settings, **data}


def _diverged(
  step: int, record: Mapping[str, float], config: TrainConfig, checkpoints: Checkpoints | None
) -> str:
  last = None if checkpoints is None else checkpoints.latest
  kept = (
    "No checkpoint was saved before."
    if checkpoints is None or last is None
    else f"The last good checkpoint is step {last} in {checkpoints.folder}."
  )
  return (
    f"the loss is {record['loss']} and its gradient {record['gradient_norm']} at step {step}. "
    f"{kept} Take smaller learning rates than {config.weight_rate:.2g} of weights and "
    f"{config.quantizer_rate:.2g} of scales."
  )
