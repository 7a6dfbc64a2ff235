"""The drift experiment, small: drift hurts, injection heals, nothing compiles again."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import drift_injection
from experiments.drift_injection import Config, warmth_at

SMALL = Config(tokens=32, sequences=2, calibration_sequences=2, end=16.0, every=2)


def test_drift_hurts_and_injection_heals(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  pytest.importorskip("matplotlib")
  config = Config(**{**vars(SMALL), "out": str(tmp_path / "d.json")})
  monkeypatch.setattr(drift_injection.config_flags, "read", lambda _: config)
  drift_injection.main([])
  whole = json.loads(Path(config.out).read_text())
  assert whole["config"]["end"] == 16 and whole["jax"]
  rows = {r["row"]: r for r in whole["records"]}
  assert list(rows) == list(drift_injection.ROWS)
  assert rows["drift"]["kl"]["before"] == rows["steady"]["kl"]["before"]
  assert rows["drift"]["kl"]["grown"] > 5 * rows["steady"]["kl"]["grown"]
  for row in ("known", "observed"):
    assert rows[row]["kl"]["grown"] < rows["drift"]["kl"]["grown"] / 5
  assert rows["known"]["same"] >= rows["drift"]["same"]
  assert [r["compiled_again"] for r in rows.values()] == [0, 0, 0, 0]
  assert (tmp_path / "d.md").read_text() == capsys.readouterr().out.rstrip("\n") + "\n"
  assert (tmp_path / "d.png").stat().st_size > 10_000


def test_warming_up() -> None:
  assert [warmth_at(t, 8) for t in range(8)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
  assert np.all(np.diff([warmth_at(t, 100) for t in range(100)]) >= 0)
