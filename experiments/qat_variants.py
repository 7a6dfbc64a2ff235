r"""Quantisation-aware training, all variants from one float model with equal tokens, beside PTQ.

  python -m experiments.qat_variants --grids=4:absmax --methods=rtn,lsq:gptq --seeds=0
  python -m experiments.qat_variants --model=llama.f32.gguf --train_text=a.txt --text=b.txt \
    --group_size=32
  python -m experiments.reproduce --full --only=qat_variants      # the table: 114 rows, resumable

The first takes 70 seconds on two CPU cores and shows that it runs; a row of the table takes 50.
Trains on --train_text and measures on --text: perplexity, KL to the float model and how often both
find the same token likeliest, by q4jax.compare, on the model that was exported and loaded again.

  grids      BITS:RULE; lsq_zero takes the rule minimum wherever it is not
  methods    of q4jax quantize (rtn, mse, hqq, gptq), for which seeds are all the same; or
             VARIANT:INIT (q4jax/qat/variants.py). GPTQ and Block-AP read --sequences windows
  kv_bits, activations   what runs beside the rounded weights, in training and when measured, on
             the student itself; --blind trains as if both were float. Here methods are VARIANT:INIT
             alone, ptq:rtn and ptq:gptq for no training

tok/s: tokens trained on, in a second of all that a method takes, start and compilations included.
recovered: the share of RTN's loss that is gone, of KL and of log perplexity. RTN, of the grid named
by --grids and beside the same cache and activations, is each grid's 0%, the float model 100%.

Expected: at 4 bits GPTQ leaves little to learn; the fewer the bits, the more training is worth.
"""

import dataclasses
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from experiments import inputs, plots
from experiments.config_flags import option
from experiments.experiment import Claim, command, each
from q4jax.compare import Comparison, Reference
from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import Checkpoint
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.memory import MemoryCheckpoint
from q4jax.loading import load_checkpoint
from q4jax.model.model import Model
from q4jax.offline.quantize import quantize_model
from q4jax.offline.scheme import NEEDS_TEXT, Scheme
from q4jax.qat import export
from q4jax.qat.block_ap import BlockConfig
from q4jax.qat.data import Windows
from q4jax.qat.rates import LORA
from q4jax.qat.run import Hooks, learn
from q4jax.qat.student import Student, with_rounding
from q4jax.qat.trainer import TrainConfig
from q4jax.qat.variants import Recipe
from q4jax.quant.grid import Grid
from q4jax.text.tokenizer import Tokenizer

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
  """What to train, and how long."""

  model: str = option("tiny_f16", "A GGUF of float weights, or tiny_f16.")
  train_text: str = option("calibration", "As --text, to train on; or a .bin of uint16 token ids.")
  text: str = option("held_out", "held_out, a file, or hf://datasets/..., to measure on.")
  chunks: int = option(40, "Chunks of 512 tokens, or of the context if less, to measure on.")
  grids: tuple[str, ...] = option(("4:absmax", "3:minimum", "2:minimum"), "See above.")
  group_size: int = option(128, "Weights that share a scale.")
  methods: tuple[str, ...] = option(
    ("rtn", "mse", "gptq", "ste_minmax:rtn", "ste_search:mse", "lsq:mse", "lsq:gptq",
     "lsq_zero:gptq", "block_ap:gptq", "lora:gptq"), "See above.",
  )  # fmt: skip
  loss: str = option("kl", "ce, kl or both.")
  kv_bits: int = option(16, "Of the KV cache: 16, 8 or 4.")
  activations: str = option("float", "Inputs of products: float; int8, by token or observed.")
  blind: bool = option(False, "Train as if cache and activations were float.")
  seeds: tuple[int, ...] = option((0, 1, 2), "Each a run with other windows.")
  steps: int = option(100, "Steps; Block-AP spends half of its tokens block by block.")
  batch: int = option(8, "Windows in a step.")
  ctx: int = option(128, "Tokens in a window.")
  sequences: int = option(128, "Windows that GPTQ and Block-AP read.")
  weight_rate: float = option(0.0, "Learning rate; 0 for what suits the grid (qat/rates.py).")
  quantizer_rate: float = option(0.0, "Of scales and minimums; the same.")
  implementation: str = option("cpu_exact", "Of the int4 matmul that measures; '' for the fastest.")


def run(config: Config) -> list[Record]:
  """A record for each grid, method and seed."""
  if config.blind and config.activations == "observed":
    raise ConfigError("--blind --activations=observed: no ranges were observed; take token.")
  others = config.kv_bits != 16 or config.activations != "float"
  if others and not all(":" in m for m in config.methods):
    raise ConfigError(
      "--methods: with --kv_bits or --activations a student is measured; write ptq:rtn for rtn."
    )
  records = []
  bench = _bench(config.model, config.train_text, config.text, config.chunks)
  setting = {k: getattr(config, k) for k in ("loss", "kv_bits", "activations", "blind")}
  for name in config.grids:
    bits, _, rule = name.partition(":")
    grid = Grid(int(bits), config.group_size, rule)  # type: ignore[arg-type]
    for method in config.methods:
      learns = ":" in method and not method.startswith("ptq:")
      for seed in config.seeds if learns else (None,):
        run_one = bench.trained if ":" in method else bench.ptq
        records.append({"grid": name, **setting, **run_one(config, grid, method, seed)})
  return records


@functools.lru_cache(maxsize=1)
def _bench(model: str, train_text: str, text: str, chunks: int) -> "_Bench":
  """What configs share that differ in what is trained."""
  source = GGUFCheckpoint.open(inputs.ALIASES.get(model, model))
  tokenizer = Tokenizer.from_gguf_metadata(source.metadata)
  start = np.asarray(tokenizer.encode_parts([], add_eos=False), np.int32)
  row = _row(train_text, tokenizer, len(start))
  ctx = min(512, source.config.context_length)
  reference = Reference(load_checkpoint(source), inputs.text(text), ctx, chunks)
  return _Bench(source, start, row, reference)


@dataclasses.dataclass(frozen=True, eq=False)
class _Bench:
  """The source, what its texts begin with, the text to learn from, and what it is measured by."""

  source: Checkpoint
  start: np.ndarray
  row: np.ndarray
  reference: Reference

  def calibration(self, c: Config) -> np.ndarray:
    """The same for all methods and seeds."""
    return Windows(self.row, self.start, c.ctx, c.sequences, 1000)[0][:, :-1]

  def ptq(self, c: Config, grid: Grid, method: str, seed: int | None) -> Record:
    begin, made = time.perf_counter(), self._memory()
    quantize_model(
      self.source, lambda _: made, Scheme(grid=grid, method=method, head="keep"),  # type: ignore[arg-type]
      tokens=self.calibration(c) if method in NEEDS_TEXT else None,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    return self._record(c, method, seed, grid, _loaded(made, c), seconds, [])

  def trained(self, c: Config, grid: Grid, variant: str, seed: int | None) -> Record:
    name, _, init = variant.partition(":")
    if name == "lsq_zero":
      grid = dataclasses.replace(grid, rule="minimum")
    recipe = Recipe(name, grid, init, c.kv_bits, c.activations)  # type: ignore[arg-type]
    taught = dataclasses.replace(recipe, kv_bits=16, activations="float") if c.blind else recipe
    rate, quantizer_rate = c.weight_rate or None, c.quantizer_rate or None
    if rate is not None and name == "lora":
      rate *= LORA
    blocks, steps = None, c.steps
    if name == "block_ap":
      steps = c.steps // 2
      # As many tokens: a block's step is one of L of a step end to end.
      blocks = BlockConfig(steps, c.batch, rate, quantizer_rate, seed or 0)
    train = TrainConfig(steps, c.loss, rate, quantizer_rate)  # type: ignore[arg-type]
    curve: list[float] = []
    hooks = Hooks(metrics=lambda record: curve.append(record["loss"]))
    begin, made = time.perf_counter(), self._memory()
    windows = Windows(self.row, self.start, c.ctx, c.batch, seed or 0)
    student = learn(self.source, taught, train, windows, self.calibration(c), blocks, hooks=hooks)
    seconds = time.perf_counter() - begin
    if (c.kv_bits, c.activations) != (16, "float"):
      r = recipe.rounding
      student = with_rounding(student, keys=r.keys, values=r.values, activations=r.activations)
      return self._record(c, variant, seed, grid, _Running(student), seconds, curve)
    export.write(student, self.source, lambda _: made)
    return self._record(c, variant, seed, grid, _loaded(made, c), seconds, curve)

  def _memory(self) -> MemoryCheckpoint:
    return MemoryCheckpoint(self.source.config, self.source.metadata)

  def _record(
    self, c: Config, method: str, seed: int | None, grid: Grid, model: "Model | _Running",
    seconds: float, curve: list[float],
  ) -> Record:  # fmt: skip
    found: Comparison = self.reference.compare(cast(Model, model))
    bits = grid.bits + 16 * (1 if grid.symmetric else 2) / c.group_size
    record = {
      "method": method, "seed": seed, "bpw": bits, **dataclasses.asdict(found),
      "ratio": found.ratio, "seconds": round(seconds, 1),
      "trained_tokens": c.steps * c.batch * c.ctx * bool(curve),
      "curve": [float(f"{x:.5g}") for x in curve],
    }  # fmt: skip
    print(
      f"{grid.bits} bits {method} seed {seed}: ppl {found.ppl:.3f} KL {found.kl:.5f} "
      f"{seconds:.0f} s", file=sys.stderr, flush=True,
    )  # fmt: skip
    return record


def _loaded(made: MemoryCheckpoint, config: Config) -> Model:
  return load_checkpoint(made, implementation=config.implementation or None)


class _Running:
  """A student as `Reference.compare` takes a model: beside the weights, its cache and activations
  are rounded as in training.
  """

  def __init__(self, student: Student):
    self.config, self.path = student.config, "the student"
    graph, self._state = nnx.split(student)
    self._run = jax.jit(lambda state, rows: nnx.merge(graph, state)(rows))

  def logits(self, row: np.ndarray) -> jax.Array:
    """int32[T] -> float32[1, T, V]."""
    return self._run(self._state, row[None])


def _row(name: str, tokenizer: Tokenizer, skip: int) -> np.ndarray:
  """int32[total], without what the model begins a text with."""
  if Path(name).suffix == ".bin":
    if not Path(name).is_file():
      raise ConfigError(
        f"--train_text={name} is no file. `python -m experiments.tiny.prepare` writes one."
      )
    return np.fromfile(name, np.uint16).astype(np.int32)
  return np.asarray(tokenizer.encode_parts([inputs.text(name)], add_eos=False), np.int32)[skip:]


def recovered(records: list[Record]) -> list[Record]:
  """The records, each with the shares of its grid's RTN that are gone, where that is among them."""
  zero = {_grid(r): r for r in records if r["method"] in ("rtn", "ptq:rtn")}
  return [
    {
      **r,
      "recovered_kl": 1 - r["kl"] / zero[_grid(r)]["kl"],
      "recovered_ppl": 1 - np.log(r["ratio"]) / np.log(zero[_grid(r)]["ratio"]),
    }
    if _grid(r) in zero
    else r
    for r in records
  ]


def _grid(record: Record) -> str:
  """What RTN is the zero of: the grid, and what runs beside it."""
  cache = "" if record["kv_bits"] == 16 else f" KV{record['kv_bits']}"
  inputs8 = {"float": "", "token": " A8", "observed": " A8 observed"}[record["activations"]]
  return record["grid"] + cache + inputs8


def _method(record: Record) -> str:
  loss = "" if record["loss"] == "kl" else f", {record['loss']}"
  return record["method"] + loss + (", blind" if record["blind"] else "")


def table(records: list[Record]) -> list[list[str]]:
  """Rows for Markdown: means over seeds, and the standard deviation of what is compared."""
  rows = [["grid", "method", "bpw", "perplexity", "KL", "top-1", "recovered KL", "ppl", "seconds",
           "tok/s"]]  # fmt: skip
  groups: dict[tuple[str, str], list[Record]] = {}
  for record in recovered(records):
    groups.setdefault((_grid(record), _method(record)), []).append(record)

  def spread(group: list[Record], name: str, form: str, factor: float = 1) -> str:
    values = [factor * r[name] for r in group if name in r]
    if not values:
      return "-"
    text = format(statistics.fmean(values), form)
    return text + (f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else "")

  for (grid, method), group in groups.items():
    speeds = [r["trained_tokens"] / max(r["seconds"], 0.1) for r in group]
    rows.append([
      grid, method, f"{group[0]['bpw']:.3f}", spread(group, "ppl", ".3f"),
      spread(group, "kl", ".4f"), spread(group, "top1", ".1f", 100) + " %",
      spread(group, "recovered_kl", ".0f", 100) + " %",
      spread(group, "recovered_ppl", ".0f", 100) + " %", spread(group, "seconds", ".0f"),
      f"{statistics.median(speeds):.0f}" if any(speeds) else "-",
    ])  # fmt: skip
  return rows


def plot(records: list[Record], path: str) -> None:
  """The loss kl by step, means of 10 steps over all seeds, a panel a grid; nothing beside it."""
  records = [r for r in records if r["curve"] and r["loss"] == "kl" and _grid(r) == r["grid"]]
  grids = list(dict.fromkeys(r["grid"] for r in records))
  with plots.figure(path, len(grids)) as axes:
    for axis, grid in zip(axes, grids, strict=True):
      of_grid = [r for r in records if r["grid"] == grid]
      for method in dict.fromkeys(r["method"] for r in of_grid):
        curves = [r["curve"] for r in of_grid if r["method"] == method]
        mean = np.mean(curves, axis=0)
        width = min(10, len(mean))
        smooth = mean[: len(mean) // width * width].reshape(-1, width).mean(axis=1)
        axis.plot(width * (np.arange(len(smooth)) + 1), smooth, label=method)
      axis.set(title=grid, xlabel="step", ylabel="loss (nats)", yscale="log")
      axis.legend()


CLAIMS: tuple[Claim, ...] = ()
VERSION = 1


def quick() -> list[Config]:
  """A few steps at 2 bits, where they show."""
  few = Config(
    grids=("2:minimum",), methods=("rtn", "gptq", "lsq_zero:gptq"), seeds=(0,), steps=20, chunks=10,
    sequences=32,
  )  # fmt: skip
  return each(few, "methods")


def full() -> list[Config]:
  """Every variant with three seeds, the other losses, and what runs beside the weights."""
  # Found on `tiny` with seed 0; `rates.suited` came from them, and gives within 30% of them.
  rates = {"4:absmax": (2e-4, 2e-5), "3:minimum": (4e-4, 5e-5), "2:minimum": (1e-3, 2e-4)}
  methods = Config().methods
  ptq, trained = ([m for m in methods if (":" in m) == learns] for learns in (False, True))
  configs = []
  for grid, (weights, quantizers) in rates.items():
    base = Config(grids=(grid,), weight_rate=weights, quantizer_rate=quantizers)
    for changes in (
      {"methods": ptq, "seeds": (0,)}, {"methods": trained},
      {"methods": ("lsq:gptq",), "loss": "ce"}, {"methods": ("lsq:gptq",), "loss": "both"},
    ):  # fmt: skip
      configs += each(dataclasses.replace(base, **changes), "methods", "seeds")
  base = dataclasses.replace(configs[0], methods=("ptq:rtn", "ptq:gptq"))
  for beside in ({"kv_bits": 8}, {"kv_bits": 4}, {"activations": "token"}):
    four = dataclasses.replace(base, **beside)
    configs += each(four, "methods")
    four = dataclasses.replace(four, methods=("lsq:gptq",), seeds=Config().seeds)
    configs += each(dataclasses.replace(four, blind=True), "seeds") + each(four, "seeds")
  return configs


if __name__ == "__main__":
  command(__name__)
