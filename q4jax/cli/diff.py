"""Compares two forms of one model: the error of each matrix, and what both predict for a text.

  q4jax diff model.f16.gguf model.Q4_K_M.gguf
  q4jax diff model.f16.gguf model.qbin --text=held-out.txt --plot=error.png

REFERENCE and MODEL are of any format. For each matrix: its formats, bits a weight, and the relative
error |w - w'| / |w| of the second model's weights. With --text, as llama-perplexity's
--kl-divergence: perplexities, the divergence of the predictions and how often both find the same
token likeliest, over the second half of each chunk of --ctx tokens.

--json prints one object with the keys reference, model, tensors (each with name, formats,
same_bytes and error), mean_relative_l2, seconds and, with --text, comparison (ppl, reference_ppl,
ratio_stderr, kl, kl_stderr, kl_p99, top1, tokens).
"""

import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from q4jax.cli import common

if TYPE_CHECKING:
  from q4jax.compare import Comparison
  from q4jax.offline.diff import TensorDifference

ARGUMENTS = ("REFERENCE", "MODEL")
FLAGS = absl_flags.FlagValues()
absl_flags.DEFINE_string("text", None, "Text to score, UTF-8; - is stdin.", flag_values=FLAGS)
absl_flags.DEFINE_integer("ctx", 512, "Tokens in a chunk.", 4, flag_values=FLAGS)
absl_flags.DEFINE_integer(
  "chunks", 40, "Score only so many chunks, from the start.", 1, flag_values=FLAGS
)
absl_flags.DEFINE_string(
  "plot", None, "Image to write: the error of each kind of matrix over the layers.",
  flag_values=FLAGS,
)  # fmt: skip
common.define_machine(FLAGS)
common.define_json(FLAGS)


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Prints the differences."""
  text = None if flags.text is None else common.read_text(flags.text)
  paths = [common.find_model(name, flags) for name in arguments]
  from q4jax.formats.open import open_checkpoint
  from q4jax.offline import diff

  begin = time.perf_counter()
  with open_checkpoint(paths[0]) as reference, open_checkpoint(paths[1]) as model:
    found = []
    matrices = sum(len(t.shape) == 2 for t in reference.tensors.values())
    with common.bar("matrices") if common.watched(flags) else nullcontext() as advance:
      for difference in diff.differences(reference, model):
        found.append(difference)
        if advance is not None:
          advance(len(found), matrices)
  if flags.plot is not None:
    diff.plot(found, flags.plot)
  comparison = None if text is None else _compare(flags, arguments, text)
  seconds = time.perf_counter() - begin
  mean = sum(d.error.relative_l2 for d in found) / len(found)
  if flags.json:
    tensors = [
      {"name": d.name, "formats": d.formats, "same_bytes": d.same_bytes, "error": d.error.to_json()}
      for d in found
    ]
    about = {"reference": arguments[0], "model": arguments[1], "tensors": tensors}
    compared = {} if comparison is None else {"comparison": asdict(comparison)}
    common.print_json(about | {"mean_relative_l2": mean, **compared, "seconds": round(seconds, 3)})
    return 0
  _print(found, mean, comparison)
  return 0


def _compare(flags: absl_flags.FlagValues, arguments: list[str], text: str) -> "Comparison":
  from q4jax.compare import Reference

  watched = common.watched(flags)
  reference, _ = common.load_model(arguments[0], flags)
  with common.bar(f"reading with {arguments[0]}") if watched else nullcontext() as advance:
    expected = Reference(reference, text, flags.ctx, flags.chunks, advance)
  del reference
  model, _ = common.load_model(arguments[1], flags)
  with common.bar(f"reading with {arguments[1]}") if watched else nullcontext() as advance:
    return expected.compare(model, advance)


def _print(found: "list[TensorDifference]", mean: float, comparison: "Comparison | None") -> None:
  width = max(len(d.name) for d in found)
  for d in found:
    e = d.error
    formats = " -> ".join(dict.fromkeys(d.formats))
    what = "the same bytes" if d.same_bytes else f"{100 * e.relative_l2:7.3f} %  {e.snr_db:6.2f} dB"
    print(f"{d.name:{width}}  {formats:20} {e.bpw:6.3f} bpw  {what}")
  print(f"{len(found)} matrices, mean relative error {100 * mean:.3f} %")
  if comparison is not None:
    c = comparison
    print(
      f"perplexity {c.ppl:.4f}, reference {c.reference_ppl:.4f} "
      f"({100 * (c.ratio - 1):+.2f} +/- {100 * c.ratio_stderr:.2f} %)"
    )
    print(
      f"KL {c.kl:.5f} +/- {c.kl_stderr:.5f} nats, 99th percentile {c.kl_p99:.4f}; "
      f"same likeliest token {100 * c.top1:.2f} %"
    )
