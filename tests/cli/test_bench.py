"""`bench`: llama-bench's records, of runs that do what they say."""

import json
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from q4jax.engine import Engine
from q4jax.engine import bench as engine_bench
from q4jax.engine.bench import Test as Spec
from q4jax.engine.programs import State
from q4jax.errors import ConfigError
from q4jax.loading import load

from .conftest import CONTEXT, Run

# What scripts that compare llama-bench's records read (llama.cpp, tools/llama-bench).
KEYS = {
  *("model_filename", "model_type", "model_size", "model_n_params", "n_threads", "n_ubatch"),
  *("type_k", "type_v", "backends", "n_prompt", "n_gen", "n_depth", "test_time"),
  *("avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"),
}


def test_records(q4jax: Run, model_file: Path) -> None:
  flags = ("--pp=16,20", "--tg=4", "--depth=0,32", "--reps=3", "--kv_dtype=bf16", "--json")
  result = q4jax("bench", model_file, *flags)
  records = json.loads(result.out)
  assert result.code == 0 and result.err == ""
  tests = [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in records]
  assert tests == [(p, g, d) for d in (0, 32) for p, g in ((16, 0), (20, 0), (0, 4))]
  for record in records:
    assert set(record) >= KEYS
    rates = [(record["n_prompt"] + record["n_gen"]) * 1e9 / ns for ns in record["samples_ns"]]
    assert len(rates) == 3
    assert record["avg_ts"] == pytest.approx(statistics.fmean(rates), rel=1e-4)
    assert record["stddev_ts"] == pytest.approx(statistics.stdev(rates), rel=1e-3)
    assert record["type_k"] == "bf16" and record["backends"] == "CPU"
    assert 1 << 26 < record["rss_bytes"] <= record["peak_rss_bytes"]


def test_sequences_side_by_side_count_together(q4jax: Run, model_file: Path) -> None:
  flags = ("--pp=16", "--tg=4", "--batch=1,3", "--depth=8", "--reps=1", "--json")
  result = q4jax("bench", model_file, *flags)
  records = json.loads(result.out)
  tests = [(r["n_prompt"], r["n_gen"], r["n_depth"], r["n_parallel"]) for r in records]
  assert tests == [(16, 0, 8, 1), (16, 0, 8, 3), (0, 4, 8, 1), (0, 4, 8, 3)]
  for prompt, generated, _, parallel in tests:
    record = records[tests.index((prompt, generated, 8, parallel))]
    tokens = parallel * (prompt + generated)
    assert record["avg_ts"] == pytest.approx(tokens * 1e9 / record["avg_ns"], rel=1e-4)


def test_table(q4jax: Run, model_file: Path) -> None:
  result = q4jax("bench", model_file, "--pp=16", "--tg=0", "--depth=8", "--reps=1")
  lines = result.out.splitlines()
  assert result.code == 0 and lines[1].startswith("| -") and len({len(s) for s in lines[:3]}) == 1
  assert "| pp16 @ d8 |" in lines[2] and "± 0.00 |" in lines[2]


def test_too_long_for_the_context(q4jax: Run, model_file: Path) -> None:
  result = q4jax("bench", model_file, f"--depth={CONTEXT}", "--tg=1", "--pp=0")
  assert result.code == 1 and result.out == "" and f"context of {CONTEXT}" in result.err
  engine = Engine(load(model_file))
  for spec in (Spec(0, 0), Spec(1, 1), Spec(-1, 2), Spec(4, 0, -1), Spec(4, 0, 0, 0)):
    with pytest.raises(ConfigError):
      engine_bench.bench(engine, [spec])
  with pytest.raises(ConfigError):
    engine_bench.bench(engine, [Spec(1, 0)], repetitions=0)


def test_engines_take_turns(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  engines = [Engine(load(model_file), kv_dtype=name) for name in ("f16", "f32")]
  turns: list[int] = []

  def timed(self: Any, test: Spec, state: State) -> tuple[float, State]:
    turns.append(engines.index(self._engine))
    return float(len(turns)), state

  monkeypatch.setattr(engine_bench._Runner, "generate", timed)
  first, second = engine_bench.compare(engines, Spec(0, 4, 2), repetitions=2)
  assert turns == [0, 1] * 3
  assert (first.seconds, second.seconds) == ((3, 5), (4, 6))
  with pytest.raises(ConfigError, match=f"does not fit the context of {CONTEXT}"):
    engine_bench.compare(engines, Spec(CONTEXT, 0, 1))


def test_nothing_compiles_while_the_clock_runs(
  model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Only the first, uncounted repetition of a test may compile."""
  repetitions: list[list[str]] = []

  def hear(event: str, duration_secs: float, **_: object) -> None:
    if repetitions:
      repetitions[-1].append(event)

  for name in ("prompt", "generate"):
    plain = getattr(engine_bench._Runner, name)

    def spied(self: Any, test: Spec, state: State, plain: Any = plain) -> tuple[float, State]:
      repetitions.append([])
      seconds, state = plain(self, test, state)
      # The test began behind its depth, which the cache holds. (Some tokens have keys of zeros.)
      end = test.n_depth + test.tokens
      assert int(state.length[0]) == end
      used = np.abs(np.asarray(state.cache[0][0, 0], np.float32)).sum(axis=(0, 2)) > 0
      assert used[: test.n_depth].any() == (test.n_depth > 0) and used[test.n_depth : end].any()
      assert not used[end + 16 :].any()
      return seconds, state

    monkeypatch.setattr(engine_bench._Runner, name, spied)
  jax.monitoring.register_event_duration_secs_listener(hear)
  try:
    engine = Engine(load(model_file), prefill_chunk=16)
    tests = [Spec(40, 0), Spec(40, 0, 20), Spec(0, 4, 20)]
    list(engine_bench.bench(engine, tests, repetitions=3))
  finally:
    jax.monitoring.unregister_event_duration_listener(hear)
  assert len(repetitions) == 12
  assert repetitions[0] and repetitions[8]
  for i, events in enumerate(repetitions):
    assert i % 4 == 0 or not [event for event in events if "/compile/" in event]
