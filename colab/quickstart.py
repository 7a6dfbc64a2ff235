# %% [markdown]
# # q4jax: quickstart
#
# <a href="https://colab.research.google.com/github/q4jax/q4jax/blob/main/colab/quickstart.ipynb"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"></a>
#
# A Llama with 4-bit weights in JAX: load, generate, chat, measure, and compress its KV cache. The same
# cells run on a CPU, a GPU and a TPU. `tiny` comes with q4jax: 4.2 million weights that know the
# English of Python's documentation and nothing else. To read something more sensible, set `MODEL` to a
# GGUF of a real model, as `hf://org/repo/file.gguf`.

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

import jax

import q4jax

MODEL = "tiny"  # @param {type:"string"}

model = q4jax.load(MODEL)
config = model.config
print(f"{model.num_params:,} weights in {model.nbytes / 2**20:.1f} MiB, {jax.devices()[0]}")
print(f"{config.num_layers} layers, width {config.d_model}, context {config.context_length}")

# %% [markdown]
# ## Generate
#
# `generate` takes one prompt or a batch; `stream` gives text as it is written. The same seed gives the
# same text. The first call compiles its programs, the next ones do not.

# %%
engine = q4jax.Engine(model)
answer = engine.generate("The built-in function", max_tokens=40, temperature=0)
print(answer.text)
print(f"\n{answer.timing.decoded_tokens} tokens in {answer.timing.decode_s:.3f} s")

# %%
for chunk in engine.stream("A class is", max_tokens=32, temperature=0.7, seed=1):
  print(chunk.text, end="", flush=True)
print("\n---")
for answer in engine.generate(["Returns the", "Raises a"], max_tokens=12, temperature=0.6, seed=3):
  print(repr(answer.text), answer.finish_reason)

# %% [markdown]
# ## Chat
#
# Messages become tokens by the model's chat template, or by one that comes with q4jax. (`tiny` never saw
# a chat: it goes on as documentation does.)

# %%
from q4jax.text.chat import ChatTemplate, encode_chat

template = ChatTemplate.for_tokenizer(
  model.tokenizer, None if model.tokenizer.chat_template else "llama2"
)
messages = [{"role": "user", "content": "What does a dictionary do?"}]
ids = encode_chat(model.tokenizer, template, messages)
print(engine.generate(ids, max_tokens=32, temperature=0.6, repetition_penalty=1.1).text)

# %% [markdown]
# ## Perplexity
#
# By llama.cpp's protocol, so that the figure compares with llama-perplexity's.

# %%
from q4jax.evaluate import perplexity

held_out = (Path(q4jax.__file__).parent / "data" / "held_out.txt").read_text()
result = perplexity(model, held_out, ctx=256, chunks=8)
print(f"perplexity {result.ppl:.3f} +/- {result.stderr:.3f} on {result.tokens} tokens")

# %% [markdown]
# ## A compressed KV cache
#
# Five lines: keys and values in 4 bits, and 60 % of the tokens of the prompt.

# %%
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy
from q4jax.kv.select import UnionRank
from q4jax_kernels.kv_format import KVFormat

four_bits = KVFormat(4, 32)
kv = KVConfig(four_bits, four_bits, rotate=True, policy=get_policy("snapkv"), select=UnionRank(0.6))
small = q4jax.Engine(model, kv=kv)
prompt = model.tokenizer.encode(held_out)[:1000]
answer = small.generate(prompt, max_tokens=40, temperature=0)
print(answer.text)

# %%
used = answer.timing.kv
held = (used.block_bytes + used.dense_bytes) / 1024
print(f"{used.kept:.0f} of {used.seen} tokens stay, a mean over layers")
print(
  f"{held:.0f} KiB instead of {used.float16_bytes / 1024:.0f} KiB: {used.compression:.1f} times less"
)

# %% [markdown]
# What that costs, token by token beside the dense cache: `kv_explorer.ipynb`. How weights become 4 bits:
# `quantization_explorer.ipynb`.
