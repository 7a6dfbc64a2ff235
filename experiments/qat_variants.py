r"""Quantisation-aware training, all variants from one float model with equal tokens, beside PTQ.

  python -m experiments.qat_variants --tokens=runs/tiny/train.bin --steps=400 --seeds=0,1,2 \
    --out=experiments/results/qat_variants.json

trains on --tokens (uint16 ids, as experiments.tiny.prepare writes them; the packaged calibration
text if not given) and measures on --text: perplexity, KL to the float model and how often both find
the same token likeliest, by q4jax.compare, on the model that was exported and loaded again. Writes
JSON, and beside it .md and, with matplotlib, .png with learning curves. --steps=40 --seeds=0 shows
that it runs.

  grids      BITS:RULE; lsq_zero takes the rule minimum wherever it is not
  ptq        methods of q4jax quantize beside; GPTQ reads --sequences windows of --ctx tokens
  variants   VARIANT:INIT (q4jax/qat/variants.py)

recovered: the share of RTN's loss that is gone, of KL and of log perplexity. RTN, of the grid named
by --grids, is each grid's 0%, the float model 100%.
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app

from experiments import config_flags
from experiments.config_flags import option
from experiments.provenance import markdown, save
from q4jax.compare import Comparison, Reference
from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import Checkpoint
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.memory import MemoryCheckpoint
from q4jax.loading import load_checkpoint
from q4jax.offline.quantize import quantize_model
from q4jax.offline.scheme import NEEDS_TEXT, Scheme
from q4jax.qat import export
from q4jax.qat.block_ap import BlockConfig
from q4jax.qat.data import Windows
from q4jax.qat.run import Hooks, learn
from q4jax.qat.trainer import TrainConfig
from q4jax.qat.variants import Recipe
from q4jax.quant.grid import Grid
from q4jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
  """What to train, and how long."""

  model: str = option("experiments/tiny/tiny.f16.gguf", "A GGUF of float weights.")
  tokens: str = option("", "File of uint16 token ids to train on; else the packaged text.")
  text: str = option("q4jax/data/held_out.txt", "Text to measure on.")
  chunks: int = option(40, "Chunks of 512 tokens to measure on.")
  grids: tuple[str, ...] = option(("4:absmax", "3:minimum", "2:minimum"), "See above.")
  group_size: int = option(128, "Weights that share a scale.")
  ptq: tuple[str, ...] = option(("rtn", "mse", "gptq"), "See above.")
  variants: tuple[str, ...] = option(
    ("ste_minmax:rtn", "ste_search:mse", "lsq:mse", "lsq:gptq", "lsq_zero:gptq", "block_ap:gptq",
     "lora:gptq"), "See above.",
  )  # fmt: skip
  loss: str = option("kl", "ce, kl or both.")
  seeds: tuple[int, ...] = option((0, 1, 2), "Each a run with other windows.")
  steps: int = option(400, "Steps; Block-AP spends half of its tokens block by block.")
  batch: int = option(8, "Windows in a step.")
  ctx: int = option(256, "Tokens in a window.")
  sequences: int = option(128, "Windows that GPTQ and Block-AP read.")
  weight_rates: tuple[float, ...] = option((1e-4, 2e-4, 5e-4), "Learning rates, one a grid.")
  quantizer_rates: tuple[float, ...] = option((2e-5, 5e-5, 1e-4), "Learning rates, one a grid.")
  lora_rate: float = option(10.0, "LoRA's rate, times the weights'.")
  implementation: str = option("cpu_exact", "Of the int4 matmul that measures; '' for the fastest.")
  out: str = option("", "File to write the records to, as JSON.")


def run(config: Config) -> list[dict[str, Any]]:
  """A record for each grid, method and seed."""
  if not len(config.grids) == len(config.weight_rates) == len(config.quantizer_rates):
    raise ConfigError("--grids, --weight_rates and --quantizer_rates go together, one for each.")
  records: list[dict[str, Any]] = []
  with GGUFCheckpoint.open(config.model) as source:
    bench = _Bench(config, source)
    for index, name in enumerate(config.grids):
      bits, _, rule = name.partition(":")
      grid = Grid(int(bits), config.group_size, rule)  # type: ignore[arg-type]
      of_grid = [bench.ptq(grid, method) for method in config.ptq]
      for variant in config.variants:
        of_grid += [bench.trained(grid, index, variant, seed) for seed in config.seeds]
      for record in of_grid:
        record["grid"] = name
        _recovered(record, of_grid[0] if config.ptq[0] == "rtn" else None)
      records += of_grid
  return records


class _Bench:
  """The source, what it is measured by, and its texts."""

  def __init__(self, config: Config, source: Checkpoint):
    self.config, self.source = config, source
    tokenizer = Tokenizer.from_gguf_metadata(source.metadata)
    self.start = np.asarray(tokenizer.encode_parts([], add_eos=False), np.int32)
    self.row = _row(config, tokenizer, len(self.start))
    model = load_checkpoint(source)
    self.reference = Reference(model, Path(config.text).read_text(), 512, config.chunks)

  def windows(self, seed: int) -> Windows:
    c = self.config
    return Windows(self.row, self.start, c.ctx, c.batch, seed)

  def calibration(self) -> np.ndarray:
    """The same for all methods and seeds."""
    c = self.config
    return Windows(self.row, self.start, c.ctx, c.sequences, 1000)[0][:, :-1]

  def ptq(self, grid: Grid, method: str) -> dict[str, Any]:
    begin, made = time.perf_counter(), self._memory()
    quantize_model(
      self.source, lambda _: made, Scheme(grid=grid, method=method, head="keep"),  # type: ignore[arg-type]
      tokens=self.calibration() if method in NEEDS_TEXT else None,
    )  # fmt: skip
    return self._record(method, None, grid, made, time.perf_counter() - begin, [])

  def trained(self, grid: Grid, index: int, variant: str, seed: int) -> dict[str, Any]:
    c, (name, _, init) = self.config, variant.partition(":")
    if name == "lsq_zero":
      grid = dataclasses.replace(grid, rule="minimum")
    recipe = Recipe(name, grid, init)  # type: ignore[arg-type]
    rate = c.weight_rates[index] * (c.lora_rate if name == "lora" else 1)
    quantizer_rate, steps = c.quantizer_rates[index], c.steps
    blocks = None
    if name == "block_ap":
      steps = c.steps // 2
      # As many tokens: a block's step is one of L of a step end to end.
      blocks = BlockConfig(steps, c.batch, rate, quantizer_rate, seed)
    train = TrainConfig(
      steps, c.loss, weight_rate=rate, quantizer_rate=quantizer_rate,  # type: ignore[arg-type]
    )  # fmt: skip
    curve: list[float] = []
    hooks = Hooks(metrics=lambda record: curve.append(record["loss"]))
    begin, made = time.perf_counter(), self._memory()
    student = learn(
      self.source, recipe, train, self.windows(seed), self.calibration(), blocks, hooks=hooks
    )
    export.write(student, self.source, lambda _: made)
    return self._record(variant, seed, grid, made, time.perf_counter() - begin, curve)

  def _memory(self) -> MemoryCheckpoint:
    return MemoryCheckpoint(self.source.config, self.source.metadata)

  def _record(
    self, method: str, seed: int | None, grid: Grid, made: MemoryCheckpoint, seconds: float,
    curve: list[float],
  ) -> dict[str, Any]:  # fmt: skip
    model = load_checkpoint(made, implementation=self.config.implementation or None)
    found: Comparison = self.reference.compare(model)
    bits = grid.bits + 16 * (1 if grid.symmetric else 2) / self.config.group_size
    record = {
      "method": method, "seed": seed, "bpw": bits, **dataclasses.asdict(found),
      "ratio": found.ratio, "seconds": round(seconds, 1),
      "curve": [float(f"{x:.5g}") for x in curve],
    }  # fmt: skip
    print(
      f"{grid.bits} bits {method} seed {seed}: ppl {found.ppl:.3f} KL {found.kl:.5f} "
      f"{seconds:.0f} s", file=sys.stderr, flush=True,
    )  # fmt: skip
    return record


def _row(config: Config, tokenizer: Tokenizer, skip: int) -> np.ndarray:
  if config.tokens:
    return np.fromfile(config.tokens, np.uint16).astype(np.int32)
  text = Path("q4jax/data/calibration.txt").read_text()
  return np.asarray(tokenizer.encode_parts([text], add_eos=False), np.int32)[skip:]


def _recovered(record: dict[str, Any], rtn: dict[str, Any] | None) -> None:
  if rtn is not None:
    record["recovered_kl"] = 1 - record["kl"] / rtn["kl"]
    record["recovered_ppl"] = 1 - np.log(record["ratio"]) / np.log(rtn["ratio"])


def table(records: list[dict[str, Any]]) -> list[list[str]]:
  """Rows for Markdown: means over seeds, and the standard deviation of what is compared."""
  rows = [["grid", "method", "bpw", "perplexity", "KL", "top-1", "recovered KL", "ppl", "seconds"]]
  groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for record in records:
    groups.setdefault((record["grid"], record["method"]), []).append(record)

  def spread(group: list[dict[str, Any]], name: str, form: str, factor: float = 1) -> str:
    values = [factor * r[name] for r in group if name in r]
    if not values:
      return "-"
    text = format(statistics.fmean(values), form)
    return text + (f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else "")

  for (grid, method), group in groups.items():
    rows.append([
      grid, method, f"{group[0]['bpw']:.3f}", spread(group, "ppl", ".3f"),
      spread(group, "kl", ".4f"), spread(group, "top1", ".1f", 100) + " %",
      spread(group, "recovered_kl", ".0f", 100) + " %",
      spread(group, "recovered_ppl", ".0f", 100) + " %", spread(group, "seconds", ".0f"),
    ])  # fmt: skip
  return rows


def plot(records: list[dict[str, Any]], path: Path) -> None:
  """The loss by step, means of 10 steps over all seeds, a panel a grid."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  grids = list(dict.fromkeys(r["grid"] for r in records))
  figure, axes = plt.subplots(1, len(grids), figsize=(5 * len(grids), 4), squeeze=False)
  for axis, grid in zip(axes[0], grids, strict=True):
    of_grid = [r for r in records if r["grid"] == grid and r["curve"]]
    for method in dict.fromkeys(r["method"] for r in of_grid):
      curves = [r["curve"] for r in of_grid if r["method"] == method]
      mean = np.mean(curves, axis=0)
      width = min(10, len(mean))
      smooth = mean[: len(mean) // width * width].reshape(-1, width).mean(axis=1)
      axis.plot(width * (np.arange(len(smooth)) + 1), smooth, label=method)
    axis.set(title=grid, xlabel="step", ylabel="loss (nats)", yscale="log")
    axis.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def main(_: list[str]) -> None:
  """Reads flags, runs, writes."""
  config = config_flags.read(Config)
  records = run(config)
  rows = markdown(table(records))
  print(rows)
  if config.out:
    out = Path(config.out)
    save(out, config, records)
    out.with_suffix(".md").write_text(rows + "\n")
    try:
      plot(records, out.with_suffix(".png"))
    except ImportError:
      print("no plot: matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
  config_flags.define(Config)
  app.run(main)
