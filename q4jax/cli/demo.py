"""Writes a few lines with the model that comes with q4jax, and says what int4 cost it.

  q4jax demo
  q4jax demo --prompt="A dictionary maps" --max_tokens=100

The model, alias tiny, is a Llama of a few million weights that this project trained on the English
of Python's documentation, in Q4_K_M. It completes such text; it knows nothing else.

--json prints one object: prompt, text, timing, and report (the figures recorded when the model was
made; null where there are none).
"""

import json
from importlib import resources
from typing import Any

from absl import flags as absl_flags

from q4jax.cli import common

ARGUMENTS = ()
FLAGS = absl_flags.FlagValues()
absl_flags.DEFINE_string("prompt", "The built-in function", "Text to continue.", flag_values=FLAGS)
absl_flags.DEFINE_integer("max_tokens", 64, "Most new tokens.", 1, flag_values=FLAGS)
common.define_machine(FLAGS)
common.define_json(FLAGS)

_NEXT = """\
what to try next:
  q4jax generate tiny --prompt="A class is" --temperature=0.8 --seed=1
  q4jax generate hf://org/repo/file.gguf --prompt="..."   any Llama or Qwen in GGUF, downloaded once
  q4jax chat MODEL                                        a model with a chat template
  q4jax bench MODEL                                       how fast it is here
  q4jax --help"""


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Generates greedily, then prints the recorded figures."""
  model, load_s = common.load_model("tiny", flags)
  from q4jax.cli import streaming
  from q4jax.engine import Engine

  show = streaming.discard if flags.json else streaming.write
  show(0, flags.prompt)
  ids = [model.tokenizer.encode(flags.prompt)]
  options = {"max_tokens": flags.max_tokens, "temperature": 0.0}
  answers, speed = streaming.answer(Engine(model), ids, options, show)
  report = read_report()
  if flags.json:
    timing = {"load_s": round(load_s, 6), **speed.json()}
    common.print_json(
      {"prompt": flags.prompt, "text": answers[0].text, "timing": timing, "report": report}
    )
  else:
    show(0, "\n\n")
    common.note(speed.line())
    print("\n" + _figures(report) + "\n\n" + _NEXT)
  return 130 if streaming.interrupted(answers) else 0


def read_report() -> dict[str, Any] | None:
  """The figures recorded when `tiny` was made: package data, tiny.json; None without it."""
  file = resources.files("q4jax") / "data" / "tiny.json"
  if not file.is_file():
    return None
  report = json.loads(file.read_text(encoding="utf-8"))
  assert isinstance(report, dict)
  return report


def _figures(report: dict[str, Any] | None) -> str:
  """Float against int4 as a small table; a figure that was not recorded is a dash."""
  if report is None:
    return "No figures are recorded for this model (q4jax/data/tiny.json is absent)."

  def cell(key: str, form: str) -> str:
    value = report.get(key)
    return format(value, form) if isinstance(value, int | float) else "-"

  rows = [
    ("", "float (f16)", "int4 (Q4_K_M)"),
    ("bytes", cell("bytes_f16", ",d"), cell("bytes_q4_k_m", ",d")),
    ("perplexity, held-out text", cell("perplexity_f16", ".3f"), cell("perplexity_q4_k_m", ".3f")),
    (
      "bits per byte, same text",
      cell("held_out_bits_per_byte_f16", ".4f"),
      cell("held_out_bits_per_byte_q4_k_m", ".4f"),
    ),
  ]
  head = f"{cell('params', ',d')} weights; xz needs {cell('xz_bits_per_byte', '.3f')} bits per byte"
  return "\n".join([head, *(f"{a:26}{b:>14}{c:>15}" for a, b, c in rows)])
