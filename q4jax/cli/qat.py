"""Trains a float model under the rounding it will be stored with, and writes it quantised.

  q4jax qat model.f16.gguf model.qbin --qat=lsq --text=corpus.txt --bits=4 --steps=500
  q4jax qat model.f16.gguf model.gguf --qat=lsq_zero --bits=2 --rule=minimum --init=gptq \\
    --text=corpus.txt --folder=runs/qat --held_out=held_out.txt

SOURCE is a model in float; OUT ends in .gguf, .qbin or .orbax. The matrices of the layers become
integers in groups of --group_size; the embedding table and the output matrix stay as they are.

--qat: ptq (no training: --init alone), ste_minmax (weights learn, on the min-max grid of each
step's), ste_search (weights learn on the grid of --init), lsq (scales learn too), lsq_zero
(minimums too), block_ap (each block against its float output, then scales), lora (a low-rank
update, merged).
--loss: kl to the float model's predictions, ce of the text, or both.
--folder keeps checkpoints and metrics.jsonl; a run that was killed goes on from there with
--resume, exactly as if it had not been.
--held_out measures rounding to nearest (before) and what was trained (after): perplexity, and the
KL divergence from the float model's predictions.

--json prints one object with the keys source, out, qat, bits_per_weight (of the layers' matrices),
steps, loss (the last), seconds and, with --held_out, float_ppl, before and after (each with ppl, kl
and top1) and recovered_kl, the share of rtn's KL that is gone.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from absl import flags as absl_flags

from q4jax.cli import common, cpus
from q4jax.cli.parsing import UsageError

if TYPE_CHECKING:
  from q4jax.compare import Comparison, Reference
  from q4jax.formats.checkpoint import Checkpoint
  from q4jax.qat.variants import Recipe

ARGUMENTS = ("SOURCE", "OUT")
FLAGS = absl_flags.FlagValues()
_VARIANTS = ["ptq", "ste_minmax", "ste_search", "lsq", "lsq_zero", "block_ap", "lora"]
absl_flags.DEFINE_enum("qat", "lsq", _VARIANTS, "What learns; see above.", flag_values=FLAGS)
absl_flags.DEFINE_integer("bits", 4, "Of a code.", 2, 4, flag_values=FLAGS)
absl_flags.DEFINE_integer("group_size", 128, "Weights that share a scale.", 2, flag_values=FLAGS)
absl_flags.DEFINE_enum(
  "rule", "absmax", ["absmax", "signed", "minimum"], "Of scales: symmetric ones, or with a minimum "
  "a group.", flag_values=FLAGS,
)  # fmt: skip
absl_flags.DEFINE_enum(
  "init", None, ["rtn", "mse", "hqq", "gptq"], "Finds the first grid; mse, or rtn for ste_minmax.",
  flag_values=FLAGS,
)  # fmt: skip
absl_flags.DEFINE_enum("loss", "kl", ["kl", "ce", "both"], "See above.", flag_values=FLAGS)
absl_flags.DEFINE_enum(
  "kv_bits", "16", ["16", "8", "4"], "Of the KV cache it is trained over.", flag_values=FLAGS
)
absl_flags.DEFINE_enum(
  "activations", "float", ["float", "token", "observed"], "Inputs of the layers' products: float, "
  "or int8 with a range a token or an observed one.", flag_values=FLAGS,
)  # fmt: skip
common.define_text(FLAGS, "Text to learn from, UTF-8; - is stdin.")
absl_flags.DEFINE_integer("steps", 200, "Of the optimizer.", 1, flag_values=FLAGS)
absl_flags.DEFINE_integer("batch", 8, "Windows of --ctx tokens in a step.", 1, flag_values=FLAGS)
absl_flags.DEFINE_integer("accumulate", 1, "Parts a batch is run in.", 1, flag_values=FLAGS)
absl_flags.DEFINE_float(
  "weight_rate", None, "Learning rate of weights; if not given, one that suits the grid's steps.",
  0, flag_values=FLAGS,
)  # fmt: skip
absl_flags.DEFINE_float(
  "quantizer_rate", None, "Of scales and minimums; the same.", 0, flag_values=FLAGS
)
absl_flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Of matrix products.", flag_values=FLAGS
)
absl_flags.DEFINE_integer("data_parallel", 1, "Devices that share a batch.", 1, flag_values=FLAGS)
absl_flags.DEFINE_integer("model_parallel", 1, "Devices that share a matrix.", 1, flag_values=FLAGS)
absl_flags.DEFINE_string("folder", None, "Of checkpoints and metrics.", flag_values=FLAGS)
absl_flags.DEFINE_integer("save_every", 100, "Steps to a checkpoint.", 1, flag_values=FLAGS)
absl_flags.DEFINE_boolean("resume", False, "Go on from --folder.", flag_values=FLAGS)
absl_flags.DEFINE_string("held_out", None, "Text to measure on.", flag_values=FLAGS)
absl_flags.DEFINE_integer("chunks", 10, "Of --held_out, 512 tokens each.", 1, flag_values=FLAGS)
absl_flags.DEFINE_boolean("force", False, "Replace OUT if it exists.", flag_values=FLAGS)
absl_flags.DEFINE_integer(
  "threads", None, "CPUs to use; all that there are, if not given.", 1, flag_values=FLAGS
)
common.define_json(FLAGS)


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Trains SOURCE and writes OUT."""
  out = Path(arguments[1])
  common.check_out(out, flags.force)
  if flags.text is None:
    raise UsageError("there is no text to learn from; give --text=PATH.")
  if flags.resume and flags.folder is None:
    raise UsageError("--resume goes on from --folder; give both.")
  cpus.limit_threads(flags.threads)
  from q4jax.formats.open import check_suffix, open_checkpoint, open_sink
  from q4jax.qat import export

  check_suffix(out)
  recipe, begin = _recipe(flags), time.perf_counter()
  with open_checkpoint(common.find_model(arguments[0], flags)) as source:
    scores, reference = _before(flags, source, recipe)
    student, loss = _learn(flags, source, recipe)
    export.write(
      student, source, lambda tensors: open_sink(out, source.config, source.metadata, tensors)
    )
    grid = recipe.grid
    bits = grid.bits + (16 if grid.symmetric else 32) / flags.group_size
  if reference is not None:
    from q4jax.loading import load

    scores["after"] = reference.compare(load(out))
  about = {
    "source": arguments[0], "out": str(out), "qat": flags.qat, "bits_per_weight": bits,
    "steps": flags.steps, "loss": loss, "seconds": round(time.perf_counter() - begin, 1),
  }  # fmt: skip
  _report(flags, about, scores)
  return 0


def _recipe(flags: absl_flags.FlagValues) -> "Recipe":
  from q4jax.qat.variants import Recipe
  from q4jax.quant.grid import Grid

  init = flags.init or ("rtn" if flags.qat == "ste_minmax" else "mse")
  grid = Grid(flags.bits, flags.group_size, flags.rule)
  return Recipe(flags.qat, grid, cast(Any, init), int(flags.kv_bits), flags.activations)


def _before(
  flags: absl_flags.FlagValues, source: "Checkpoint", recipe: "Recipe"
) -> "tuple[dict[str, Comparison], Reference | None]":
  """RTN on the held-out text, and what later models are compared with."""
  if flags.held_out is None:
    return {}, None
  from q4jax.compare import Reference
  from q4jax.formats.memory import MemoryCheckpoint
  from q4jax.loading import load_checkpoint
  from q4jax.offline.quantize import quantize_model
  from q4jax.offline.scheme import Scheme

  text = common.read_text(flags.held_out)
  reference = Reference(load_checkpoint(source), text, 512, flags.chunks)
  rounded = MemoryCheckpoint(source.config, source.metadata)
  quantize_model(source, lambda _: rounded, Scheme(grid=recipe.grid, head="keep"))
  return {"before": reference.compare(load_checkpoint(rounded))}, reference


def _learn(
  flags: absl_flags.FlagValues, source: "Checkpoint", recipe: "Recipe"
) -> "tuple[Any, float | None]":
  """The student, and its last loss."""
  import numpy as np

  from q4jax.offline.sequences import sequences
  from q4jax.qat.block_ap import BlockConfig
  from q4jax.qat.data import Windows
  from q4jax.qat.run import Hooks, learn
  from q4jax.qat.trainer import TrainConfig
  from q4jax.text.tokenizer import Tokenizer

  text = common.read_text(flags.text)
  tokenizer = Tokenizer.from_gguf_metadata(source.metadata)
  start = np.asarray(tokenizer.encode_parts([], add_eos=False), np.int32)
  row = np.asarray(tokenizer.encode_parts([text], add_eos=False), np.int32)[len(start) :]
  config = TrainConfig(
    flags.steps, flags.loss, flags.weight_rate, flags.quantizer_rate, accumulate=flags.accumulate,
    dtype=flags.dtype, save_every=flags.save_every, data=flags.data_parallel,
    model=flags.model_parallel,
  )  # fmt: skip
  blocks = BlockConfig(
    flags.steps, flags.batch, flags.weight_rate, flags.quantizer_rate, flags.seed
  )
  last: list[float] = []
  folder = None if flags.folder is None else Path(flags.folder)
  with common.bar("training") if common.watched(flags) else nullcontext() as advance:
    hooks = Hooks(advance, advance, lambda record: last.append(record["loss"]))
    try:
      student = learn(
        source, recipe, config, Windows(row, start, flags.ctx, flags.batch, flags.seed),
        sequences(source, text, flags.ctx, flags.sequences, flags.seed), blocks, folder,
        resume=flags.resume, hooks=hooks,
      )  # fmt: skip
    except KeyboardInterrupt:
      common.note(_stopped(folder, flags.save_every))
      raise
  return student, last[-1] if last else None


def _stopped(folder: Path | None, save_every: int) -> str:
  """What is left of a run that its user stopped, and how it goes on."""
  from q4jax.qat.checkpoints import Checkpoints

  if folder is None:
    return "stopped; nothing is kept without --folder."
  step = Checkpoints(folder / "checkpoints", {}).latest
  if step is None:
    return f"stopped before the first checkpoint; they are saved every {save_every} steps."
  return f"stopped; the same command with --resume goes on from step {step}."


def _report(
  flags: absl_flags.FlagValues, about: dict[str, Any], scores: "dict[str, Comparison]"
) -> None:
  recovered = None
  if scores:
    recovered = 1 - scores["after"].kl / scores["before"].kl
  if flags.json:
    keys = ("ppl", "kl", "top1")
    about |= {when: {k: getattr(s, k) for k in keys} for when, s in scores.items()}
    if scores:
      about |= {"float_ppl": scores["after"].reference_ppl, "recovered_kl": recovered}
    common.print_json(about)
    return
  for when, s in scores.items():
    name = {"before": "rtn", "after": flags.qat}[when]
    print(
      f"{name}: perplexity {s.ppl:.3f} (float {s.reference_ppl:.3f}), KL {s.kl:.5f} +/- "
      f"{s.kl_stderr:.5f}, same top-1 {100 * s.top1:.2f} %"
    )
  if recovered is not None:
    print(f"recovered {100 * recovered:.0f} % of rtn's KL")
  common.note(
    f"{about['out']}: {about['bits_per_weight']:.3f} bits a weight of the layers | "
    f"{about['seconds']:.1f} s"
  )
