"""Measures how well a model predicts a text, by llama.cpp's protocol, so that the figures compare.

  q4jax perplexity model.gguf --file=wikitext2.test.txt
  q4jax perplexity model.gguf --file=wikitext2.test.txt --ctx=512 --chunks=20 --json

As `llama-perplexity -f FILE -c CTX --chunks N`: the text (one newline at its end dropped) is cut
into chunks of --ctx tokens, each read from an empty cache with BOS first where the model wants it,
and the second half of each chunk is scored.

--json prints one object with the keys ppl (perplexity), stderr (its standard error), nll (mean
negative log-likelihood of a token, in nats), chunks, tokens (scored), ctx, model, load_s, seconds,
tokens_per_s (all tokens read, compiling included) and peak_rss_bytes.
"""

import time
from contextlib import nullcontext
from dataclasses import asdict

from absl import flags as absl_flags

from q4jax.cli import common
from q4jax.cli.parsing import UsageError

ARGUMENTS = ("MODEL",)
FLAGS = absl_flags.FlagValues()
absl_flags.DEFINE_string("file", None, "File with the text, UTF-8; - is stdin.", flag_values=FLAGS)
absl_flags.DEFINE_integer("ctx", 512, "Tokens in a chunk.", 1, flag_values=FLAGS)
absl_flags.DEFINE_integer(
  "chunks", None, "Score only this many chunks, from the start; all if not given.", 1,
  flag_values=FLAGS,
)  # fmt: skip
absl_flags.DEFINE_integer(
  "batch", None, "Chunks that run together; about 2048 tokens of them if not given.", 1,
  flag_values=FLAGS,
)  # fmt: skip
common.define_model(FLAGS)
common.define_json(FLAGS)


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Scores the text and prints the figures."""
  if flags.file is None:
    raise UsageError("there is no text to score; give --file=PATH.")
  text = common.read_text(flags.file)
  model, load_s = common.load_model(arguments[0], flags, flags.tokenizer)
  from q4jax.cli.speed import rss_bytes
  from q4jax.evaluate import perplexity

  begin = time.perf_counter()
  with common.bar("chunks") if common.watched(flags) else nullcontext() as advance:
    result = perplexity(model, text, flags.ctx, flags.chunks, flags.batch, advance)
  seconds = time.perf_counter() - begin
  rate = result.chunks * result.ctx / seconds
  if flags.json:
    times = {"load_s": load_s, "seconds": seconds, "tokens_per_s": rate}
    timing = {key: round(value, 6) for key, value in times.items()}
    about = {"model": model.path, **timing, "peak_rss_bytes": rss_bytes(peak=True)}
    common.print_json({**asdict(result), **about})
    return 0
  print(f"perplexity {result.ppl:.4f} +/- {result.stderr:.4f}")
  common.note(
    f"{result.chunks} chunks of {result.ctx} tokens, {result.tokens} scored | {seconds:.1f} s, "
    f"{rate:.1f} tok/s | peak memory {common.size(rss_bytes(peak=True))}"
  )
  return 0
