"""Training: losses, determinism across kills and devices, and what goes wrong said by name."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from q4jax.errors import ConfigError, PromptError, TrainingError
from q4jax.formats.memory import MemoryCheckpoint
from q4jax.qat.data import Windows
from q4jax.qat.loss import cross_entropy, kl
from q4jax.qat.trainer import TrainConfig, train
from q4jax.qat.variants import Recipe, float_weights, initial
from q4jax.quant.grid import Grid

RECIPE = Recipe("lsq", Grid(3, 32, "absmax"), "rtn")
ROW = np.random.default_rng(0).integers(1, 4096, 400).astype(np.int32)
WINDOWS = Windows(ROW, np.zeros(1, np.int32), ctx=16, batch=4, seed=1)


def test_kl_is_zero_where_both_are_equal() -> None:
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 3, 50)).astype(np.float32)
  assert float(kl(a, a)) == 0
  assert not np.asarray(jax.grad(kl, 1)(jnp.asarray(a), jnp.asarray(a))).any()
  p = np.exp(a.astype(np.float64)) / np.exp(a.astype(np.float64)).sum(-1, keepdims=True)
  q = np.exp(b.astype(np.float64)) / np.exp(b.astype(np.float64)).sum(-1, keepdims=True)
  np.testing.assert_allclose(kl(a, b), (p * np.log(p / q)).sum(-1).mean(), rtol=1e-5)
  np.testing.assert_allclose(
    jax.grad(kl, 1)(jnp.asarray(a), jnp.asarray(b)), (q - p) / 3, rtol=1e-4, atol=1e-7
  )
  targets = np.array([1, 2, 3])
  np.testing.assert_allclose(
    cross_entropy(b, targets), -np.log(q[np.arange(3), targets]).mean(), rtol=1e-5
  )


def test_windows_are_functions_of_the_step() -> None:
  assert WINDOWS[3].shape == (4, 17)
  np.testing.assert_array_equal(WINDOWS[3], WINDOWS[3])
  assert not np.array_equal(WINDOWS[3], WINDOWS[4])
  assert (WINDOWS[0][:, 0] == 0).all()
  text = "".join(map(chr, ROW))
  assert all("".join(map(chr, row[1:])) in text for row in WINDOWS[0])
  with pytest.raises(PromptError, match="ctx=600"):
    Windows(ROW, np.zeros(1, np.int32), ctx=600, batch=4, seed=1)


def run(small: MemoryCheckpoint, recipe: Recipe = RECIPE, **options) -> tuple:
  losses: list[float] = []
  student = initial(small, recipe)
  folder, resume = options.pop("folder", None), options.pop("resume", False)
  told = options.pop("told", False)
  config = TrainConfig(**{"steps": 6, "weight_rate": 1e-3, "quantizer_rate": 1e-4, **options})
  made = train(
    student, recipe, float_weights(small), WINDOWS, config, folder, resume=resume,
    on_step=lambda r: (losses.append(r["loss"]), print(r["step"], flush=True) if told else None),
  )  # fmt: skip
  return made, losses


@pytest.mark.parametrize("variant", ["ste_minmax", "ste_search", "lsq", "lsq_zero", "lora"])
def test_each_variant_learns_what_it_may(small: MemoryCheckpoint, variant) -> None:
  init = "rtn" if variant == "ste_minmax" else "mse"  # A min-max grid clips nothing: no gradient
  recipe = Recipe(variant, Grid(3, 32, "minimum"), init, lora_rank=4)  # would reach minimums.
  before, (after, losses) = initial(small, recipe), run(small, recipe, steps=12)
  assert losses[-1] < losses[0]
  old, new = (nnx.to_pure_dict(nnx.state(x)) for x in (before, after))
  changed = {
    kind for kind in new for name in new[kind]
    if not np.array_equal(new[kind][name], old[kind][name])
  }  # fmt: skip
  want = {
    "ste_minmax": {"weights"}, "ste_search": {"weights"}, "lsq": {"weights", "scales"},
    "lsq_zero": {"weights", "scales", "minimums"}, "lora": {"lora_a", "lora_b"},
  }  # fmt: skip
  assert changed == want[variant]
  table = "token_embd.weight"
  np.testing.assert_array_equal(after.weights[table].get_value(), before.weights[table].get_value())


def test_accumulated_gradients_are_those_of_the_batch(small: MemoryCheckpoint) -> None:
  np.testing.assert_allclose(run(small, accumulate=4)[1], run(small)[1], rtol=2e-3)
  assert np.isfinite(run(small, dtype="bfloat16", loss="both", steps=2)[1]).all()


def test_a_loss_that_is_not_finite_stops(small: MemoryCheckpoint, tmp_path: Path) -> None:
  run(small, folder=tmp_path, steps=4, save_every=2)
  with pytest.raises(ConfigError, match="holds a run; resume it"):
    run(small, folder=tmp_path, steps=4)
  with pytest.raises(ConfigError, match=r"run with steps=4; this one has 5"):
    run(small, folder=tmp_path, steps=5, resume=True)
  other = Recipe("lsq", Grid(3, 16, "absmax"), "rtn")
  with pytest.raises(ConfigError, match="is of a run with recipe="):
    run(small, other, folder=tmp_path, steps=4, resume=True)
  with pytest.raises(TrainingError, match=r"no checkpoint to resume from"):
    run(small, folder=tmp_path / "none", resume=True)
  with pytest.raises(TrainingError, match=r"at step \d+\. The last good checkpoint is step 1 in "):
    run(small, folder=tmp_path / "nan", steps=9, save_every=1, weight_rate=1e30, warmup=0.001)
  assert (tmp_path / "nan" / "checkpoints" / "1").is_dir()


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
  from q4jax.qat.checkpoints import Checkpoints

  saved = Checkpoints(tmp_path, {"a": 1})
  saved.save(1, {"w": jnp.zeros((2, 3))})
  with pytest.raises(ConfigError, match=r"has \['w'\] as \[\[2, 3\], 'float32'\]; .* \[\[3, 3\]"):
    saved.restore({"w": jnp.zeros((3, 3))})
  step, state = saved.restore({"w": jnp.ones((2, 3))})
  assert step == 1
  assert not np.asarray(state["w"]).any()


@pytest.mark.parametrize(
  ("options", "message"),
  [({"steps": 0}, "steps=0"), ({"loss": "mse"}, "loss='mse'"), ({"data": 99}, "mesh of 99 x 1")],
)
def test_configs_that_cannot_be(options: dict, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    TrainConfig(**options)


SCRIPT = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from conftest import checkpoint
import test_trainer
for name, options in {runs!r}.items():
  folder = Path({folder!r}) / name
  test_trainer.run(checkpoint(), folder=folder, steps=12, save_every=3, told=True, **options)
"""


def child(folder: Path, runs: dict[str, dict], devices: int = 1) -> subprocess.Popen:
  """A process that trains into folders by name, and prints each step's number."""
  root = Path(__file__).parents[2]
  path = [str(root / "tests" / "qat"), str(root), str(root / "kernels"), str(root / "tests")]
  flags = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [sys.executable, "-c", SCRIPT.format(path=path, runs=runs, folder=str(folder))],
    stdout=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": flags},
  )  # fmt: skip


def losses(folder: Path) -> list[float]:
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(1, 13))
  return [line["loss"] for line in lines]


def test_killed_and_resumed_is_never_stopped(small: MemoryCheckpoint, tmp_path: Path) -> None:
  killed = child(tmp_path, {"killed": {}})
  assert killed.stdout is not None
  for line in killed.stdout:
    if line.strip() == "8":
      os.kill(killed.pid, signal.SIGKILL)
  assert killed.wait() == -signal.SIGKILL
  want, _ = run(small, folder=tmp_path / "whole", steps=12)
  got, steps = run(small, folder=tmp_path / "killed", steps=12, resume=True)
  assert 3 <= len(steps) <= 9  # From the checkpoint of step 3, 6 or 9.
  want_state, got_state = (nnx.to_pure_dict(nnx.state(x)) for x in (want, got))
  jax.tree.map(np.testing.assert_array_equal, got_state, want_state)
  assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_two_devices_are_one(tmp_path: Path) -> None:
  runs = {"one": {}, "data": {"data": 2}, "model": {"model": 2}}
  made = child(tmp_path, runs, devices=2)
  made.communicate()
  assert made.returncode == 0
  for name in ("data", "model"):
    np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "one"), rtol=1e-3)
