"""`q4jax export`: reloaded in a fresh process without q4jax, beside the engine; what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

import q4jax as library
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.offline.calibrate import Options, calibrate
from q4jax_kernels import ffi

from .conftest import LETTERS, ROOT, Run

PROMPT = np.random.default_rng(0).choice(LETTERS, 22).tolist()
# Runs FOLDER/run.py with some packages not to be had, and saves what it makes of the prompt.
CHILD = """
import json, sys
from pathlib import Path
folder, out, prompt, blocked = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4:]
for name in blocked:
  sys.modules[name] = None
sys.path.insert(0, folder)
import run, numpy as np
tokens, logits = run.Exported(folder).generate(prompt, 12)
np.savez(out, tokens=tokens, logits=logits)
assert not [m for m in sys.modules for b in blocked if m.startswith(b + ".")]
"""


def child(folder: Path, *blocked: str) -> tuple[list[int], np.ndarray]:
  """Tokens and logits of a fresh process that cannot import the blocked packages."""
  spec = importlib.util.find_spec("flatbuffers")
  assert spec is not None and spec.origin is not None
  path = [str(Path(spec.origin).parents[1])]
  path += [] if "q4jax_kernels" in blocked else [str(ROOT / "kernels")]
  out = folder.parent / "out.npz"
  command = [sys.executable, "-c", CHILD, str(folder), str(out), json.dumps(PROMPT), *blocked]
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
  subprocess.run(command, check=True, cwd=folder.parent, env=env, timeout=120)
  with np.load(out) as found:
    return found["tokens"].tolist(), found["logits"]


def beside(model: library.Model) -> tuple[list[int], np.ndarray]:
  """What the engine writes, and the logits without a cache that lead to it."""
  tokens = library.Engine(model, kv_dtype="f32").generate(PROMPT, max_tokens=12, temperature=0)
  logits = model.logits([*PROMPT, *tokens.tokens])[0]
  return tokens.tokens, np.asarray(logits)[len(PROMPT) - 1 : -1]


def loader(folder: Path) -> ModuleType:
  spec = importlib.util.spec_from_file_location("run_export", folder / "run.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(autouse=True)
def serialises() -> None:
  pytest.importorskip("flatbuffers")


def test_runs_without_q4jax_and_as_the_engine(q4jax: Run, model_file: Path, tmp_path: Path) -> None:
  out = tmp_path / "m.stablehlo"
  result = q4jax("export", model_file, out, "--max_context=64", "--chunk=8", "--json")
  assert result.code == 0, result.err
  said = json.loads(result.out)
  assert said["platforms"] == ["cpu", "cuda", "tpu"] and said["custom_calls"] == []
  assert said["out_bytes"] == sum(path.stat().st_size for path in out.iterdir())
  manifest = json.loads((out / "manifest.json").read_text())
  assert all(w["offset"] % 64 == 0 for w in manifest["weights"])
  tokens, logits = child(out, "q4jax", "q4jax_kernels", "flax")
  model = library.load(model_file, implementation="xla")
  expected, exact = beside(model)
  assert tokens == expected
  np.testing.assert_allclose(logits, exact, rtol=1e-3, atol=1e-4)
  for name in ("prefill", "decode"):
    function = jax.export.deserialize(bytearray((out / f"{name}.stablehlo").read_bytes()))
    assert function.platforms == ("cpu", "cuda", "tpu")
    assert "custom_call" not in function.mlir_module()


def test_the_cpus_kernels_are_called_where_asked(
  q4jax: Run, model_file: Path, tmp_path: Path
) -> None:
  if not ffi.available():
    pytest.skip("the native library is not built")
  out = tmp_path / "m.stablehlo"
  result = q4jax("export", model_file, out, "--native", "--max_context=64", "--chunk=32")
  assert result.code == 0, result.err
  manifest = json.loads((out / "manifest.json").read_text())
  assert manifest["custom_calls"] == ["q4jax_attention", "q4jax_matmul", "q4jax_take_rows"]
  assert f"custom calls: {', '.join(manifest['custom_calls'])}" in result.out
  tokens, logits = child(out, "q4jax", "flax")
  expected, exact = beside(library.load(model_file))
  assert tokens == expected
  # The kernels round activations to int8: a last bit can move a logit by a percent.
  assert np.abs(logits - exact).max() < 0.03 * np.abs(exact).max()


def test_a_calibration_is_a_weight_to_replace(q4jax: Run, model_file: Path, tmp_path: Path) -> None:
  folder, out, plain = tmp_path / "calibration", tmp_path / "a", tmp_path / "b"
  with GGUFCheckpoint.open(model_file) as source:
    calibrate(source, np.array([PROMPT], np.int32), folder, Options(bits=3))
  flags = ("--max_context=64", "--chunk=32", "--platforms=cpu")
  assert q4jax("export", model_file, out, f"--calibration={folder}", *flags).code == 0
  assert q4jax("export", model_file, plain, *flags).code == 0
  exported = loader(out).Exported(out)
  _, rounded = exported.generate(PROMPT, 1)
  _, expected = loader(plain).Exported(plain).generate(PROMPT, 1)
  model = library.with_calibration(library.load(model_file, implementation="xla"), folder)
  np.testing.assert_allclose(rounded[0], model.logits(PROMPT)[0, -1], rtol=1e-2, atol=1e-2)
  assert np.abs(rounded[0] - expected[0]).max() > 0.1
  names = [w["name"] for w in exported.manifest["weights"]]
  assert names[0] == "vectors" and "blocks.0.attn.q" in names
  at = names.index("calibration")
  assert np.asarray(exported.weights[at]).shape == model.calibration.shape
  exported.weights[at] = np.zeros_like(exported.weights[at])
  np.testing.assert_allclose(exported.generate(PROMPT, 1)[1][0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    (["--platforms=cpu,vulkan"], "platforms are cpu, vulkan; choose of cpu, cuda, rocm, tpu"),
    (["--native", "--platforms=cpu,tpu"], "native kernels run on a CPU; platforms are cpu, tpu"),
    (["--max_context=9999"], "max_context is 9999; the model has 8192"),
    (["--calibration=nowhere"], "nowhere cannot be read"),
  ],
)
def test_refused(q4jax: Run, model_file: Path, tmp_path: Path, flags: list[str], says: str) -> None:
  result = q4jax("export", model_file, tmp_path / "m", *flags)
  assert result.code == 1 and says in result.err
  assert not list(tmp_path.iterdir())


def test_what_is_there_stays(q4jax: Run, model_file: Path, tmp_path: Path) -> None:
  (tmp_path / "m").mkdir()
  result = q4jax("export", model_file, tmp_path / "m")
  assert result.code == 1 and "--force to replace" in result.err


def test_a_short_file_and_a_long_prompt_are_named(
  q4jax: Run, model_file: Path, tmp_path: Path
) -> None:
  out, flags = tmp_path / "m", ("--max_context=16", "--platforms=cpu")
  assert q4jax("export", model_file, out, *flags).code == 0
  exported = loader(out).Exported(out)
  with pytest.raises(ValueError, match="10 \\+ 7 tokens; this export has 16 slots"):
    exported.generate([1] * 10, 7)
  os.truncate(out / "weights.bin", 1000)
  with pytest.raises(ValueError, match=r"weights.bin ends within "):
    loader(out).Exported(out)


def test_without_flatbuffers_it_says_so(
  q4jax: Run, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  result = q4jax("export", model_file, tmp_path / "m")
  assert result.code == 1 and "pip install 'q4jax[export]'" in result.err
