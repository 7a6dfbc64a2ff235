"""Quantises a model: llama.cpp's mixes as GGUF, or group-wise integers found by a method.

  q4jax quantize model.f16.gguf model.Q4_K_M.gguf --type=q4_k_m
  q4jax quantize model.f16.gguf model.qbin --type=q4_k_m --calibration=calibration
  q4jax quantize hf-folder model.qbin --type=int4 --group_size=128 --method=mse
  q4jax quantize model.f16.gguf model.qbin --type=int4 --method=gptq --text=corpus.txt

SOURCE is a GGUF file (f16, bf16, f32 or Q8_0), a Hugging Face folder, a .qbin or an orbax folder;
OUT ends in .gguf, .qbin or .orbax. It is written under a temporary name and appears whole.

--type: q4_0 q4_1 q5_0 q5_1 q8_0 q4_k_s q4_k_m q5_k_s q5_k_m q6_k, each matrix as llama.cpp's
llama-quantize would have it; or int2 to int8: every matrix of the layers in groups of --group_size,
the embedding table and the output matrix as --head says.

--method (of integers): rtn rounds to a grid from the smallest to the largest weight; mse searches
each group's grid for the least squared error, weighted by --calibration if given; hqq minimises a
norm that forgives outliers; gptq and awq let --text run through the model, layer by layer: gptq
lets each weight make up for the rounding errors before it, awq scales up the inputs that matter.

--rotate folds a random orthogonal matrix (--rotate_seed) into the weights before they are rounded,
as QuaRot and SpinQuant do: OUT is a plain model still, whose head is a matrix of its own. A
calibration of SOURCE says nothing of rotated inputs: write the rotated model first (q4jax convert
--rotate), calibrate and quantise that.

--json prints one object with the keys source, out, type, bits_per_weight (of all tensors),
source_bytes, out_bytes, seconds and peak_rss_bytes.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from q4jax.cli import common, cpus
from q4jax.cli.parsing import UsageError

if TYPE_CHECKING:
  import numpy as np
  from numpy.typing import NDArray

  from q4jax.formats.checkpoint import Checkpoint
  from q4jax.offline.scheme import Scheme

ARGUMENTS = ("SOURCE", "OUT")
FLAGS = absl_flags.FlagValues()
absl_flags.DEFINE_string("type", "q4_k_m", "A mix, or int2 to int8; see above.", flag_values=FLAGS)
absl_flags.DEFINE_string(
  "group_size", "128", "Of integers: weights that share a scale; channel for a whole row, tensor "
  "for a whole matrix.", flag_values=FLAGS,
)  # fmt: skip
absl_flags.DEFINE_boolean(
  "symmetric", True, "Of integers: codes around 0; otherwise with a minimum a group.",
  flag_values=FLAGS,
)  # fmt: skip
absl_flags.DEFINE_enum(
  "method", "rtn", ["rtn", "mse", "hqq", "gptq", "awq"], "Of integers; see above.",
  flag_values=FLAGS,
)  # fmt: skip
absl_flags.DEFINE_enum(
  "head", "q6_k", ["q6_k", "q8_0", "same", "keep"],
  "Beside integers, the embedding table and the output matrix: a block format, the same integers, "
  "or as the source has them.", flag_values=FLAGS,
)  # fmt: skip
absl_flags.DEFINE_string(
  "calibration", None, "What q4jax calibrate wrote, or an imatrix of llama.cpp (.gguf): the mean "
  "squares of inputs weigh errors.", flag_values=FLAGS,
)  # fmt: skip
common.define_text(FLAGS, "Text for --method=gptq and awq, UTF-8; - is stdin.")
common.define_rotate(FLAGS)
absl_flags.DEFINE_boolean(
  "requantize", False, "Take a source that is quantised already.", flag_values=FLAGS
)
absl_flags.DEFINE_boolean("force", False, "Replace OUT if it exists.", flag_values=FLAGS)
absl_flags.DEFINE_integer(
  "threads", None, "CPUs to use; all that there are, if not given.", 1, flag_values=FLAGS
)
common.define_json(FLAGS)


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Quantises SOURCE into OUT."""
  source_name, out = arguments[0], Path(arguments[1])
  common.check_out(out, flags.force)
  cpus.limit_threads(flags.threads)
  scheme, seed = _scheme(flags), common.rotate_seed(flags)
  if seed is not None and flags.calibration is not None:
    raise UsageError(
      f"--calibration={flags.calibration} is of the inputs of {source_name} as it is, and --rotate "
      "mixes these. Write the rotated model with q4jax convert --rotate, calibrate that, and "
      "quantise it without --rotate."
    )
  from q4jax.cli.speed import rss_bytes
  from q4jax.formats.open import open_checkpoint, open_sink
  from q4jax.offline.calibration import read_importance
  from q4jax.offline.quantize import quantize_model, targets
  from q4jax.offline.rotate import RotatedCheckpoint

  importance = None if flags.calibration is None else read_importance(flags.calibration)
  begin = time.perf_counter()
  with open_checkpoint(common.find_model(source_name, flags)) as opened:
    source, bytes_in = opened, sum(t.nbytes for t in opened.tensors.values())
    if seed is not None:
      source = RotatedCheckpoint(opened, seed, flags.requantize)
    options: dict[str, Any] = {}
    if out.suffix == ".gguf" and scheme.mix is not None:
      options["file_type"] = scheme.mix
    watched = common.watched(flags)
    planned = targets(source, scheme, importance, flags.requantize)
    with common.bar(f"quantising {source_name}") if watched else nullcontext() as advance:
      quantize_model(
        source,
        lambda tensors: open_sink(out, source.config, source.metadata, tensors, **options),
        scheme,
        importance=importance,
        tokens=_tokens(source, flags),
        again=flags.requantize,
        progress=advance,
      )
    bytes_out = sum(t.nbytes for t in planned.values())
    weights = sum(t.num_rows * t.shape[-1] for t in planned.values())
  seconds = time.perf_counter() - begin
  bits = 8 * bytes_out / weights
  if flags.json:
    sizes = {"source_bytes": bytes_in, "out_bytes": bytes_out, "bits_per_weight": round(bits, 4)}
    about = {"source": source_name, "out": str(out), "type": flags.type, **sizes}
    common.print_json(
      about | {"seconds": round(seconds, 3), "peak_rss_bytes": rss_bytes(peak=True)}
    )
    return 0
  common.note(
    f"{out}: {common.size(bytes_in)} -> {common.size(bytes_out)}, {bits:.3f} bits a weight | "
    f"{seconds:.1f} s | peak memory {common.size(rss_bytes(peak=True))}"
  )
  return 0


def _scheme(flags: absl_flags.FlagValues) -> "Scheme":
  from q4jax.offline.scheme import Scheme
  from q4jax.quant.grid import Grid

  kind = flags.type.lower()
  if not kind.startswith("int"):
    for name in ("group_size", "symmetric", "head"):
      if flags[name].present:
        raise UsageError(f"--{name} is for --type=int2 to int8; {kind} has its own.")
    return Scheme(mix=kind, method=flags.method)
  bits = kind.removeprefix("int")
  if bits not in ("2", "3", "4", "5", "6", "7", "8"):
    raise UsageError(f"--type={flags.type}: the integers are int2 to int8.")
  size: Any = flags.group_size
  if size not in ("channel", "tensor"):
    if not (size.isdigit() and int(size)):
      raise UsageError(f"--group_size={size}: expected a number, channel or tensor.")
    size = int(size)
  grid = Grid(int(bits), size, "signed" if flags.symmetric else "minimum")
  return Scheme(grid=grid, method=flags.method, head=flags.head)


def _tokens(source: "Checkpoint", flags: absl_flags.FlagValues) -> "NDArray[np.int32] | None":
  if flags.text is None:
    return None
  from q4jax.offline.sequences import sequences

  return sequences(source, common.read_text(flags.text), flags.ctx, flags.sequences, flags.seed)
