"""Measures prefill (pp) and decode (tg) speed, with llama-bench's tests and its record's keys.

  q4jax bench model.gguf
  q4jax bench model.gguf --pp=128,512 --tg=128 --depth=0,2048
  q4jax bench model.gguf --pp=0 --tg=64 --threads=4 --json
  q4jax bench model.gguf --pp=0 --tg=64 --batch=1,4,8,16

pp N reads N random tokens and computes the last one's logits; tg N samples N tokens greedily, one
by one. Each runs at each --depth: that many tokens lie in the cache before the clock starts; and
with each --batch: that many sequences side by side, whose tokens are counted together (what
llama-batched-bench calls S_PP and S_TG). A warm-up repetition, which compiles, is not counted.
Nothing of text is involved.

The table goes to stdout as Markdown, t/s as mean and sample standard deviation. --json prints a
list of objects with llama-bench's keys (n_prompt, n_gen, n_depth, avg_ts, stddev_ts, avg_ns,
stddev_ns, samples_ns, samples_ts, model_filename, model_type, model_size, model_n_params,
n_threads, n_ubatch, type_k, type_v, backends, test_time) and n_parallel (sequences), rss_bytes
(resident memory after the test), peak_rss_bytes, device, jax_version, q4jax_version.
"""

import datetime
import statistics
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from q4jax.cli import common, cpus
from q4jax.cli.parsing import UsageError

if TYPE_CHECKING:
  from q4jax.engine import Engine
  from q4jax.engine.bench import Result
  from q4jax.model.model import Model

ARGUMENTS = ("MODEL",)
FLAGS = absl_flags.FlagValues()
absl_flags.DEFINE_list("pp", ["512"], "Prompt lengths; 0 for none.", flag_values=FLAGS)
absl_flags.DEFINE_list("tg", ["128"], "Tokens to generate; 0 for none.", flag_values=FLAGS)
absl_flags.DEFINE_list("depth", ["0"], "Tokens in the cache before each test.", flag_values=FLAGS)
absl_flags.DEFINE_list("batch", ["1"], "Sequences side by side in each test.", flag_values=FLAGS)
absl_flags.DEFINE_integer("reps", 5, "Counted repetitions of each test.", 1, flag_values=FLAGS)
common.define_engine(FLAGS, pool=False)
common.define_model(FLAGS)
common.define_json(FLAGS, "a JSON list of records")


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Runs all tests, then prints the records."""
  pps, tgs, depths, batches = (_lengths(flags, name) for name in ("pp", "tg", "depth", "batch"))
  pairs = [(n, 0) for n in pps if n] + [(0, n) for n in tgs if n]
  if not pairs or not depths or not batches:
    raise UsageError(
      "there is nothing to measure; give numbers to --depth and --batch, and to --pp or --tg."
    )
  model, _ = common.load_model(arguments[0], flags, flags.tokenizer)
  from q4jax.engine.bench import Test, bench

  engine = common.make_engine(model, flags)
  tests = [Test(pp, tg, depth, batch) for depth in depths for pp, tg in pairs for batch in batches]
  records = []
  for result in bench(engine, tests, flags.reps):
    records.append(_record(engine, result))
    if common.watched(flags):
      common.note(f"{len(records)}/{len(tests)} {_test_name(records[-1])}: {result.avg_ts:.2f} t/s")
  if flags.json:
    common.print_json(records)
  else:
    print(_table(records))
  return 0


def _lengths(flags: absl_flags.FlagValues, name: str) -> list[int]:
  words: list[str] = flags[name].value or []
  if not all(word.strip().isdecimal() for word in words):
    raise UsageError(f"--{name}={','.join(words)}; expected whole numbers with commas between.")
  return [int(word) for word in words]


_KV_NAMES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}


def _record(engine: "Engine", result: "Result") -> dict[str, Any]:
  import jax

  from q4jax import __version__
  from q4jax.cli.speed import rss_bytes

  model, nanoseconds = engine.model, [round(1e9 * s) for s in result.seconds]
  device = next(iter(model.leaves[0].devices()))
  return {
    "q4jax_version": __version__,
    "jax_version": jax.__version__,
    "backends": device.platform.upper(),
    "device": device.device_kind,
    "model_filename": model.path,
    "model_type": _model_type(model),
    "model_size": model.nbytes,
    "model_n_params": model.num_params,
    "n_threads": cpus.count(),
    "n_ubatch": engine.prefill_chunk,
    "type_k": _kv_name(engine, "key"),
    "type_v": _kv_name(engine, "value"),
    "kv": None if engine.kv is None else repr(engine.kv),
    "n_prompt": result.test.n_prompt,
    "n_gen": result.test.n_gen,
    "n_depth": result.test.n_depth,
    "n_parallel": result.test.n_batch,
    "test_time": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    "avg_ns": round(statistics.fmean(nanoseconds)),
    "stddev_ns": round(statistics.stdev(nanoseconds)) if len(nanoseconds) > 1 else 0,
    "avg_ts": round(result.avg_ts, 6),
    "stddev_ts": round(result.stddev_ts, 6),
    "samples_ns": nanoseconds,
    "samples_ts": [round(rate, 3) for rate in result.rates],
    "rss_bytes": rss_bytes(),
    "peak_rss_bytes": rss_bytes(peak=True),
  }


def _kv_name(engine: "Engine", side: str) -> str:
  """ "f16", or "int4" where so compressed, with the share of tokens that stays: "int4@0.6"."""
  import jax.numpy as jnp

  name, kv = _KV_NAMES[jnp.dtype(engine.kv_dtype).name], engine.kv
  if kv is None:
    return name
  format = getattr(kv, side)
  name = f"f{format.bits}" if format.is_float else f"int{format.bits}"
  keep = getattr(kv.select, "keep", None)
  return name if kv.policy is None else f"{name}@{keep or type(kv.select).__name__}"


def _model_type(model: "Model") -> str:
  count, bits = model.num_params, 8 * model.nbytes / model.num_params
  size = f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"
  return f"{model.config.architecture} {size} {bits:.2f} bpw"


def _test_name(record: dict[str, Any]) -> str:
  """As llama-bench calls it: "pp512", "tg128 @ d2048"; and "tg128 x 8" for eight sequences."""
  name = f"pp{record['n_prompt']}" if record["n_prompt"] else f"tg{record['n_gen']}"
  name += f" x {record['n_parallel']}" if record["n_parallel"] > 1 else ""
  return name + (f" @ d{record['n_depth']}" if record["n_depth"] else "")


def _table(records: list[dict[str, Any]]) -> str:
  """Markdown in llama-bench's columns, with resident memory."""
  rows = [["model", "size", "backend", "threads", "kv", "test", "t/s", "memory"]]
  for r in records:
    speed = f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}"
    left = [r["model_type"], common.size(r["model_size"]), r["backends"], str(r["n_threads"])]
    rows.append([*left, r["type_k"], _test_name(r), speed, common.size(r["rss_bytes"])])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [" | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
  rule = " | ".join("-" * (w - 1) + ":" for w in widths)
  device, last = records[-1]["device"], records[-1]
  lines = [f"| {line} |" for line in (lines[0], rule, *lines[1:])]
  lines.append(f"\nq4jax {last['q4jax_version']}, jax {last['jax_version']}, device {device}")
  return "\n".join(lines)
