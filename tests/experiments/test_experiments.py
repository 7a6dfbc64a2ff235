"""Each experiment on its smallest config: what its records say, and that it draws them."""

import math
import stat
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
  counters,
  end_to_end,
  inputs,
  kv_bottleneck,
  kv_frontier,
  kv_group_size,
  kv_threshold,
  plots,
  sinks,
  stepping,
)  # fmt: skip
from experiments.experiment import text
from q4jax.errors import ConfigError, MissingDependencyError
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy
from q4jax.kv.protect import Protect
from q4jax.kv.select import MedianStd, Quantile, TopK, UnionRank
from q4jax_kernels import ffi
from q4jax_kernels.kv_format import KVFormat

native = pytest.mark.skipif(not ffi.available(), reason="needs the native library")
SMALL: dict[str, Any] = {"ctx": 96, "sequences": 2}


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[KVConfig]:
  """The caches that were stepped through; each seems a little worse than the one before."""
  caches: list[KVConfig] = []

  def measure(model: Any, sequences: np.ndarray, kv: KVConfig, **_: Any) -> dict[str, Any]:
    kv.check(model.config)
    caches.append(kv)
    ratio = 1 + len(caches) / 100
    return {
      "ppl": 20 * ratio, "dense_ppl": 20.0, "ratio": ratio, "ratio_low": ratio - 0.01,
      "ratio_high": ratio + 0.01, "kl": 0.1 * len(caches), "keep_ratio": 0.5, "compression": 2.0,
      "cache_bytes": 500, "float16_bytes": 1000, "tokens": sequences.size // 2,
    }  # fmt: skip

  monkeypatch.setattr(stepping, "measure", measure)
  return caches


def drawn(module: Any, records: list[dict[str, Any]], folder: Path) -> str:
  """The table's text; the plot is a picture in which things differ."""
  pytest.importorskip("matplotlib")
  from matplotlib import image

  path = folder / "plot.png"
  module.plot(records, str(path))
  pixels = image.imread(path)
  assert min(pixels.shape[:2]) > 200 and pixels.std() > 0.03
  written = text(module, records)
  rows = module.table(records)
  assert len({len(row) for row in rows}) == 1 and len(rows) > 1
  return written


def test_groups(tmp_path: Path, stepped: list[KVConfig]) -> None:
  config = kv_group_size.Config(
    stores=("int4", "k8v4"), groups=(8, 128), rotations=("no",), recent=8, **SMALL
  )
  records = kv_group_size.run(config)
  assert [(r["store"], r["group"], r["bits"]) for r in records] == [
    ("int4", 8, 8.0), ("int4", 128, 4.25), ("k8v4", 8, 10.0), ("k8v4", 128, 6.25),
  ]  # fmt: skip
  fine, coarse, mixed, _ = records
  assert 0 < fine["key_l2"] < coarse["key_l2"] < 0.2
  assert mixed["key_l2"] < fine["key_l2"] / 5 and mixed["value_l2"] == fine["value_l2"]
  assert stepped[2] == KVConfig(KVFormat(8, 8), KVFormat(4, 8), protect=Protect(4, 8, 0))
  written = drawn(kv_group_size, records, tmp_path)
  assert "3.9 x" in written and "0.51" in written and "not here" in written


def test_a_real_step(tmp_path: Path) -> None:
  config = kv_group_size.Config(stores=("int8",), groups=(32,), rotations=("yes",), **SMALL)
  (r,) = kv_group_size.run(config)
  assert r["bits"] == 9 and r["rotated"] and r["key_l2"] < 0.01
  assert len(r["by_sequence"]) == 2 and r["ratio_low"] <= r["ratio"] <= r["ratio_high"]
  assert r["ratio"] == pytest.approx(1, abs=0.02) and 0 <= r["kl"] < 0.01


@pytest.mark.parametrize("rotated", [False, True])
def test_the_error_is_that_of_rounding(rotated: bool) -> None:
  x = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
  h = np.array([[1.0]])
  while len(h) < 16:
    h = np.block([[h, h], [h, -h]]) / math.sqrt(2)
  groups = (x @ h if rotated else x).astype(np.float64).reshape(3, 5, 2, 8)
  low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
  step = ((high - low) / 15).astype(np.float16).astype(np.float64)
  low = low.astype(np.float16).astype(np.float64)
  rounded = np.clip(np.round((groups - low) / step), 0, 15) * step + low
  expected = np.linalg.norm(rounded - groups) / np.linalg.norm(groups)
  found = kv_group_size.relative_l2(jnp.asarray(x), KVFormat(4, 8), rotated)
  assert found == pytest.approx(expected, rel=2e-2)


def test_sinks(tmp_path: Path, stepped: list[KVConfig]) -> None:
  records = sinks.run(sinks.Config(sinks=(0, 4), window=32, prompt=64, **SMALL))
  assert [r["sinks"] for r in records] == [0, 4] == [kv.protect.sink for kv in stepped]
  for kv in stepped:
    assert kv.select == TopK(k=32) and kv.policy == get_policy("streaming") and kv.evict_every
  drawn(sinks, records, tmp_path)
  with pytest.raises(ConfigError, match="--window=4 leaves no room beside 4 sinks"):
    sinks.run(sinks.Config(sinks=(0, 4), window=4))


def test_frontier(tmp_path: Path, stepped: list[KVConfig]) -> None:
  config = kv_frontier.Config(budgets=(0.2, 0.4), stores=("f16", "int4r"), **SMALL)
  records = kv_frontier.run(config)
  # 5 bits in 0.4 of 16: more than all tokens.
  assert [r["keep"] for r in records] == [0.2, 0.64, 0.4, 1.0]
  assert [kv.policy is None for kv in stepped] == [False, False, False, True]
  assert stepped[1].select == UnionRank(0.64, by="rank") and stepped[1].key == KVFormat(4, 32)
  drawn(kv_frontier, records, tmp_path)
  with pytest.raises(ConfigError, match="--budgets"):
    kv_frontier.run(kv_frontier.Config(budgets=(0.0,)))


def test_thresholds(tmp_path: Path, stepped: list[KVConfig]) -> None:
  config = kv_threshold.Config(selects=("keep:0.6",), recent=8, **SMALL)
  records = kv_threshold.run(config)
  quality, *speeds = records
  assert quality["kind"] == "quality" and quality["prompt_kept"] == pytest.approx(0.6, abs=0.35)
  assert {r["side"] for r in speeds} == {"dense float16", "int4", "int4, keep 0.6"}
  written = drawn(kv_threshold, records, tmp_path)
  assert "(1b.gguf, 20" in written and "eviction at q = .75: speed at 8192" in written


def test_rates_at_depth() -> None:
  config = kv_threshold.Config(selects=(), speed_model="tiny", depths=(40, 200), reps=2)
  records = kv_threshold.run(config)
  assert [r["depth"] for r in records] == [40] * 3 + [200] * 3
  for r in records:
    assert len(r["rates"]) == 2 and min(r["rates"]) <= r["tokens_per_s"] <= max(r["rates"])
    assert r["from"] == "tiny"


def test_rules_by_name() -> None:
  assert kv_threshold.select("alpha:0.5") == MedianStd(0.5)
  assert kv_threshold.select("quantile:0.75") == Quantile(0.75)
  assert kv_threshold.select("keep:0.6") == UnionRank(0.6, by="rank")
  for wrong in ("keep", "top:3", "keep:x", ""):
    with pytest.raises(ConfigError, match="is no rule"):
      kv_threshold.select(wrong)


def test_lost_mass_is_what_later_tokens_paid() -> None:
  """All that a prompt's middle gets is lost where only its ends stay: by the attention itself."""
  model = inputs.model("tiny")
  tokens = inputs.sequences(model, "held_out", 2, 128)
  kv = KVConfig(
    policy=get_policy("streaming"), select=UnionRank(0.1), protect=Protect(4, 0, 0), block_size=16
  )
  lost = model.jit(kv_threshold._lost, static_argnums=2)
  kept, mass = lost(model.leaves, jnp.asarray(tokens), kv)
  everything = KVConfig(
    policy=get_policy("streaming"), select=UnionRank(1.0), protect=Protect(4, 0, 0), block_size=16
  )
  all_kept, none = lost(model.leaves, jnp.asarray(tokens), everything)
  assert (float(all_kept), float(none)) == (1.0, 0.0)
  assert 0.1 <= float(kept) < 0.5 and 0.05 < float(mass) < 0.9


@native
def test_bottleneck(tmp_path: Path) -> None:
  config = kv_bottleneck.Config(lengths=(16, 32), tokens=5, probe_mib=8)
  records = kv_bottleneck.run(config)
  assert [(r["cache"], r["length"]) for r in records] == [
    (cache, length) for cache in ("float16", "int4") for length in (16, 32)
  ]
  model = inputs.model("tiny")
  # 4 layers, keys and values, one head of 128: 2048 bytes a token in float16, 640 in 5 bits.
  assert [r["bytes"] - model.nbytes for r in records] == [16 * 2048, 32 * 2048, 16 * 640, 32 * 640]
  for r in records:
    assert 0 < r["median_ms"] <= r["p99_ms"]
    assert r["gb_per_s"] == pytest.approx(r["bytes"] / r["median_ms"] / 1e6)
    assert (r["llc_hits"] is None) == bool(r["llc_why_not"])
  drawn(kv_bottleneck, records, tmp_path)


PERF = """#!{python}
import signal, sys, time
out = sys.argv[sys.argv.index("-o") + 1]
def end(*_):
  open(out, "w").write("{text}")
  sys.exit()
signal.signal(signal.SIGINT, end)
open(out + ".ready", "w")
time.sleep(30)
"""


@pytest.mark.parametrize(
  ("counted", "rate", "reason"),
  [
    ("# started\\n\\n200,,LLC-loads,1,100,,\\n50,,LLC-load-misses,1,100,,\\n", 0.75, ""),
    ("<not supported>,,LLC-loads,0,100,,\\n", None, "no LLC-loads here: <not supported>"),
    ("", None, "it wrote nothing"),
  ],
)  # fmt: skip
def test_counting(tmp_path: Path, counted: str, rate: float | None, reason: str) -> None:
  path = tmp_path / "perf"
  path.write_text(PERF.format(python=sys.executable, text=counted))
  path.chmod(path.stat().st_mode | stat.S_IXUSR)
  import time

  with counters.counting(str(path)) as counts:
    time.sleep(0.5)  # until it listens
  assert counts.hit_rate == rate and reason in counts.reason and bool(counts.reason) == bool(reason)


def test_nothing_to_count_with() -> None:
  with counters.counting("nosuchperf") as counts:
    pass
  assert counts == counters.Counts(None, "perf is not installed")


@native
def test_end_to_end(tmp_path: Path, stepped: list[KVConfig]) -> None:
  config = end_to_end.Config(ctx=64, sequences=2, tokens=3, recent=8)
  records = end_to_end.run(config)
  one, int4, both = records
  assert (one["side"], int4["side"], both["side"]) == ("float", "int4", "int4+KV")
  assert int4["weights_bytes"] == both["weights_bytes"] < one["weights_bytes"] / 2
  assert (one["cache_bytes"], int4["cache_bytes"], both["cache_bytes"]) == (1000, 1000, 500)
  # Sides whose cache is dense have the dense cache's perplexity.
  assert (one["ppl"], int4["ppl"], both["ppl"]) == (20, 20, pytest.approx(20 * 1.03))
  assert stepped[0] == stepped[1] == KVConfig() and stepped[2].rotate
  written = drawn(end_to_end, records, tmp_path)
  assert "(1.00)" in written and "perplexity, the same" in written


def test_texts(tmp_path: Path) -> None:
  model = inputs.model("tiny")
  rows = inputs.sequences(model, "held_out", 2, 64)
  assert rows.shape == (2, 64) and rows.dtype == np.int32
  with pytest.raises(ConfigError, match="--text=nosuch is no file"):
    inputs.text("nosuch")
  with pytest.raises(ConfigError, match="expected hf://datasets/org/repo/path"):
    inputs.text("hf://datasets/org")
  short = tmp_path / "short.txt"
  short.write_text("a few words")
  with pytest.raises(ConfigError, match="2 sequences of 64 need 128"):
    inputs.sequences(model, str(short), 2, 64)


def test_a_figure_is_written_only_when_whole(tmp_path: Path) -> None:
  pytest.importorskip("matplotlib")
  path = tmp_path / "p.png"
  with pytest.raises(RuntimeError), plots.figure(str(path)):
    raise RuntimeError
  assert not path.exists()


def test_matplotlib_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with (
    pytest.raises(MissingDependencyError, match=r"pip install 'q4jax\[viz\]'"),
    plots.figure(str(tmp_path / "p.png")),
  ):
    pass
