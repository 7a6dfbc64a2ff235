# %% [markdown]
# # Ablation tables
#
# <a href="https://colab.research.google.com/github/q4jax/q4jax/blob/main/colab/ablation_tables.ipynb"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"></a>
#
# Small editions of the project's tables, from the same code: `run(Config(...))` of `experiments/`. Larger
# settings make them the real ones. The same cells run on a CPU, a GPU and a TPU.

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
# The experiments are not part of the installed package: they come from the checkout.
from pathlib import Path

import q4jax

ROOT = next(
  root
  for root in (Path(q4jax.__file__).parents[1], Path(CHECKOUT))
  if (root / "experiments").is_dir()
)
sys.path.append(str(ROOT))
from experiments import kv_quality, quant_error
from experiments.provenance import markdown


def show(table):
  """A table, as Markdown where it can be drawn."""
  text = markdown(table)
  if "ipykernel" in sys.modules:
    from IPython.display import Markdown, display

    display(Markdown(text))
  else:
    print(text)


# %% [markdown]
# ## Weights: bits x group size x rule
#
# The error of rounded weights against the float16 ones. `rtn` rounds to a grid from the smallest to the
# largest weight of a group, `search` looks for the grid of least squared error.

# %%
config = quant_error.Config(
  model=str(ROOT / "experiments/tiny/tiny.f16.gguf"),
  methods=("rtn", "search"),
  bits=(3, 4, 8),
  groups=("32", "128", "channel"),
  rules=("minimum",),
  kquants=("q4_k", "q8_0"),
  rows=16,
)
weights = quant_error.run(config)
show(quant_error.table(weights))

# %%
from matplotlib import pyplot

figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
for method in config.methods:
  rows = [r for r in weights if r["method"] == method]
  axis.semilogy([r["bpw"] for r in rows], [100 * r["relative"] for r in rows], "o", label=method)
axis.set(xlabel="bits a weight, metadata counted", ylabel="relative error, %")
axis.legend()
pyplot.show()

# %% [markdown]
# ## KV cache: bits and what stays
#
# Texts of `ctx` tokens: the first half is read and compressed, the second stepped through token by token,
# beside the dense cache. Four short texts, so the interval is wide; `sequences=16` or more narrows it.

# %%
config = kv_quality.Config(
  model="tiny",
  text=str(Path(q4jax.__file__).parent / "data" / "held_out.txt"),
  rows=("int8", "int4r", "int4r+keep60"),
  ctx=256,
  sequences=4,
  batch=4,
  recent=32,
)
caches = kv_quality.run(config)
show(kv_quality.table(caches))

# %% [markdown]
# All tables, with their commands: `docs/` and the docstrings of `experiments/*.py`. Many settings at once:
# `python -m launch.sweep launch/sweeps/quant_grid.toml`.
