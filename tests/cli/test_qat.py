"""`q4jax qat`: a model comes out that is what was trained, and mistakes are told by name."""

import json
from pathlib import Path
from typing import Any

import pytest

import q4jax
from q4jax.cli.main import main
from q4jax.qat.data import Windows

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "experiments" / "tiny" / "tiny.f16.gguf")
TEXT = str(ROOT / "q4jax" / "data" / "calibration.txt")
HELD_OUT = str(ROOT / "q4jax" / "data" / "held_out.txt")


def test_trains_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  out = tmp_path / "out.gguf"
  short = ["--steps=4", "--ctx=32", "--batch=4", "--chunks=1", "--json"]
  options = ["--bits=3", "--rule=minimum", f"--text={TEXT}", f"--held_out={HELD_OUT}", *short]
  assert main(["qat", TINY, str(out), *options]) == 0
  told = json.loads(capsys.readouterr().out)
  assert told["bits_per_weight"] == 3.25
  assert told["after"]["kl"] < told["before"]["kl"]
  assert told["recovered_kl"] == pytest.approx(1 - told["after"]["kl"] / told["before"]["kl"])
  assert q4jax.load(out).logits([1, 2]).shape == (1, 2, 4096)


@pytest.mark.parametrize(
  ("options", "code", "message"),
  [
    ([], 2, "give --text"),
    (["--text=a", "--resume"], 2, "--resume goes on from --folder"),
    ([f"--text={TEXT}", "--qat=lsq_zero"], 1, "lsq_zero learns minimums"),
    ([f"--text={TEXT}", "--group_size=96"], 1, "group_size=96 does not divide"),
  ],
)
def test_mistakes(
  tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
  assert main(["qat", TINY, str(tmp_path / "out.gguf"), *options]) == code
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("kept", "message"),
  [
    (["--folder={}/run", "--save_every=2"], "--resume goes on from step 2"),
    (["--folder={}/run"], "stopped before the first checkpoint; they are saved every 100 steps"),
    ([], "nothing is kept without --folder"),
  ],
)
def test_ctrl_c_says_how_to_go_on(
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
  monkeypatch: pytest.MonkeyPatch,
  kept: list[str],
  message: str,
) -> None:
  window = Windows.__getitem__

  def stopped_at_the_third(windows: Windows, step: int) -> Any:
    if step == 2:
      raise KeyboardInterrupt
    return window(windows, step)

  monkeypatch.setattr(Windows, "__getitem__", stopped_at_the_third)
  options = ["--steps=3", "--ctx=8", "--batch=1", f"--text={TEXT}", "--init=rtn"]
  out = tmp_path / "out.gguf"
  assert main(["qat", TINY, str(out), *options, *(k.format(tmp_path) for k in kept)]) == 130
  assert message in capsys.readouterr().err
  assert not out.exists()
