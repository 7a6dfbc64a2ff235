# %% [markdown]
# # QAT in ten minutes
#
# <a href="https://colab.research.google.com/github/q4jax/q4jax/blob/main/colab/qat_in_ten_minutes.ipynb"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"></a>
#
# Rounded to 2 bits, a model loses much of what it knew. Quantisation-aware training lets it learn under
# the rounding: here `tiny`, from its float16 twin, beside rounding to nearest and GPTQ. The trained model is
# exported, loaded again, measured, and writes. The same cells run on a CPU, a GPU and a TPU.

# %%
# Installs what is missing. Where q4jax can be imported it does nothing; jax is never installed anew.
import importlib.util
import subprocess
import sys

REPOSITORY, CHECKOUT = "https://github.com/q4jax/q4jax", "/content/q4jax"
if importlib.util.find_spec("q4jax") is None:
  import jax

  pip = [sys.executable, "-m", "pip", "install", "--quiet", f"jax=={jax.__version__}"]
  subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, CHECKOUT], check=True)
  subprocess.run([*pip, f"{CHECKOUT}[viz]"], check=True)

# %%
# Training also needs optax. `STEPS` fits in three minutes of a CPU; more go further.
from pathlib import Path

import jax
import numpy as np
from matplotlib import pyplot

import q4jax

if importlib.util.find_spec("optax") is None:
  pip = [sys.executable, "-m", "pip", "install", "--quiet", f"jax=={jax.__version__}"]
  subprocess.run([*pip, "optax"], check=True)

BITS = 2  # @param [2, 3, 4] {type:"raw"}
STEPS = 60  # @param {type:"integer"}

roots = (Path(q4jax.__file__).parents[1], Path(CHECKOUT))
FLOAT = next(p for r in roots if (p := r / "experiments/tiny/tiny.f16.gguf").exists())
texts = Path(q4jax.__file__).parent / "data"
train_text = (texts / "calibration.txt").read_text()
held_out = (texts / "held_out.txt").read_text()

# %% [markdown]
# ## What the float model predicts
#
# All others are measured against it, on text that nobody learns from: perplexity, and the KL divergence of
# the predictions, which tells close models apart.

# %%
import tempfile

from q4jax.compare import Reference
from q4jax.formats.open import open_checkpoint, open_sink
from q4jax.qat.export import write

source = open_checkpoint(FLOAT)
reference = Reference(q4jax.load(FLOAT), held_out, ctx=256, chunks=16)
folder = tempfile.TemporaryDirectory()
results = {}


def measure(name, student):
  """Exports a student, loads the file as anyone would, and compares it with the float model."""
  path = Path(folder.name) / f"{name}.qbin"
  write(student, source, lambda t: open_sink(path, source.config, source.metadata, t))
  model = q4jax.load(path)
  results[name] = reference.compare(model)
  r = results[name]
  print(
    f"{name:5} perplexity {r.ppl:7.3f} (float {r.reference_ppl:.3f}), "
    f"KL {r.kl:.4f} +/- {r.kl_stderr:.4f}, same top-1 {r.top1:.1%}"
  )
  return model


# %% [markdown]
# ## Without training
#
# Groups of 128 weights share a scale and a minimum. Rounding to nearest takes the smallest and the
# largest weight of each; GPTQ lets each weight make up for the errors of those before it.

# %%
from q4jax.offline.sequences import sequences
from q4jax.qat.variants import Recipe, float_weights, initial
from q4jax.quant.grid import Grid

grid = Grid(BITS, 128, "minimum")
calibration = sequences(source, train_text, ctx=128, count=64, seed=0)
_ = measure("rtn", initial(source, Recipe("ptq", grid, "rtn")))
recipe = Recipe("lsq", grid, "gptq")  # weights and scales learn, and begin as GPTQ leaves them
student = initial(source, recipe, calibration)
measure("gptq", student)
# %% [markdown]
# ## With training
#
# Each step rounds the weights on the way forward, compares the predictions with the float model's, and
# passes the gradient through the rounding as if it were not there (LSQ also gives one to the scales).

# %%
from rich.progress import Progress

from q4jax.qat.data import Windows
from q4jax.qat.trainer import TrainConfig, train

tokenizer = q4jax.load(FLOAT).tokenizer
start = np.array(tokenizer.encode_parts([], add_eos=False), np.int32)
row = np.array(tokenizer.encode(train_text)[len(start) :], np.int32)
windows = Windows(row, start, ctx=128, batch=8, seed=0)
config = TrainConfig(steps=STEPS)  # Learning rates that suit the grid's steps.

losses = []
with Progress() as bar:
  task = bar.add_task(f"{BITS}-bit training", total=STEPS)
  trained = train(
    student,
    recipe,
    float_weights(source),
    windows,
    config,
    progress=lambda done, _: bar.update(task, completed=done),
    on_step=lambda record: losses.append(record["loss"]),
  )
model = measure("qat", trained)

# %% [markdown]
# ## The curve
#
# Each step reads other text, so the curve is rough. The first step is GPTQ's model; the first updates
# undo some of what GPTQ balanced, so the loss may rise before it falls below where it was.

# %%
figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
left.plot(range(1, len(losses) + 1), losses)
left.set(title="training", xlabel="step", ylabel="KL to the float model, nats", yscale="log")
kls = [r.kl for r in results.values()]
right.bar(list(results), kls, yerr=[r.kl_stderr for r in results.values()], capsize=4)
right.set(title=f"held-out text, {BITS} bits", ylabel="KL to the float model, nats")
pyplot.show()
print(f"of rtn's KL, gptq takes away {1 - kls[1] / kls[0]:.0%}, training {1 - kls[2] / kls[0]:.0%}")

# %% [markdown]
# ## What it writes
#
# The exported file is bit for bit what was trained. The fewer the bits, the more training has to win
# over GPTQ: set `BITS` to see.

# %%
engine = q4jax.Engine(model)
print(engine.generate("The built-in function", max_tokens=40, temperature=0).text)
folder.cleanup()
source.close()
