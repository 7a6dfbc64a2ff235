# %% [markdown]
# # What stays in the KV cache
#
# <a href="https://colab.research.google.com/github/q4jax/q4jax/blob/main/colab/kv_explorer.ipynb"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"></a>
#
# A policy scores every token of a prompt, a share of them stays, the rest is evicted and its memory
# freed. Here: where attention goes, which tokens each policy keeps, and what that costs. The same
# cells run on a CPU, a GPU and a TPU.

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
from matplotlib.colors import LogNorm

import q4jax
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy, policy_names
from q4jax.kv.protect import Protect
from q4jax.kv.quality import stepped_quality
from q4jax.kv.select import UnionRank
from q4jax.kv.view import view_prompt
from q4jax_kernels.kv_format import KVFormat

MODEL = "tiny"  # @param {type:"string"}
TOKENS = 320  # @param {type:"integer"}

model = q4jax.load(MODEL)
text = (Path(q4jax.__file__).parent / "data" / "held_out.txt").read_text()
everything = np.array(model.tokenizer.encode(text))
tokens = everything[:TOKENS]
print(model.tokenizer.decode(tokens.tolist())[:400], "...")


def cache(policy, keep, bits):
  """The first 4 and the newest 16 tokens always stay, in floats."""
  stored = KVFormat(bits, 32) if bits < 16 else KVFormat(16)
  return KVConfig(
    key=stored, value=stored, rotate=bits < 16, policy=get_policy(policy), select=UnionRank(keep),
    protect=Protect(sink=4, recent=16, grace=0), block_size=16,
  )  # fmt: skip


# %% [markdown]
# ## Look at one policy
#
# Top: the attention that each token gets from the last 32, by layer, all heads' mean. Large models show
# a bright first column, a *sink* that takes attention whatever it says; `tiny` hardly has one. Middle:
# the policy's score, its rank within the layer. Bottom: what stays. Between the lines lies what a score
# may evict; outside are the first and the newest tokens, which always stay.


# %%
def show(policy="snapkv", keep=0.5, bits=16, layer=0):
  """Heat maps of a policy, and the prompt as one layer still has it: a dot for an evicted token."""
  kv = cache(policy, keep, bits)
  view = view_prompt(model, tokens, kv)
  figure, axes = pyplot.subplots(3, 1, figsize=(12, 5), sharex=True, layout="constrained")
  mass = view.attention.mean(axis=1)
  rank = view.score.max(axis=1).argsort(axis=1).argsort(axis=1) / len(tokens)
  pictures = (
    ("attention of the last 32 queries", mass, {"norm": LogNorm(1e-5, 1), "cmap": "magma"}),
    (f"{policy}: rank of the score", rank, {"cmap": "viridis"}),
    (f"kept, {view.kept.mean():.0%} of the tokens", view.kept, {"cmap": "Greens", "vmin": -0.5}),
  )
  first, last = np.flatnonzero(~view.dense)[[0, -1]]
  for axis, (title, values, how) in zip(axes, pictures, strict=True):
    image = axis.imshow(values, aspect="auto", interpolation="nearest", **how)
    axis.set(title=title, ylabel="layer", yticks=range(len(values)))
    for border in (first - 0.5, last + 0.5):
      axis.axvline(border, color="tab:red", lw=1)
    if axis is not axes[-1]:
      figure.colorbar(image, ax=axis, pad=0.01)
  axes[-1].set_xlabel("position in the prompt")
  pyplot.show()
  pieces = [
    model.tokenizer.decode([token]) if kept else "·"
    for token, kept in zip(tokens.tolist(), view.kept[layer], strict=True)
  ]
  print(f"layer {layer}: {''.join(pieces)[:600]} ...")
  cost(policy, keep, bits)


# %% [markdown]
# The cost, measured by stepping: the first half of two texts is read and compressed, the second half
# goes through the compressed and the dense cache token by token.


# %%
STEPS = 192  # tokens of a text, of which half are the prompt
texts = everything[TOKENS : TOKENS + 2 * STEPS].reshape(2, STEPS)


def cost(policy, keep, bits):
  """Prints and returns perplexity against the dense cache's, and what is held."""
  found = stepped_quality(model, texts, STEPS // 2, cache(policy, keep, bits))
  print(
    f"{policy}, keep={keep}, {bits} bits: perplexity {found.ppl:.2f}, dense {found.dense_ppl:.2f} "
    f"({found.ratio - 1:+.2%}); {found.usage.keep_ratio:.0%} of the tokens, "
    f"{1 / found.usage.compression:.2f} of float16's bytes"
  )
  return found


# %%
POLICY = "snapkv"  # @param {type:"string"}
KEEP = 0.5  # @param {type:"slider", min:0.1, max:1, step:0.05}
BITS = 16  # @param [16, 8, 4] {type:"raw"}

try:
  if "ipykernel" not in sys.modules:
    raise ImportError("a plain script has no sliders")
  from ipywidgets import FloatSlider, IntSlider, interact

  interact(
    show,
    policy=policy_names(),
    keep=FloatSlider(KEEP, min=0.1, max=1.0, step=0.05, continuous_update=False),
    bits=[16, 8, 4],
    layer=IntSlider(0, min=0, max=model.config.num_layers - 1, continuous_update=False),
  )
except ImportError:
  show(POLICY, KEEP, BITS)

# %% [markdown]
# ## Policies side by side
#
# Which positions stay, in the middle layer. `streaming` keeps the newest, `random` anything, `snapkv` what
# the last queries look at, `keydiff` what is unlike the rest.

# %%
SIDE_BY_SIDE = ("streaming", "random", "snapkv", "keydiff")
layer = model.config.num_layers // 2
rows = [view_prompt(model, tokens, cache(name, KEEP, 16)).kept[layer] for name in SIDE_BY_SIDE]
figure, axis = pyplot.subplots(figsize=(12, 2), layout="constrained")
axis.imshow(np.array(rows), aspect="auto", interpolation="nearest", cmap="Greens", vmin=-0.5)
axis.set(title=f"kept in layer {layer}, keep={KEEP}", xlabel="position in the prompt")
axis.set_yticks(range(len(SIDE_BY_SIDE)), SIDE_BY_SIDE)
pyplot.show()

# %% [markdown]
# ## Perplexity against what stays
#
# Two texts only, so the curves are rough; `python -m experiments.kv_quality` measures with care. With
# more `KEEPS`, `STEPS` and policies the picture fills in.

# %%
KEEPS = (0.4, 0.8)
figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
for name in ("snapkv", "random"):
  ratios = [100 * (cost(name, keep, 16).ratio - 1) for keep in KEEPS]
  axis.plot(KEEPS, ratios, "o-", label=name)
axis.set(xlabel="share of the prompt that stays", ylabel="perplexity against the dense cache, %")
axis.axhline(0, color="grey", lw=1)
axis.legend()
pyplot.show()
