"""Writes a model as StableHLO and weights, to run with JAX alone or to compile elsewhere.

  q4jax export tiny tiny.stablehlo
  q4jax export model.qbin model.stablehlo --platforms=cuda --max_context=4096
  python tiny.stablehlo/run.py tiny.stablehlo 1 450 4996 --tokens=16

MODEL is any model that q4jax reads; OUT becomes a folder with two functions, prefill and decode,
serialised by jax.export, the weights, a manifest.json that describes them, and run.py, which needs
jax, numpy and flatbuffers and nothing of q4jax (docs/export.md).

The functions are lowered for all --platforms at once and dequantise matrices by XLA. With --native
they call the CPU's kernels instead, which the package q4jax_kernels brings.

--json prints one object with the keys model, out, platforms, custom_calls, max_context,
weights_bytes and out_bytes.
"""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

from absl import flags as absl_flags

from q4jax.cli import common

ARGUMENTS = ("MODEL", "OUT")
FLAGS = absl_flags.FlagValues()
absl_flags.DEFINE_list(
  "platforms", None, "Of cpu, cuda, rocm, tpu; cpu,cuda,tpu if not given, cpu with --native.",
  flag_values=FLAGS,
)  # fmt: skip
absl_flags.DEFINE_boolean("native", False, "Call the CPU's kernels.", flag_values=FLAGS)
absl_flags.DEFINE_integer(
  "max_context", None, "Slots of the cache; the model's limit or 2048 if not given.", 1,
  flag_values=FLAGS,
)  # fmt: skip
absl_flags.DEFINE_integer("chunk", 64, "Prompt tokens in a call of prefill.", 1, flag_values=FLAGS)
absl_flags.DEFINE_integer("batch", 1, "Sequences side by side.", 1, flag_values=FLAGS)
absl_flags.DEFINE_enum(
  "kv_dtype", "f32", ["f16", "bf16", "f32"], "Type of the cache.", flag_values=FLAGS
)
absl_flags.DEFINE_string(
  "calibration", None,
  "Round activations as this calibration says (a folder of `q4jax calibrate`, a .json, a .qbin).",
  flag_values=FLAGS,
)  # fmt: skip
absl_flags.DEFINE_boolean("force", False, "Replace OUT if it exists.", flag_values=FLAGS)
common.define_json(FLAGS)


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Exports."""
  name, out = arguments[0], Path(arguments[1])
  common.check_out(out, flags.force)
  from q4jax.exported.export import Options, export

  platforms = flags.platforms or (["cpu"] if flags.native else ["cpu", "cuda", "tpu"])
  options = Options(
    platforms=tuple(platforms),
    native=flags.native,
    max_context=flags.max_context,
    chunk=flags.chunk,
    batch=flags.batch,
    kv_dtype=flags.kv_dtype,
  )
  path = common.find_model(name, flags)
  with common.bar(f"loading {name}") if common.watched(flags) else nullcontext() as advance:
    found = export(path, out, options, flags.calibration, advance)
  if flags.json:
    common.print_json({"model": name, **dataclasses.asdict(found)})
    return 0
  calls = ", ".join(found.custom_calls) or "none"
  print(
    f"{found.out}: prefill and decode for {', '.join(found.platforms)}, {found.max_context} slots, "
    f"weights {common.size(found.weights_bytes)}, custom calls: {calls}"
  )
  return 0
