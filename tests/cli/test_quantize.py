"""calibrate, quantize, verify and diff as a user runs them, one after the other, on `tiny`."""

import json
from pathlib import Path

import numpy as np
import pytest

from q4jax.formats.checkpoint import floats
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.quant import kquants

from .conftest import ROOT, Run

SOURCE = ROOT / "experiments" / "tiny" / "tiny.f16.gguf"
TEXT = ROOT / "q4jax" / "data" / "calibration.txt"


@pytest.fixture(scope="module")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
  path = tmp_path_factory.mktemp("text") / "text"
  path.write_text(TEXT.read_text()[:40_000])
  return path


def test_from_calibration_to_a_model_that_is_better_for_it(
  q4jax: Run, tmp_path: Path, short_text: Path
) -> None:
  small = (f"--text={short_text}", "--ctx=64", "--sequences=8")
  result = q4jax("calibrate", SOURCE, tmp_path / "cal", *small, "--weight_bits=4", "--json")
  row = json.loads(result.out)
  assert result.code == 0 and (row["sequences"], row["ctx"]) == (8, 64)
  assert row["records"] == 4 * (7 + 7 + 2) + 1
  assert q4jax("verify", tmp_path / "cal").code == 0
  errors = {}
  for name, flags in (("plain", ()), ("guided", (f"--calibration={tmp_path}/cal",))):
    out = tmp_path / f"{name}.gguf"
    result = q4jax("quantize", SOURCE, out, "--type=q4_k_m", *flags, "--json")
    row = json.loads(result.out)
    assert result.code == 0 and row["bits_per_weight"] == pytest.approx(5.256, abs=0.01)
    assert q4jax("verify", out).code == 0
    scored = ("diff", SOURCE, out, f"--text={short_text}", "--ctx=64", "--chunks=20", "--json")
    errors[name] = json.loads(q4jax(*scored).out)
  assert errors["guided"]["comparison"]["kl"] < errors["plain"]["comparison"]["kl"]
  assert errors["guided"]["mean_relative_l2"] > errors["plain"]["mean_relative_l2"]
  assert len(errors["plain"]["tensors"]) == 29
  with (
    GGUFCheckpoint.open(tmp_path / "plain.gguf") as made,
    GGUFCheckpoint.open(SOURCE) as f16,
  ):
    assert made.metadata["general.file_type"] == 15
    want = kquants.quantize(floats(f16, "blk.2.attn_k.weight"), "q4_k")
    np.testing.assert_array_equal(made.rows("blk.2.attn_k.weight"), want)


@pytest.mark.parametrize(
  "flags",
  [
    ("--type=int4", "--group_size=64", "--method=mse", "--nosymmetric"),
    ("--type=int8", "--head=keep"),
    ("--type=int4", "--method=gptq", "--ctx=64", "--sequences=4"),
  ],
)
def test_integers_into_qbin(
  q4jax: Run, tmp_path: Path, short_text: Path, flags: tuple[str, ...]
) -> None:
  text = (f"--text={short_text}",) if "--method=gptq" in flags else ()
  out = tmp_path / "out.qbin"
  assert q4jax("quantize", SOURCE, out, *flags, *text).code == 0
  result = q4jax("generate", out, "--prompt=The function", "--max_tokens=4", "--temperature=0")
  assert result.code == 0 and result.out.strip()
  listed = q4jax("diff", SOURCE, out, f"--plot={tmp_path}/plot.png")
  assert listed.code == 0 and "29 matrices, mean relative error" in listed.out
  assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
  ("flags", "code", "said"),
  [
    (("--type=int9",), 2, "int2 to int8"),
    (("--type=q4_k_m", "--group_size=32"), 2, "is for --type=int2"),
    (("--type=q9",), 1, "no type 'q9'"),
    (("--type=int4", "--group_size=0"), 2, "expected a number"),
    (("--type=int4", "--group_size=96"), 1, "does not divide"),
    (("--type=int4", "--method=gptq"), 1, "give --text=FILE"),
    (("--type=q4_0", f"--text={TEXT}"), 1, "leave --text out"),
    (("--type=q4_0", "--calibration=/nowhere"), 1, "/nowhere"),
    (("--type=q4_0", "--rotate_seed=1"), 2, "give that too"),
    (("--type=q4_0", "--rotate", "--calibration=x"), 2, "q4jax convert --rotate, calibrate that"),
    (("--typo=q4_0",), 2, "Did you mean --type"),
  ],
)
def test_errors(q4jax: Run, tmp_path: Path, flags: tuple[str, ...], code: int, said: str) -> None:
  result = q4jax("quantize", SOURCE, tmp_path / "out.gguf", *flags)
  assert result.code == code and said in result.err, result.err
  assert not list(tmp_path.iterdir())


def test_rotated(q4jax: Run, tmp_path: Path, short_text: Path) -> None:
  rotated, out = tmp_path / "rotated.gguf", tmp_path / "out.qbin"
  assert q4jax("convert", SOURCE, rotated, "--rotate", "--rotate_seed=2").code == 0
  for flags in (("--type=q4_k_m",), ("--type=int4", "--method=hqq", "--nosymmetric")):
    flags = (*flags, "--rotate", "--rotate_seed=2", "--force")
    assert q4jax("quantize", SOURCE, out, *flags).code == 0
    scored = (f"--text={short_text}", "--ctx=64", "--chunks=8", "--json")
    row = json.loads(q4jax("diff", rotated, out, *scored).out)
    # Of another rotation the relative error would be about 1.4.
    assert row["mean_relative_l2"] < 0.12 and row["comparison"]["kl"] < 0.1


def test_what_exists_stays(q4jax: Run, tmp_path: Path) -> None:
  out = tmp_path / "out.gguf"
  out.write_text("mine")
  result = q4jax("quantize", SOURCE, out, "--type=q8_0")
  assert result.code == 1 and "--force to replace it" in result.err and out.read_text() == "mine"
  assert q4jax("quantize", SOURCE, out, "--type=q8_0", "--force").code == 0
  result = q4jax("quantize", "tiny", tmp_path / "b.gguf", "--type=q4_0")
  assert result.code == 1 and "rounding it again" in result.err
  assert q4jax("quantize", "tiny", tmp_path / "b.gguf", "--type=q4_0", "--requantize").code == 0
  other = q4jax("diff", SOURCE, ROOT / "experiments" / "retrieval" / "retrieval.f16.gguf")
  assert other.code == 1


def test_calibrate_errors(q4jax: Run, tmp_path: Path, short_text: Path) -> None:
  result = q4jax("calibrate", SOURCE, tmp_path / "cal")
  assert result.code == 2 and "--text" in result.err
  flags = (f"--text={short_text}", "--ctx=4096")
  result = q4jax("calibrate", SOURCE, tmp_path / "cal", *flags)
  assert result.code == 1 and "a context of 2048" in result.err
  (tmp_path / "short").write_text("a b")
  result = q4jax("calibrate", SOURCE, tmp_path / "cal", f"--text={tmp_path}/short")
  assert result.code == 1 and "one sequence needs 511" in result.err
