"""Watches what flows through a model on a text, and writes quantiser parameters and statistics.

  q4jax calibrate model.f16.gguf calibration --text=corpus.txt
  q4jax calibrate model.f16.gguf calibration --text=corpus.txt --weight_bits=4 --group_size=128

SOURCE is any model that q4jax reads, OUT a folder. For each block it gets a JSON document with a
record for each matrix's input, for keys and values, and with --weight_bits for weights
(docs/formats/calibration.md), and the sums of squares of all inputs, also as an imatrix.gguf for
llama.cpp. `q4jax quantize --calibration=OUT` uses them.

The model passes through memory a block at a time. A run that was stopped goes on where it was when
it is given the same arguments. Memory: a block in float32, and 4 bytes a hidden value: tokens times
the model's width.

--json prints one object with the keys source, out, sequences, ctx, records, seconds and
peak_rss_bytes.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from q4jax.cli import common, cpus
from q4jax.cli.parsing import UsageError

ARGUMENTS = ("SOURCE", "OUT")
FLAGS = absl_flags.FlagValues()
common.define_text(FLAGS, "Text to run through the model, UTF-8; - is stdin.")
absl_flags.DEFINE_integer("bits", 8, "Of the inputs' records.", 2, 8, flag_values=FLAGS)
absl_flags.DEFINE_integer("kv_bits", 8, "Of keys' and values' records.", 2, 8, flag_values=FLAGS)
absl_flags.DEFINE_enum(
  "range", "minmax", ["minmax", "average", "percentile", "mse", "kl"],
  "How an input's range is chosen: all that was seen, the mean over sequences, the middle "
  "--percentile, or that of least squared error or KL divergence.", flag_values=FLAGS,
)  # fmt: skip
absl_flags.DEFINE_float("percentile", 99.99, "For --range=percentile.", flag_values=FLAGS)
absl_flags.DEFINE_boolean("symmetric", True, "Ranges around 0.", flag_values=FLAGS)
absl_flags.DEFINE_integer(
  "weight_bits", None, "Write records of the weights too, of so many bits.", 2, 8,
  flag_values=FLAGS,
)  # fmt: skip
absl_flags.DEFINE_integer("group_size", 128, "Of the weights' records.", 1, flag_values=FLAGS)
absl_flags.DEFINE_enum(
  "method", "mse", ["rtn", "mse", "hqq"], "Of the weights' records.", flag_values=FLAGS
)
absl_flags.DEFINE_integer(
  "threads", None, "CPUs to use; all that there are, if not given.", 1, flag_values=FLAGS
)
common.define_json(FLAGS)


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Calibrates SOURCE into OUT."""
  source_name, out = arguments[0], Path(arguments[1])
  if flags.text is None:
    raise UsageError("there is no text to run through the model; give --text=PATH.")
  text = common.read_text(flags.text)
  cpus.limit_threads(flags.threads)
  from q4jax.cli.speed import rss_bytes
  from q4jax.formats.open import open_checkpoint
  from q4jax.offline.calibrate import Options, calibrate
  from q4jax.offline.calibration import read_records
  from q4jax.offline.sequences import sequences
  from q4jax.quant.grid import Grid

  rule: Any = "signed" if flags.symmetric and flags.method != "hqq" else "minimum"
  options = Options(
    bits=flags.bits,
    kv_bits=flags.kv_bits,
    range=flags.range,
    percentile=flags.percentile,
    symmetric=flags.symmetric,
    grid=flags.weight_bits and Grid(flags.weight_bits, flags.group_size, rule),
    method=flags.method,
  )
  begin = time.perf_counter()
  with open_checkpoint(common.find_model(source_name, flags)) as source:
    tokens = sequences(source, text, flags.ctx, flags.sequences, flags.seed)
    with common.bar("blocks") if common.watched(flags) else nullcontext() as advance:
      calibrate(source, tokens, out, options, advance)
  seconds, count = time.perf_counter() - begin, len(read_records(out))
  if flags.json:
    size = {"sequences": len(tokens), "ctx": tokens.shape[1], "records": count}
    speed = {"seconds": round(seconds, 3), "peak_rss_bytes": rss_bytes(peak=True)}
    common.print_json({"source": source_name, "out": str(out), **size, **speed})
    return 0
  common.note(
    f"{out}: {count} records of {len(tokens)} sequences of {tokens.shape[1]} tokens | "
    f"{seconds:.1f} s | peak memory {common.size(rss_bytes(peak=True))}"
  )
  return 0
