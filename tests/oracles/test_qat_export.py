"""What QAT exports, llama.cpp runs, and computes from it what we do."""

from pathlib import Path

import numpy as np
import pytest

import q4jax
from q4jax.formats.open import open_checkpoint, open_sink
from q4jax.qat import export
from q4jax.qat.data import Windows
from q4jax.qat.run import learn
from q4jax.qat.trainer import TrainConfig
from q4jax.qat.variants import Recipe
from q4jax.quant.grid import Grid

pytestmark = pytest.mark.oracle
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
  "grid", [Grid(4, 128, "absmax"), Grid(3, 128, "minimum"), Grid(2, 128, "minimum")]
)
def test_llama_cpp_runs_an_export(grid: Grid, tmp_path: Path) -> None:
  pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: `make oracles`")
  from oracles.llama_cpp_peer import LlamaCpp

  path = tmp_path / "student.gguf"
  with open_checkpoint(ROOT / "experiments" / "tiny" / "tiny.f16.gguf") as source:
    text = (ROOT / "q4jax" / "data" / "calibration.txt").read_text()
    ids = q4jax.load("tiny").tokenizer.encode(text[:20_000])
    windows = Windows(np.array(ids[1:], np.int32), np.array(ids[:1], np.int32), 64, 4, 0)
    student = learn(source, Recipe("lsq", grid, "mse"), TrainConfig(4), windows, windows[0])
    export.write(student, source, lambda t: open_sink(path, source.config, source.metadata, t))
  # Exact products here, activations rounded to int8 there.
  model = q4jax.load(path, implementation="cpu_exact")
  tokens = np.array(model.tokenizer.encode(text[20_000:20_600])[:128], np.int32)
  mine, theirs = (
    x - np.log(np.exp(x).sum(-1, keepdims=True))
    for x in (np.asarray(model.logits(tokens))[0], LlamaCpp(path, 256).logits(tokens))
  )
  kl = (np.exp(theirs) * (theirs - mine)).sum(-1).mean()
  assert 0 <= kl < 1e-3
  assert (theirs.argmax(-1) == mine.argmax(-1)).mean() > 0.96
