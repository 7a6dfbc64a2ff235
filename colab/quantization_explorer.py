# %% [markdown]
# # How weights become few bits
#
# <a href="https://colab.research.google.com/github/q4jax/q4jax/blob/main/colab/quantization_explorer.ipynb"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"></a>
#
# Real weights, those of the float16 twin of `tiny`: the points of a grid laid over them, the errors that
# rounding makes, and what each method costs the model's predictions. The same cells run on a CPU, a GPU
# and a TPU.

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
from pathlib import Path

import numpy as np
from matplotlib import pyplot

import q4jax
from q4jax.formats.checkpoint import floats
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.quant import hqq, rtn, search
from q4jax.quant.error import weight_error
from q4jax.quant.grid import Grid, quantize

roots = (Path(q4jax.__file__).parents[1], Path(CHECKOUT))
FLOAT = next(p for r in roots if (p := r / "experiments/tiny/tiny.f16.gguf").exists())
MATRIX = "blk.1.ffn_down.weight"  # @param {type:"string"}

checkpoint = GGUFCheckpoint.open(FLOAT)
w = floats(checkpoint, MATRIX)
METHODS = {"rtn": rtn.fit, "search": search.fit, "hqq": hqq.fit}
print(f"{MATRIX}: {w.shape[0]} x {w.shape[1]} weights, {np.abs(w).mean():.4f} in the mean")


# %% [markdown]
# ## A grid over weights
#
# A group of weights shares a scale (and with `minimum` an offset): the lines are the points that a code
# can stand for. Left: one group, its weights and its grid. Right: what rounding moves the weights of the
# whole matrix by.


# %%
def show(bits=4, group=32, rule="minimum", method="rtn", row=0):
  """One group and its grid; the errors of the matrix; the measures of both."""
  if method == "hqq" and rule != "minimum":
    print("HQQ moves minimums: choose the rule minimum.")
    return
  grid = Grid(bits, group, rule)
  made = quantize(w, grid, METHODS[method](w, grid))
  size = w.shape[1] // made.scale.shape[1]
  mine = w[row, :size]
  codes = np.arange(grid.top + 1)
  scale = float(made.scale[0 if group == "tensor" else row, 0])
  if made.minimum is not None:
    points = scale * codes - float(made.minimum[0 if group == "tensor" else row, 0])
  else:
    points = scale * (codes - grid.half)
  _, (left, right) = pyplot.subplots(1, 2, figsize=(12, 3.5), layout="constrained")
  left.vlines(points, 0, 1, color="tab:orange", lw=1, label="grid")
  left.plot(mine, np.linspace(0.1, 0.9, len(mine)), ".", color="tab:blue", label="weights")
  left.set(title=f"row {row}, first group of {size}", xlabel="weight", yticks=[])
  left.legend(loc="upper right")
  miss = w - made.dequantize()
  right.hist(miss.reshape(-1), bins=120, color="tab:blue")
  for edge in (-abs(scale) / 2, abs(scale) / 2):
    right.axvline(edge, color="tab:orange", lw=1)
  right.set(title="errors of the matrix; half a step of that group", xlabel="weight - rounded")
  right.set_yscale("log")
  pyplot.show()
  error = weight_error(w, made)
  print(
    f"{method}, {bits} bits, group {group}, {rule}: {error.bpw:.2f} bits a weight, "
    f"relative error {error.relative:.2%}, SNR {error.snr_db:.1f} dB"
  )


# %%
try:
  if "ipykernel" not in sys.modules:
    raise ImportError("a plain script has no sliders")
  from ipywidgets import IntSlider, interact

  interact(
    show,
    bits=IntSlider(4, min=2, max=8, continuous_update=False),
    group=[8, 16, 32, 64, 128, "channel", "tensor"],
    rule=["minimum", "absmax", "signed"],
    method=list(METHODS),
    row=IntSlider(0, min=0, max=len(w) - 1, continuous_update=False),
  )
except ImportError:
  show()

# %% [markdown]
# ## Error against group size
#
# Smaller groups fit better and cost more bits: their scales are stored too.

# %%
GROUPS = (8, 16, 32, 64, 128, "channel")
figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
for name in ("rtn", "search"):
  grids = [Grid(4, group, "minimum") for group in GROUPS]
  errors = [weight_error(w, quantize(w, grid, METHODS[name](w, grid))) for grid in grids]
  axis.plot([e.bpw for e in errors], [100 * e.relative for e in errors], "o-", label=name)
for group, error in zip(GROUPS, errors, strict=True):
  axis.annotate(f" {group}", (error.bpw, 100 * error.relative), va="bottom")
axis.set(title="4 bits and a minimum", xlabel="bits a weight", ylabel="relative error, %")
axis.legend()
pyplot.show()

# %% [markdown]
# ## What it costs the model
#
# The error of weights is not the loss of a model. Here the whole model is rounded by each method, and its
# predictions compared with the float model's: KL divergence in nats a token.

# %%
import tempfile

import jax

from q4jax.formats.open import open_sink
from q4jax.offline.quantize import quantize_model
from q4jax.offline.scheme import Scheme

held_out = (Path(q4jax.__file__).parent / "data" / "held_out.txt").read_text()
float_model = q4jax.load(FLOAT)
tokens = np.array(float_model.tokenizer.encode(held_out)[:512]).reshape(2, 256)
expected = jax.nn.log_softmax(float_model.logits(tokens))


def kl(scheme, folder):
  """Of the rounded model's predictions from the float model's, and the bytes of its file."""
  path = Path(tempfile.mkdtemp(dir=folder)) / "model.qbin"
  quantize_model(
    checkpoint, lambda t: open_sink(path, checkpoint.config, checkpoint.metadata, t), scheme
  )
  found = jax.nn.log_softmax(q4jax.load(path).logits(tokens))
  divergence = (jax.numpy.exp(expected) * (expected - found)).sum(axis=-1)
  return float(divergence.mean()), path.stat().st_size


# %%
SCHEMES = {
  "int4, row, rtn": Scheme(grid=Grid(4, "channel", "minimum"), method="rtn"),
  "int4, 32, rtn": Scheme(grid=Grid(4, 32, "minimum"), method="rtn"),
  "int4, 32, mse": Scheme(grid=Grid(4, 32, "minimum"), method="mse"),
  "int4, 32, hqq": Scheme(grid=Grid(4, 32, "minimum"), method="hqq"),
  "q4_k_m": Scheme(mix="q4_k_m"),
  "q8_0": Scheme(mix="q8_0"),
}
with tempfile.TemporaryDirectory() as folder:
  costs = {name: kl(scheme, folder) for name, scheme in SCHEMES.items()}
for name, (divergence, size) in costs.items():
  print(f"{name:15} {divergence:.5f} nats, {size / 1e6:.2f} MB")
figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
axis.barh(list(costs), [divergence for divergence, _ in costs.values()])
axis.set(title="tiny, rounded", xlabel="KL from the float model, nats a token", xscale="log")
axis.invert_yaxis()
pyplot.show()
checkpoint.close()

# %% [markdown]
# 512 tokens only: with more, close methods come apart. GPTQ and AWQ also let text run through the model:
# `q4jax quantize SOURCE OUT --type=int4 --method=gptq --text=FILE`.
