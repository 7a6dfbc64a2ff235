"""The table of weight errors: its rows against the formula, its sentence, and a run with a plot."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import app

from experiments import quant_error
from experiments.quant_error import Config, claim, matrices, run
from q4jax.errors import ConfigError

SMALL = Config(bits=(4, 8), groups=("32", "channel", "tensor"), rules=("absmax",), rows=16)


@pytest.fixture(scope="module")
def records():
  return run(SMALL)


def test_rows_are_the_formula(records):
  [row] = [r for r in records if (r["method"], r["bits"], r["group"]) == ("rtn", 4, "channel")]
  errors = []
  for w in matrices(SMALL).values():
    w = w.astype(np.float64)
    scale = (np.abs(w).max(axis=1, keepdims=True) / 7).astype(np.float16).astype(np.float64)
    y = np.rint(w / scale).clip(-8, 7) * scale
    errors.append(np.abs(w - y).mean() / np.abs(w).mean())
  np.testing.assert_allclose(row["relative"], np.mean(errors), rtol=1e-5)
  np.testing.assert_allclose(np.mean(row["layers"]), row["relative"], rtol=1e-6)
  assert 4 < row["bpw"] < 4.1


def test_search_is_at_most_rounding_and_bits_pay(records):
  by = {(r["method"], r["bits"], r["group"]): r for r in records}
  for (method, bits, group), r in by.items():
    if method == "search":
      assert r["snr_db"] >= by["rtn", bits, group]["snr_db"] - 1e-6
  assert by["rtn", 4, "32"]["relative"] > 10 * by["rtn", 8, "32"]["relative"]
  assert by["q4_k", 4, "256"]["bpw"] == 4.5


def test_the_sentence_has_the_measured_figures(records):
  by = {r["group"]: r["relative"] for r in records if (r["method"], r["bits"]) == ("rtn", 4)}
  figures = " / ".join(f"{100 * by[g]:.2f}" for g in ("tensor", "channel", "32"))
  assert f"INT4 {figures} % (claimed 5.8 %)" in claim(records)
  assert claim([r for r in records if r["bits"] == 4]) == ""


def test_the_command_writes_json_a_table_and_a_plot(tmp_path, monkeypatch, capsys):
  pytest.importorskip("matplotlib")
  config = Config(
    methods=("rtn", "search", "hqq"), bits=(4,), groups=("128",), rules=("minimum",), rows=8,
    kquants=("q4_k",), out=str(tmp_path / "e.json"),
  )  # fmt: skip
  monkeypatch.setattr(quant_error.config_flags, "read", lambda _: config)
  quant_error.main([])
  whole = json.loads(Path(config.out).read_text())
  assert [r["method"] for r in whole["records"]] == ["rtn", "search", "hqq", "q4_k"]
  assert whole["config"]["rows"] == 8 and whole["jax"]
  assert (tmp_path / "e.md").read_text() == capsys.readouterr().out.rstrip("\n") + "\n"
  assert (tmp_path / "e.png").stat().st_size > 10_000


def test_wrong_arguments_are_named(monkeypatch):
  with pytest.raises(ConfigError, match="awq is none of rtn"):
    run(Config(methods=("awq",)))
  packaged = Path(sys.modules["q4jax"].__file__).parent / "data" / "tiny.Q4_K_M.gguf"
  with pytest.raises(ConfigError, match="errors are measured from floats"):
    run(Config(model=str(packaged)))
  monkeypatch.setattr(quant_error.config_flags, "read", lambda _: Config(model="no.gguf"))
  with pytest.raises(app.UsageError, match="no.gguf"):
    quant_error.main([])
