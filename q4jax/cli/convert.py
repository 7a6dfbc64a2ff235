"""Writes a model in another format: the same weights, in the same types.

  q4jax convert model.gguf model.qbin
  q4jax convert hf://org/repo model.gguf

SOURCE is a .gguf or .qbin file, a Hugging Face folder (config.json, .safetensors, tokenizer.json or
tokenizer.model), an .orbax folder, a name on the hub, or tiny. OUT ends in .gguf, .qbin or .orbax.
Nothing is quantised: q4jax quantize does that. --rotate alone changes weights: the rotated model,
in float32, computes the same. OUT appears when it is complete, never in part.

--json prints one object: source, out, tensors, weights, source_bytes (of the tensors), out_bytes
(of all of OUT), has_tokenizer, and stored_as: formats that OUT does not have, and the ones that
hold the very same weights there.
"""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from absl import flags as absl_flags

from q4jax.cli import common

ARGUMENTS = ("SOURCE", "OUT")
FLAGS = absl_flags.FlagValues()
absl_flags.DEFINE_enum(
  "layout",
  None,
  ["rows", "x16"],
  "How a .qbin keeps its matrices: row by row, or in the tiles of 16 rows that a CPU maps and "
  "multiplies with as they are (the default).",
  flag_values=FLAGS,
)
common.define_rotate(FLAGS)
absl_flags.DEFINE_boolean("force", False, "Replace OUT if it exists.", flag_values=FLAGS)
common.define_json(FLAGS)


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Converts."""
  source, out, seed = arguments[0], Path(arguments[1]), common.rotate_seed(flags)
  common.check_out(out, flags.force)
  from q4jax.formats.open import check_suffix
  from q4jax.offline.convert import convert

  check_suffix(out)
  path = common.find_model(source, flags)  # After OUT: it may take a long download.
  with common.bar(f"writing {out}") if common.watched(flags) else nullcontext() as advance:
    found = convert(
      path, out, layout=flags.layout, rotate=seed, force=flags.force, progress=advance
    )
  if flags.json:
    common.print_json(asdict(found))
    return 0
  bits = 8 * found.out_bytes / found.weights
  print(
    f"{found.out}: {found.tensors} tensors, {found.weights:,} weights, "
    f"{common.size(found.out_bytes)} ({bits:.2f} bits a weight; the source's tensors have "
    f"{common.size(found.source_bytes)})"
  )
  for old, new in found.stored_as.items():
    common.note(f"{old} is stored as {new}, which holds the same weights in more bits.")
  if not found.has_tokenizer:
    common.note(
      "The source has no tokenizer.json or tokenizer.model, so OUT has no vocabulary: llama.cpp "
      "will not load it, and q4jax only with --tokenizer."
    )
  return 0
