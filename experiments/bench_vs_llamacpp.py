r"""q4jax against llama.cpp on the same GGUF file, process by process in turn, as ratios.

  python -m experiments.bench_vs_llamacpp --model=1b-q4km.gguf --llama_bench=build/bin/llama-bench \
    --llama_batched_bench=build/bin/llama-batched-bench --reps=5 \
    --out=experiments/results/vs_llamacpp.json

About 3 minutes a repetition for a model of 1B weights on two cores, 15 for 8B. With compressed
caches of both sides, at depths where they matter:

  python -m experiments.bench_vs_llamacpp --model=1b-q4km.gguf --llama_bench=build/bin/llama-bench \
    --pp=0 --tg=32 --depth=4096,8192 --reps=1 --cache_types=f16,q8_0,q4_0 \
    --kv="--kv_bits=4 --kv_rotate;--kv_bits=4 --kv_rotate --keep=0.6"

Each repetition runs, one after another and each as a process of its own, `q4jax bench`, llama-bench
with its weights repacked and (where this build has the flag) not, then the same with several
sequences in a batch (llama-batched-bench). Every process warms up and then measures once. Around
each one the machine's read bandwidth is probed: where it wandered, the times mean little, and the
ratios of neighbours more. Medians over the repetitions. Memory is the process's peak (VmHWM), files
that are mapped in included, read while it runs.
"""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app

from experiments import config_flags
from experiments.config_flags import option
from experiments.provenance import markdown, save
from q4jax_kernels import probe


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run. Programs of llama.cpp are paths."""

  model: str = option("", "A GGUF file.")
  llama_bench: str = option("", "The llama-bench program.")
  llama_batched_bench: str = option("", "The llama-batched-bench program; no batches without it.")
  reps: int = option(5, "Rounds over all sides.")
  pp: int = option(512, "Prompt tokens; 0 for none.")
  tg: int = option(128, "Tokens to generate.")
  depth: tuple[int, ...] = option((0,), "Tokens in the cache before each test.")
  batch: tuple[int, ...] = option((1, 4, 8, 16), "Sequences in a batch.")
  batch_depth: int = option(128, "Prompt of each sequence of a batch.")
  kv: str = option("", "Flags of more q4jax sides, as --kv_bits=4; several sides with ; between.")
  cache_types: tuple[str, ...] = option(("f16",), "Types of llama.cpp's cache, a side each.")
  threads: int = option(0, "Threads of both sides; 0 takes as many as this process may use.")
  probe_mib: int = option(512, "Buffer of the bandwidth probe.")
  out: str = option("", "File to write the records to, as JSON.")

  @property
  def num_threads(self) -> int:
    return self.threads or probe.threads()


@dataclasses.dataclass(frozen=True)
class Side:
  """One command. `batched` tells how its output reads."""

  name: str
  command: list[str]
  batched: bool = False


def sides(config: Config) -> list[Side]:
  """The commands of one repetition, in the order in which they run."""
  depths, batches = (",".join(map(str, v)) for v in (config.depth, config.batch))
  numbers = [f"--threads={config.num_threads}", "--reps=1", "--json"]
  ours = [sys.executable, "-m", "q4jax", "bench", config.model, *numbers, f"--tg={config.tg}"]
  theirs = [config.llama_bench, "-m", config.model, "-t", str(config.num_threads), "-r", "1"]
  theirs += ["-p", str(config.pp), "-n", str(config.tg), "-d", depths, "-o", "json"]
  found = [
    Side(f"q4jax {kv}".strip(), [*ours, f"--pp={config.pp}", f"--depth={depths}", *kv.split()])
    for kv in ("", *filter(None, config.kv.split(";")))
  ]
  found += [
    Side(name if type == "f16" else f"{name} {type}", [*theirs, *flag, *_cache(type)])
    for name, flag in _repacking(config.llama_bench, ["--repack", "1"], ["--repack", "0"])
    for type in config.cache_types
  ]
  if not config.llama_batched_bench or not config.batch:
    return found
  context = max(config.batch) * (config.batch_depth + config.tg)
  theirs = [config.llama_batched_bench, "-m", config.model, "-t", str(config.num_threads)]
  theirs += ["-npp", str(config.batch_depth), "-ntg", str(config.tg), "-npl", batches]
  theirs += ["-c", str(context), "--output-format", "jsonl"]
  settings = [f"--depth={config.batch_depth}", f"--batch={batches}"]
  found += [Side("q4jax", [*ours, "--pp=0", *settings], batched=True)]
  found += [
    Side(name, [*theirs, *flag], batched=True)
    for name, flag in _repacking(config.llama_batched_bench, [], ["--no-repack"])
  ]
  return found


def _cache(type: str) -> list[str]:
  return [] if type == "f16" else ["-ctk", type, "-ctv", type, "-fa", "1"]


def _repacking(program: str, on: list[str], off: list[str]) -> list[tuple[str, list[str]]]:
  """The settings of repacking that the program has: (name of the side, flags)."""
  help = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
  if off[0] not in help.stdout + help.stderr:
    return [("llama.cpp", [])]
  return [("llama.cpp repacked", on), ("llama.cpp not repacked", off)]


def measure(command: list[str]) -> tuple[str, int]:
  """What the command prints, and the bytes it had resident at its peak (0 if it ended too soon).

  Raises:
    RuntimeError: it failed; the message holds the end of what it said.
  """
  peak = 0
  with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
    child = subprocess.Popen(command, stdout=out, stderr=error)
    while child.poll() is None:
      peak = max(peak, _peak_bytes(child.pid))
      time.sleep(0.02)
    out.seek(0)
    error.seek(0)
    if child.returncode:
      said = error.read()[-2000:]
      raise RuntimeError(f"{' '.join(command)} failed ({child.returncode}): {said}")
    return out.read(), peak


def _peak_bytes(pid: int) -> int:
  """VmHWM, which is the process's own; wait4's ru_maxrss begins with what its parent had."""
  try:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
  except OSError:  # It has just ended.
    return 0
  return max((1024 * int(s.split()[1]) for s in lines if s.startswith("VmHWM:")), default=0)


def rates(side: Side, out: str) -> Iterator[tuple[str, float]]:
  """(test, tokens a second) of each measurement in a side's output."""
  if side.batched and not side.name.startswith("q4jax"):
    for line in out.splitlines():
      if line.startswith("{"):
        record = json.loads(line)
        yield f"tg{record['tg']} x {record['pl']} @ d{record['pp']}", record["speed_tg"]
    return
  for record in json.loads(out):
    name = f"pp{record['n_prompt']}" if record["n_prompt"] else f"tg{record['n_gen']}"
    name += f" x {record['n_parallel']}" if side.batched else ""
    depth = record["n_depth"]
    yield name + (f" @ d{depth}" if depth or side.batched else ""), record["avg_ts"]


def run(config: Config) -> Iterator[list[dict[str, Any]]]:
  """All records after each command: whose, of what, t/s, peak memory, bandwidths around it."""
  buffer = np.ones(config.probe_mib << 20, np.uint8)

  def bandwidth() -> float:
    return max(probe.read_bandwidth(buffer, config.num_threads) for _ in range(3))

  records = []
  for repetition in range(config.reps):
    for side in sides(config):
      before = bandwidth()
      out, peak = measure(side.command)
      around = {"bandwidth_before": before, "bandwidth_after": bandwidth()}
      for test, rate in rates(side, out):
        record = {"repetition": repetition, "side": side.name, "test": test, "tokens_per_s": rate}
        records.append({**record, "batched": side.batched, "peak_rss_bytes": peak, **around})
      print(f"{repetition + 1}/{config.reps} {side.name}", file=sys.stderr, flush=True)
      yield records


def summary(records: list[dict[str, Any]]) -> list[list[str]]:
  """Rows of the table, one for each test and side: medians, and q4jax's ratios to llama.cpp's.

  The default is llama.cpp's first side, the best the one that is best in this test; of memory the
  least that any needs.
  """
  names = list(dict.fromkeys(r["side"] for r in records))
  peers = [name for name in names if not name.startswith("q4jax")]
  rows = [["test", "side", "result", "of default", "of best"]]

  def add(test: str, key: str, batched: bool, unit: float, best_of: Callable, form: str) -> None:
    where = {"test": test} if key == "tokens_per_s" else {}
    values = {n: _median(records, key, side=n, batched=batched, **where) / unit for n in names}
    known = [values[p] for p in peers if values[p] == values[p]]
    best = best_of(known) if known else math.nan
    for name, value in values.items():
      if value == value:
        ratios = [value / (values[peers[0]] or math.nan), value / (best or math.nan)]
        said = [f"{r:.2f}" if r == r else "-" for r in ratios] if name not in peers else ["", ""]
        rows.append([test, name, f"{value:{form}}", *said])

  for test, batched in dict.fromkeys((r["test"], r["batched"]) for r in records):
    add(test, "tokens_per_s", batched, 1, max, ".2f")
  for batched in sorted({r["batched"] for r in records}):
    what = "peak memory, MiB" + (" (batches)" if batched else "")
    add(what, "peak_rss_bytes", batched, 2**20, min, ".0f")
  around = [r[key] for r in records for key in ("bandwidth_before", "bandwidth_after")]
  spread = f"{min(around) / 1e9:.1f} to {max(around) / 1e9:.1f}"
  return [*rows, ["read bandwidth, GB/s", "", spread, "", ""]]


def _median(records: list[dict[str, Any]], key: str, **where: Any) -> float:
  """NaN where there is no such record: a side that cannot be set so."""
  values = [r[key] for r in records if all(r[name] == value for name, value in where.items())]
  return statistics.median(values) if values else math.nan


def main(_: list[str]) -> None:
  config = config_flags.read(Config)
  if not config.model or not config.llama_bench:
    raise app.UsageError("--model and --llama_bench are needed.")
  records: list[dict[str, Any]] = []
  try:
    for records in run(config):  # Saved as they come: a run of hours may be cut short.
      if config.out:
        save(config.out, config, records)
  except KeyboardInterrupt:
    print("interrupted; the table so far:", file=sys.stderr)
  if records:
    print(markdown(summary(records)))


if __name__ == "__main__":
  config_flags.define(Config)
  app.run(main)
