r"""Activations drift while a model runs; new ranges, injected between two tokens, follow them.

  python -m experiments.drift_injection --out=experiments/results/drift_injection.json

Each input of a matrix passes a converter of 8 bits, as an analog front end has: it is amplified by
a gain, rounded to codes of a range that was set beforehand, and divided by the gain again. As the
machine warms up the gain of each layer grows, each to another end, and codes saturate.

Held-out text is stepped through token by token: a quarter at gain 1, half while the gains grow, the
last quarter at their ends. Measured at each token, against the float model on the same tokens: the
KL divergence of the prediction, and the loss. Rows:

  steady     gain 1, the ranges of a calibration (q4jax.offline.calibrate on other text)
  drift      the gains grow, the ranges stay
  known      every --every tokens, the calibration's ranges times the gains are injected
  observed   every --every tokens, ranges are injected that only an observer of the converters'
             inputs knows: the largest value of late, and a margin

Then `Engine` writes a text on its own, greedily, the gains growing with each token, with and
without injection: how many tokens are those of `steady` until one is not. Writes JSON, and beside
it .md and, with matplotlib, .png. About a minute on two CPU cores.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

import q4jax
from experiments import config_flags
from experiments.config_flags import option
from experiments.drift_machine import Machine
from experiments.provenance import markdown, save
from q4jax.formats.open import open_checkpoint
from q4jax.offline.calibrate import Options, calibrate
from q4jax.offline.calibration import read_records
from q4jax.offline.sequences import sequences
from q4jax.records import Record

ROWS = ("steady", "drift", "known", "observed")


@dataclasses.dataclass(frozen=True)
class Config:
  """What drifts, and what is done about it."""

  model: str = option("experiments/tiny/tiny.f16.gguf", "A model of float weights.")
  calibration_text: str = option("q4jax/data/calibration.txt", "Sets the first ranges.")
  text: str = option("q4jax/data/held_out.txt", "Is stepped through.")
  bits: int = option(8, "Of the converters.")
  end: float = option(8.0, "The largest gain; layers end between its square root and it.")
  tokens: int = option(256, "Tokens of a sequence.")
  sequences: int = option(8, "Sequences, side by side.")
  calibration_sequences: int = option(16, "For the first ranges, of 256 tokens.")
  every: int = option(8, "Tokens between two injections.")
  margin: float = option(1.25, "By which an observed range exceeds what was seen.")
  decay: float = option(0.9, "What of a seen extreme is still believed after --every tokens.")
  seed: int = option(0, "Of the layers' gains.")
  out: str = option("", "File to write the records to, as JSON.")


def warmth_at(t: int, total: int) -> float:
  """0 for the first quarter, 1 for the last, and linear between."""
  return float(np.clip((t / total - 0.25) / 0.5, 0, 1))


def stepped(
  machine: Machine, row: str, tokens: np.ndarray, reference: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """KL and loss of each prediction, float64[T - 1, B], of tokens int32[B, T]."""
  c, (batch, total) = machine.model.config, tokens.shape
  shape = (c.num_layers, batch, c.num_kv_heads, total, c.head_dim)
  device = machine.model.leaves[0].sharding
  cache = jax.device_put((jnp.zeros(shape), jnp.zeros(shape)), device)
  kls, losses = [], []
  for t in range(total - 1):
    warmth = 0.0 if row == "steady" else warmth_at(t, total)
    machine.set_gains(warmth)
    if t and t % machine.config.every == 0:
      if row == "known":
        machine.inject_known(warmth)
      elif row == "observed":
        machine.inject_observed()
    cache, out, seen = machine.step(
      machine.model.leaves, jnp.asarray(tokens[:, t]), cache, jnp.full(batch, t, jnp.int32)
    )
    machine.observe(np.asarray(seen))
    p, q = reference[:, t].astype(np.float64), np.asarray(out, np.float64)
    kls.append((np.exp(p) * (p - q)).sum(-1))
    losses.append(-q[np.arange(batch), tokens[:, t + 1]])
  return np.array(kls), np.array(losses)


def written(machine: Machine, row: str, prompt: np.ndarray, count: int) -> list[int]:
  """What an engine writes, warming up as it does."""
  machine.set_gains(0)
  stream = q4jax.Engine(machine.model).stream(prompt.tolist(), max_tokens=count, temperature=0)
  tokens = []
  for t, chunk in enumerate(stream):
    if chunk.token is not None:
      tokens.append(chunk.token)
    warmth = 0.0 if row == "steady" else warmth_at(t, count)
    machine.set_gains(warmth)
    if row == "known" and t % machine.config.every == 0:
      machine.inject_known(warmth)
  return tokens


def run(config: Config) -> list[dict[str, Any]]:
  """A record for each row of the table."""
  model = q4jax.load(config.model)
  calibration = calibrated(config)
  with open_checkpoint(config.model) as source:
    text = Path(config.text).read_text()
    tokens = sequences(source, text, config.tokens, config.sequences, config.seed)
  reference = np.asarray(jax.nn.log_softmax(model.logits(tokens)))
  machine, records, steady = Machine(model, calibration, config), [], list[int]()
  for row in ROWS:
    machine.reset()
    kl, loss = stepped(machine, row, tokens, reference)
    records.append({"row": row, **_figures(kl, loss)})
    machine.reset()
    prompt, count = tokens[0, : len(tokens[0]) // 4], len(tokens[0]) * 3 // 4
    if row != "observed":  # The engine's programs do not say what they saw.
      new = written(machine, row, prompt, count)
      steady = new if row == "steady" else steady
      same = next(
        (i for i, (a, b) in enumerate(zip(new, steady, strict=False)) if a != b), len(new)
      )
      records[-1] |= {"same": same, "written": model.tokenizer.decode(new)}
    records[-1]["compiled_again"] = machine.compiled_again
    print(f"{row}: KL {records[-1]['kl']}", file=sys.stderr, flush=True)
  return records


def calibrated(config: Config) -> list[Record]:
  """Records of inputs, keys and values, from the calibration's text."""
  options = Options(bits=config.bits)
  with tempfile.TemporaryDirectory() as folder, open_checkpoint(config.model) as source:
    text = Path(config.calibration_text).read_text()
    tokens = sequences(source, text, 256, config.calibration_sequences, 0)
    calibrate(source, tokens, Path(folder), options)
    return read_records(folder)


def _figures(kl: np.ndarray, loss: np.ndarray) -> dict[str, Any]:
  """Means before, while and after the gains grow; and `curve`, KL by token over the sequences."""
  warmth = np.array([warmth_at(t, len(kl) + 1) for t in range(len(kl))])
  parts = {"before": warmth == 0, "growing": (warmth > 0) & (warmth < 1), "grown": warmth == 1}
  return {
    "kl": {name: float(kl[part].mean()) for name, part in parts.items()},
    "kl_stderr": {name: _stderr(kl[part]) for name, part in parts.items()},
    "nll": {name: float(loss[part].mean()) for name, part in parts.items()},
    "curve": kl.mean(axis=1).tolist(),
  }


def _stderr(values: np.ndarray) -> float:
  """Of the mean [T, B], from the sequences' means: tokens of one sequence are not independent."""
  means = values.mean(axis=0)
  return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0


def table(records: list[dict[str, Any]]) -> list[list[str]]:
  """Rows for Markdown."""
  parts = ("before", "growing", "grown")
  head = [f"KL {part}" for part in parts] + [f"nll {part}" for part in parts]
  return [["row", *head, "written as steady", "compiled again"]] + [
    [
      r["row"],
      *(f"{r['kl'][part]:.4f} ± {r['kl_stderr'][part]:.4f}" for part in parts),
      *(f"{r['nll'][part]:.3f}" for part in parts),
      str(r.get("same", "")),
      str(r["compiled_again"]),
    ]
    for r in records
  ]


def plot(config: Config, records: list[dict[str, Any]], path: str) -> None:
  """KL by token, a line for each row, means over a few tokens."""
  import matplotlib  # type: ignore[import-not-found,unused-ignore]

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(8, 4))
  for r in records:
    curve = np.array(r["curve"])
    width = min(8, len(curve))
    axes.semilogy(np.convolve(curve, np.full(width, 1 / width), "valid"), label=r["row"])
  total = len(records[0]["curve"]) + 1
  axes.axvspan(total / 4, total * 3 / 4, color="lightgrey", alpha=0.5, label="gains grow")
  axes.set(xlabel="token", ylabel="KL to the float model, nats", title="ranges under drift")
  axes.legend(fontsize="small")
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def main(_: list[str]) -> None:
  config = config_flags.read(Config)
  try:
    records = run(config)
  except (q4jax.Q4JaxError, OSError) as error:
    raise app.UsageError(str(error)) from error
  text = markdown(table(records)) + "\n"
  print(text)
  if not config.out:
    return
  save(config.out, config, records)
  Path(config.out).with_suffix(".md").write_text(text)
  try:
    plot(config, records, str(Path(config.out).with_suffix(".png")))
  except ImportError:
    print("no plot: matplotlib is not installed (pip install 'q4jax[viz]').", file=sys.stderr)


if __name__ == "__main__":
  config_flags.define(Config)
  app.run(main)
