"""Calibration against numpy on the runner's own flows; interrupted, resumed, read back, misused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from q4jax import records as records_lib
from q4jax.errors import ConfigError, FormatError
from q4jax.formats import imatrix
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.offline import calibrate as calibrate_lib
from q4jax.offline.calibrate import Options, calibrate
from q4jax.offline.calibration import read_importance, read_records, read_sums
from q4jax.offline.layerwise import LayerRunner
from q4jax.quant.convert import from_record
from q4jax.quant.grid import Grid, quantize

ROOT = Path(__file__).parents[2]
TINY = ROOT / "experiments" / "tiny" / "tiny.f16.gguf"


@pytest.fixture(scope="module")
def source():
  with GGUFCheckpoint.open(TINY) as opened:
    yield opened


def tokens(count: int = 3) -> np.ndarray:
  return np.random.default_rng(0).integers(3, 4000, (count, 32), dtype=np.int32)


@pytest.fixture(scope="module")
def folder(source: GGUFCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
  out = tmp_path_factory.mktemp("calibration")
  calibrate(source, tokens(), out, Options(grid=Grid(4, 64, "minimum"), symmetric=False))
  return out


def test_figures_are_numpys(source: GGUFCheckpoint, folder: Path) -> None:
  runner = LayerRunner(source, tokens())
  runner.advance(runner.read_block())
  weights = runner.read_block()
  (flow,) = list(runner.flows(weights))
  x = np.asarray(flow.inputs["ffn_down"], np.float64).reshape(-1, source.config.d_ffn)
  sums = read_sums(folder)["blk.1.ffn_down"]
  np.testing.assert_allclose(sums.square, (x**2).sum(0), rtol=1e-4)
  np.testing.assert_allclose(sums.absolute, np.abs(x).sum(0), rtol=1e-4)
  assert sums.count == 96
  records = {r.key: r for r in read_records(folder)}
  record = records["blk.1.ffn_down.weight", "input"]
  assert record.statistics["max"] == pytest.approx(x.max(), rel=1e-5)
  low, high = min(x.min(), 0), max(x.max(), 0)
  assert record.scale[0] == pytest.approx((high - low) / 255, rel=1e-5)
  assert record.zero_point[0] == np.rint(-low / ((high - low) / 255))
  keys = np.abs(np.asarray(flow.keys)).max(axis=(0, 2))  # [K, H]
  record = records["blk.1", "key"]
  np.testing.assert_allclose(record.scale, keys.max(axis=1) / 127, rtol=1e-5)
  np.testing.assert_allclose(record.statistics["channel_absmax"], keys.reshape(-1), rtol=1e-5)
  w = np.asarray(weights["ffn_up.weight"])
  grid, p = from_record(records["blk.1.ffn_up.weight", "weight"])
  error = np.square(quantize(w, grid, p).dequantize() - w).mean()
  plain = calibrate_lib.FITS["rtn"](w, grid)
  assert error < np.square(quantize(w, grid, plain).dequantize() - w).mean()
  assert len(records) == 4 * (7 + 7 + 2) + 1


def test_importances_of_both_forms_agree(folder: Path) -> None:
  ours = read_importance(folder)
  theirs = read_importance(folder / "imatrix.gguf")
  assert set(theirs) == set(ours) and len(theirs) == 17
  for name, values in theirs.items():
    np.testing.assert_allclose(values, ours[name], rtol=1e-6)
  assert "blk.3.attn_v.weight" in imatrix.read(folder / "imatrix.gguf")


@pytest.mark.parametrize("method", ["average", "percentile", "mse", "kl"])
def test_ranges_lie_within_what_was_seen(
  source: GGUFCheckpoint, folder: Path, tmp_path: Path, method: str
) -> None:
  calibrate(source, tokens(), tmp_path, Options(range=method, percentile=99.0))
  whole = {r.key: r for r in read_records(folder)}
  narrower = 0
  for record in read_records(tmp_path):
    if record.target == "input":
      seen = whole[record.key].statistics
      largest = max(seen["max"], -seen["min"])
      assert 0 < record.scale[0] * 127 <= largest * 1.01
      narrower += record.scale[0] * 127 < 0.99 * largest
  assert narrower > 10


def test_goes_on_where_it_was(
  source: GGUFCheckpoint, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  options = Options(grid=Grid(4, 64, "minimum"), symmetric=False)
  work, done = calibrate_lib._block, []

  def fails_at_two(runner, *args):
    if runner.index == 2 and 2 not in done:
      done.append(runner.index)
      raise KeyboardInterrupt
    done.append(runner.index)
    work(runner, *args)

  monkeypatch.setattr(calibrate_lib, "_block", fails_at_two)
  with pytest.raises(KeyboardInterrupt):
    calibrate(source, tokens(), tmp_path, options)
  calibrate(source, tokens(), tmp_path, options)
  assert done == [0, 1, 2, 2, 3]
  for path in folder.iterdir():
    assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
  assert {p.name for p in tmp_path.iterdir()} == {p.name for p in folder.iterdir()}


def test_another_run_is_refused(source: GGUFCheckpoint, folder: Path) -> None:
  with pytest.raises(ConfigError, match="tokens_sha256 differ"):
    calibrate(source, tokens() + 1, folder, Options(grid=Grid(4, 64, "minimum"), symmetric=False))
  with pytest.raises(ConfigError, match="options differ"):
    calibrate(source, tokens(), folder, Options(bits=4))


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda d: d.update(format="other"), "'q4jax-calibration' was expected"),
    (lambda d: d.update(version=2), "maximum"),
    (lambda d: d["layers"][0].pop("scale"), "'scale' is a required property"),
    (lambda d: d["layers"][0].update(target="bias"), "is not one of"),
    (lambda d: d["layers"][0].update(dtype="int9"), "does not match"),
    (lambda d: d["layers"][0].update(scale=[1.0, 2.0]), "2 values where shape"),
    (lambda d: d["layers"][0].update(scale=[1e39]), "beyond float32"),
    (lambda d: d["layers"][0].update(zero_point=[-3]), "outside uint8's codes"),
    (lambda d: d["layers"][0].update(axis=-1), "group_size 0"),
    (lambda d: d["layers"].append(d["layers"][0]), "second record of the same"),
    (lambda d: d["layers"][0].update(shape=[2**24] * 4), "1 values where shape"),
  ],
)
def test_a_document_that_breaks_the_contract(folder: Path, tmp_path: Path, change, said) -> None:
  document = json.loads((folder / "blk.000.json").read_text())
  assert document["layers"][0]["target"] == "input"
  change(document)
  bad = tmp_path / "bad.json"
  bad.write_text(json.dumps(document))
  with pytest.raises(FormatError, match=said):
    read_records(bad)


@pytest.mark.parametrize("text", ["", "[", "{}", "[1]", '{"layers": NaN}', "[" * 100_000, "\xff"])
def test_what_is_no_document(tmp_path: Path, text: str) -> None:
  (tmp_path / "bad.json").write_bytes(text.encode("latin1"))
  with pytest.raises(FormatError, match="bad.json"):
    read_records(tmp_path)


def test_unknown_keys_are_let_through(folder: Path, tmp_path: Path) -> None:
  document = json.loads((folder / "blk.000.json").read_text())
  document["layers"][0]["note"] = "by hand"
  document["more"] = 1
  records, about = records_lib.loads(json.dumps(document), "x")
  assert about == document["about"] and len(records) == len(document["layers"])


def test_records_survive_json_to_the_bit(folder: Path) -> None:
  records = read_records(folder / "blk.002.json")
  again, _ = records_lib.loads(records_lib.dumps(records, {}), "x")
  for a, b in zip(records, again, strict=True):
    np.testing.assert_array_equal(a.scale, b.scale)
    np.testing.assert_array_equal(a.zero_point, b.zero_point)
    assert (a.minimum is None) == (b.minimum is None)
    if a.minimum is not None and b.minimum is not None:
      np.testing.assert_array_equal(a.minimum, b.minimum)
    assert (a.key, a.dtype, a.axis, a.statistics) == (b.key, b.dtype, b.axis, b.statistics)


def test_killed_at_any_moment_it_resumes(tmp_path: Path, folder: Path) -> None:
  """SIGKILL after longer and longer times, the same command each time, until one ends."""
  script = f"""
import numpy as np
from pathlib import Path
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.offline.calibrate import Options, calibrate
from q4jax.quant.grid import Grid
tokens = np.random.default_rng(0).integers(3, 4000, (3, 32), dtype=np.int32)
print("ready", flush=True)
with GGUFCheckpoint.open({str(TINY)!r}) as source:
  options = Options(grid=Grid(4, 64, "minimum"), symmetric=False)
  calibrate(source, tokens, Path({str(tmp_path)!r}), options)
"""
  delay, kills = 0.3, 0
  while True:
    child = subprocess.Popen(
      [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    try:
      code = child.wait(delay)
      break
    except subprocess.TimeoutExpired:
      os.kill(child.pid, signal.SIGKILL)
      child.wait()
      kills += 1
    for path in tmp_path.glob("*.json"):
      read_records(path)  # What has its name is whole.
    delay *= 2
    time.sleep(0)
  assert code == 0 and kills
  want = {p.name: p.read_bytes() for p in folder.iterdir()}
  assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == set(want)
  assert (tmp_path / "blk.003.json").read_bytes() == want["blk.003.json"]
