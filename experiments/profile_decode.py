r"""Where a decoded token's time goes: inside the compiled program, and outside it.

  python -m experiments.profile_decode --model=tiny
  python -m experiments.profile_decode --model=1b-q4km.gguf --tokens=64 --runs=5 --out=profile.json

Runs the engine's own streaming loop, greedy, with two clocks added to its decode program: one
before the first operation that needs the last token, one after the next token is there. Needs the
native library, so a CPU. Seconds for `tiny`, a minute for a model of 1B weights.

  inside   from the first clock to the second: what any engine would have to wait for
  outside  from a step's second clock to the next step's first: what Python, the dispatch and the
           runtime add. The next step is dispatched while the last one runs, so most of it overlaps
  dispatch what the call of the program costs the Python thread, in processor time
  python   all that this thread does for a token: dispatch, reading, text, streaming. It overlaps
           with the program, but may take a core from its threads
"""

import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from absl import app

import q4jax
from experiments import config_flags
from experiments.config_flags import option
from experiments.provenance import provenance
from q4jax.engine.engine import Engine
from q4jax.engine.programs import Output, Programs, State, decode
from q4jax.engine.sampling import SamplingArrays
from q4jax.model.llama import Llama
from q4jax.model.model import Model
from q4jax_kernels import probe


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run."""

  model: str = option("tiny", "A GGUF file, or an alias that q4jax.load knows.")
  tokens: int = option(64, "Tokens that a run decodes, at least 4.")
  runs: int = option(5, "Counted runs; one before them warms up.")
  batch: int = option(1, "Sequences decoded together.")
  out: str = option("", "File to write the record to, as JSON.")


class StampedPrograms:
  """The model's programs, their decode telling when it began and ended."""

  def __init__(self, model: Model) -> None:
    self.stamps: list[tuple[jax.Array, jax.Array]] = []
    self.dispatch_s: list[float] = []
    self._decode = model.jit(_stamped_decode, donate_argnums=1)
    self.programs = dataclasses.replace(Programs.of(model, logprobs=False), decode=self._call)

  def _call(self, *arguments: Any) -> tuple[State, Output]:
    begin = time.thread_time()
    state, output, *stamps = self._decode(*arguments)
    self.dispatch_s.append(time.thread_time() - begin)
    self.stamps.append((stamps[0], stamps[1]))
    return state, output


def _stamped_decode(
  module: Llama, state: State, params: SamplingArrays, stop_ids: jax.Array
) -> tuple[State, Output, jax.Array, jax.Array]:
  token, began = probe.clock(state.token)
  state = dataclasses.replace(state, token=token)
  state, output = decode(module, state, params, stop_ids, logprobs=False)
  token, ended = probe.clock(output.token)
  return state, Output(token), began, ended


def run(config: Config) -> dict[str, Any]:
  """One record: milliseconds a step, the median over steps of each run and then over runs."""
  model = q4jax.load(config.model)
  engine = Engine(model)
  programs = StampedPrograms(model)
  with mock.patch.object(Programs, "of", lambda *_, **__: programs.programs):
    runs = [_profile(engine, programs, config) for _ in range(config.runs + 1)][1:]
  record: dict[str, Any] = {
    **provenance(),
    **dataclasses.asdict(config),
    "arrays": len(model.leaves),
  }
  for key in runs[0]:
    values = [values[key] for values in runs]
    record[key] = round(statistics.median(values), 4)
    record[f"{key}_range"] = [round(min(values), 4), round(max(values), 4)]
  return record


def _profile(engine: Engine, programs: StampedPrograms, config: Config) -> dict[str, float]:
  programs.stamps.clear()
  programs.dispatch_s.clear()
  bos = engine.model.tokenizer.bos_id or 0
  # A token more than is counted: the first comes from the prefill.
  prompts = [[bos, 5 + i] for i in range(config.batch)]
  stream = engine.stream(prompts, max_tokens=config.tokens + 1, temperature=0)
  next(stream)
  begin = time.thread_time()
  for _ in stream:
    pass
  python_s = time.thread_time() - begin
  times = [(probe.nanoseconds(a), probe.nanoseconds(b)) for a, b in programs.stamps]
  steps = len(times)
  if steps < 4:
    raise ValueError(f"the model stopped after {steps} steps; too few to say anything.")
  gaps = [after[0] - before[1] for before, after in itertools.pairwise(times)]
  return {
    "inside_ms": statistics.median(b - a for a, b in times) / 1e6,
    "outside_ms": statistics.median(gaps) / 1e6,
    "dispatch_ms": statistics.median(programs.dispatch_s) * 1e3,
    "python_ms": python_s / steps * 1e3,
  }


def main(_: list[str]) -> None:
  config = config_flags.read(Config)
  record = run(config)
  print(f"{config.model}: {record['arrays']} weight arrays, {record['device']}")
  for key in ("inside_ms", "outside_ms", "dispatch_ms", "python_ms"):
    low, high = record[f"{key}_range"]
    print(f"  {key:12} {record[key]:8.3f}   ({low:.3f} to {high:.3f} in {config.runs} runs)")
  if config.out:
    Path(config.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
  config_flags.define(Config)
  app.run(main)
