r"""Continues a prompt. The new text goes to stdout as it is written, a line with speeds to stderr.

  q4jax generate tiny --prompt="The built-in function" --temperature=0
  q4jax generate model.gguf --file=letter.txt --max_tokens=400 --stop="Yours" --seed=7
  q4jax generate model.gguf --prompt="One," --prompt="Two, three" --json
  cat notes.txt | q4jax generate model.gguf --file=-

Special tokens in the prompt are read as plain text; one newline at the end of a file is dropped.
Several --prompt run as one batch and are printed one after another once all are done; prompt i gets
what it would get alone with --seed plus i.

--json prints one object with the keys text, tokens (ids), finish_reason (stop, length,
interrupted), prompt_tokens, logprobs (if asked for), model and timing; several prompts give the
first five for each, as a list under the key completions. Ctrl-C prints what there is and exits with
code 130.
"""

from absl import flags as absl_flags

from q4jax.cli import common
from q4jax.cli.parsing import UsageError

ARGUMENTS = ("MODEL",)
FLAGS = absl_flags.FlagValues()
absl_flags.DEFINE_multi_string(
  "prompt", [], "Text to continue; several make a batch.", flag_values=FLAGS
)
absl_flags.DEFINE_string("file", None, "File with the prompt; - is stdin.", flag_values=FLAGS)
common.define_sampling(FLAGS, max_tokens=128)
absl_flags.DEFINE_integer(
  "logprobs",
  None,
  "With --json: the log-probability of each token and of this many alternatives.",
  0,
  20,
  flag_values=FLAGS,
)
common.define_engine(FLAGS)
common.define_model(FLAGS)
common.define_json(FLAGS)


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Generates, and prints text or JSON."""
  prompts = _prompts(flags)
  if flags.logprobs is not None and not flags.json:
    raise UsageError("--logprobs are shown with --json only; add it.")
  model, load_s = common.load_model(arguments[0], flags, flags.tokenizer)
  from q4jax.cli import streaming

  engine = common.make_engine(model, flags)
  ids = [model.tokenizer.encode(prompt) for prompt in prompts]
  options = {**common.sampling(flags), "logprobs": flags.logprobs}
  streams = len(prompts) == 1 and not flags.json
  answers, speed = streaming.answer(
    engine, ids, options, streaming.write if streams else streaming.discard
  )
  if flags.json:
    rows = [answer.json() for answer in answers]
    body = rows[0] if len(rows) == 1 else {"completions": rows}
    timing = {"load_s": round(load_s, 6), **speed.json()}
    common.print_json({**body, "model": model.path, "timing": timing})
  else:
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
      if not streams:
        print(f"[{i + 1}/{len(prompts)}] {prompt!r}\n{answer.text}")
    print(end="\n" if streams else "", flush=True)
    common.note(speed.line())
  return 130 if streaming.interrupted(answers) else 0


def _prompts(flags: absl_flags.FlagValues) -> list[str]:
  if flags.prompt and flags.file is not None:
    raise UsageError("give --prompt or --file, not both.")
  if flags.file is not None:
    return [common.read_text(flags.file).removesuffix("\n")]
  if not flags.prompt:
    raise UsageError("there is nothing to continue; give --prompt=TEXT or --file=PATH.")
  return list(flags.prompt)
