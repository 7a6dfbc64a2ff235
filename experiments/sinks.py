r"""How many first tokens must stay: perplexity of a sliding window against the number of sinks.

  python -m experiments.sinks                          # 0, 1, 2, 4 and 8 sinks, 40 s
  python -m experiments.sinks --sinks=0,4 --window=128 --model=llama.gguf --text=book.txt

Any two CPU cores (nothing here is a time). StreamingLLM (arXiv 2309.17453): of a prompt only the
first `sinks` and the newest tokens stay, `window` of them together whatever the sinks; the rest is
stepped through, and evicted to the window again every 32 tokens. Positions stay the original ones.

Expected of large models: much worse with none, most of it mended by the first, a plateau from 4 on.
`tiny` has hardly any sink, and shows a trace of it.
"""

import dataclasses
import sys
from typing import Any

from experiments import inputs, plots, stepping
from experiments.config_flags import option
from experiments.experiment import Claim, command, each
from q4jax.errors import ConfigError
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy
from q4jax.kv.protect import Protect
from q4jax.kv.select import TopK

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
  """A row for each number of sinks."""

  model: str = option("tiny", "A model that q4jax.load takes, or tiny_f16.")
  text: str = option("held_out", "held_out or calibration, a file, or hf://datasets/...")
  sinks: tuple[int, ...] = option((0, 1, 2, 4, 8), "First tokens that stay.")
  window: int = option(64, "Tokens that stay, sinks among them.")
  ctx: int = option(512, "Tokens of a sequence.")
  sequences: int = option(16, "Sequences.")
  prompt: int = option(256, "Tokens read before anything is evicted.")


def run(config: Config) -> list[Record]:
  """A record for each row of the table."""
  if config.window <= max(config.sinks):
    raise ConfigError(f"--window={config.window} leaves no room beside {max(config.sinks)} sinks.")
  model = inputs.model(config.model)
  sequences = inputs.sequences(model, config.text, config.sequences, config.ctx)
  records = []
  for sinks in config.sinks:
    kv = KVConfig(
      policy=get_policy("streaming"),
      select=TopK(k=config.window),
      protect=Protect(sinks, 16, 0),
      evict_every=32,
    )
    measured = stepping.measure(model, sequences, kv, prompt=config.prompt)
    records.append({"sinks": sinks, "window": config.window, **measured})
    print(f"{sinks} sinks: {records[-1]['ratio']:.4f}", file=sys.stderr, flush=True)
  return records


def table(records: list[Record]) -> list[list[str]]:
  """Rows for Markdown."""
  return [["sinks", "window", "kept", "perplexity", "against all tokens", "KL"]] + [
    [
      str(r["sinks"]),
      str(r["window"]),
      f"{r['keep_ratio']:.3f}",
      f"{r['ppl']:.3f}",
      stepping.change(r),
      f"{r['kl']:.4f}",
    ]
    for r in records
  ]


def plot(records: list[Record], path: str) -> None:
  """The change of perplexity against sinks."""
  with plots.figure(path) as (axis,):
    for window in dict.fromkeys(r["window"] for r in records):
      mine = sorted((r for r in records if r["window"] == window), key=lambda r: r["sinks"])
      x = [r["sinks"] for r in mine]
      plots.with_interval(axis, x, mine, label=f"{window} tokens stay")
    axis.set_xticks(sorted({r["sinks"] for r in records}))
    plots.change_axis(axis, xlabel="sinks", title="a sliding window with sinks, 95% intervals")
    axis.legend()


def quick() -> list[Config]:
  """One window."""
  return each(Config(), "sinks")


def full() -> list[Config]:
  """Three windows, on more text."""
  return [
    one
    for window in (64, 128, 256)
    for one in each(Config(window=window, sequences=32, ctx=1024, prompt=512), "sinks")
  ]


CLAIMS: tuple[Claim, ...] = ()
VERSION = 1

if __name__ == "__main__":
  command(__name__)
