"""The quality table: what its rows' names mean, and what a run records."""

import dataclasses
import math

import numpy as np
import pytest

import q4jax
from experiments import kv_quality
from experiments.kv_quality import Config, kv_config
from oracles.models import SPECS, write
from q4jax.errors import ConfigError
from q4jax.kv.config import KVConfig
from q4jax.kv.policy import get_policy
from q4jax.kv.protect import Protect
from q4jax.kv.quality import stepped_quality
from q4jax.kv.select import UnionRank
from q4jax.model.model import Model
from q4jax_kernels.kv_format import KVFormat

INT8, INT4, ENDS = KVFormat(8, 32), KVFormat(4, 32), Protect(4, 64, 0)
KEEP = {"policy": get_policy("snapkv"), "select": UnionRank(0.6, by="rank")}
NAMES = {
  "f16": KVConfig(protect=ENDS),
  "f32": KVConfig(KVFormat(32), KVFormat(32), protect=ENDS),
  "int8": KVConfig(INT8, INT8, protect=ENDS),
  "int4r": KVConfig(INT4, INT4, rotate=True, protect=ENDS),
  "k8v4": KVConfig(INT8, INT4, protect=ENDS),
  "k8v4r": KVConfig(INT8, INT4, rotate=True, protect=ENDS),
  "keep60": KVConfig(protect=ENDS, **KEEP),
  "int4r+keep60": KVConfig(INT4, INT4, rotate=True, protect=ENDS, **KEEP),
  "mask+keep60+int8": KVConfig(INT8, INT8, protect=ENDS, mask=True, **KEEP),
  "keep50+knorm": KVConfig(
    policy=get_policy("knorm"), select=UnionRank(0.5, by="rank"), protect=ENDS
  ),
}


@pytest.mark.parametrize("row", NAMES)
def test_names(row: str) -> None:
  assert kv_config(row, Config(), 64) == NAMES[row]


def test_a_group_that_does_not_fit_is_the_head() -> None:
  assert kv_config("int8", Config(), 80).key == KVFormat(8, None)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ("int5", "row 'int5': 'int5' is none of f16, f32, int8, int4, k8v4"),
    ("int4rr", "'int4rr' is none"),
    ("int8+", "'' is none"),
    ("keep", "'keep' is none"),
    ("keep-5", "'keep-5' is none"),
    ("keep6x+int8", "'keep6x' is none"),
    ("int8+nosuch", "'nosuch' is none of.*snapkv"),
    ("keep0", "keep is 0.0; expected above 0"),
    ("keep150", "keep is 1.5"),
    ("knorm", "'knorm' evicts nothing without a share to keep; add keepNN"),
    ("int8+mask", "'mask' evicts nothing"),
  ],
)
def test_names_that_mean_nothing(row: str, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    kv_config(row, Config(), 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
  return q4jax.load(write(SPECS["llama"], tmp_path_factory.mktemp("q") / "model.gguf"))


FLOATS = KVConfig(KVFormat(32), KVFormat(32), protect=Protect(2, 6, 0), block_size=16)


def test_floats_cost_nothing_and_perplexity_is_the_models(model: Model) -> None:
  tokens = np.random.default_rng(0).integers(3, 290, (3, 90)).astype(np.int32)
  quality = stepped_quality(model, tokens, 40, FLOATS)
  assert quality.ratio == pytest.approx(1, abs=1e-3) and quality.ratio_stderr < 1e-3
  assert quality.kl == pytest.approx(0, abs=1e-5) and quality.top1 == 1
  assert quality.tokens == 3 * (90 - 41)
  assert (quality.usage.seen, quality.usage.keep_ratio) == (3 * 89, 1)
  # The model's own logits, in float64 from there on.
  logits = np.asarray(model.logits(tokens), np.float64)[:, 40:89]
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -np.take_along_axis(logp, tokens[:, 41:, None], axis=-1).mean()
  assert quality.dense_ppl == pytest.approx(math.exp(nll), rel=1e-4)


def test_what_is_lost_shows(model: Model) -> None:
  tokens = np.random.default_rng(1).integers(3, 290, (3, 90)).astype(np.int32)
  kv = dataclasses.replace(FLOATS, policy=get_policy("random"), select=UnionRank(0.8))
  quality = stepped_quality(model, tokens, 40, kv)
  assert quality.kl > 1e-4 and 0 <= quality.top1 <= 1 and quality.ratio_stderr > 0
  assert quality.usage.kept == 3 * (32 + 49) and quality.usage.seen == 3 * 89


@pytest.mark.parametrize("prompt", [0, 9, 10])
def test_nothing_to_score(model: Model, prompt: int) -> None:
  tokens = np.full((1, 10), 5, np.int32)
  with pytest.raises(ConfigError, match=f"prompt is {prompt} of 10 tokens; expected 1 to 8"):
    stepped_quality(model, tokens, prompt, KVConfig())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Config:
  text = tmp_path_factory.mktemp("text") / "text.txt"
  text.write_text("Once upon a time there was a small cache that kept what it was told. " * 40)
  rows = ("int4r+keep60+knorm",)
  return Config("tiny", str(text), rows, ctx=120, sequences=4, batch=2, recent=8, sink=2)


def test_a_run(small: Config) -> None:
  records = kv_quality.run(small)
  (r,) = records
  assert r["row"] == "int4r+keep60+knorm" and r["bits"] == 5
  by_sequence = r["by_sequence"]
  assert all(math.isfinite(v) for k, v in r.items() if k not in ("row", "by_sequence"))
  assert len(by_sequence) == 4 and math.log(r["ratio"]) == pytest.approx(np.mean(by_sequence))
  assert r["ratio_low"] < r["ratio"] < r["ratio_high"]
  assert r["ppl"] == pytest.approx(r["dense_ppl"] * r["ratio"])
  assert r["tokens"] == 4 * 59 and 0 < r["top1"] <= 1 and r["kl"] > 0 and r["ratio_stderr"] > 0
  assert r["keep_ratio"] == pytest.approx((36 + 59) / 119) and r["compression"] > 1
  lines = kv_quality.table(records)
  assert len(lines) == 2 and {len(line) for line in lines} == {8} and lines[1][1] == "5.00"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sequences": 3}, "--sequences=3 are no whole number of batches of --batch=2"),
    ({"sequences": 40}, "40 sequences of 120 need 4800"),
  ],
)
def test_refuses(small: Config, changes: dict[str, int], message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    kv_quality.run(dataclasses.replace(small, **changes))
