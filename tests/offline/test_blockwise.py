"""GPTQ and AWQ on a model: what folds must not change, and what the methods must gain."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.compare import Reference
from q4jax.formats.checkpoint import Tensor, floats
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.memory import MemoryCheckpoint
from q4jax.loading import load_checkpoint
from q4jax.offline import blockwise
from q4jax.offline.layerwise import LayerRunner
from q4jax.offline.quantize import quantize_model
from q4jax.offline.scheme import Scheme
from q4jax.offline.sequences import sequences
from q4jax.quant.grid import Grid, GroupArray

ROOT = Path(__file__).parents[2]
TINY = ROOT / "experiments" / "tiny" / "tiny.f16.gguf"
CALIBRATION = (ROOT / "q4jax" / "data" / "calibration.txt").read_text()
HELD_OUT = (ROOT / "q4jax" / "data" / "held_out.txt").read_text()


@pytest.fixture(scope="module")
def source():
  with GGUFCheckpoint.open(TINY) as opened:
    yield opened


@pytest.fixture(scope="module")
def tokens(source: GGUFCheckpoint) -> np.ndarray:
  return sequences(source, CALIBRATION, 256, 8, seed=0)


@pytest.fixture(scope="module")
def reference(source: GGUFCheckpoint) -> Reference:
  return Reference(load_checkpoint(source), HELD_OUT, 256, 8)


def kl(source: GGUFCheckpoint, reference: Reference, method: str, tokens=None) -> float:
  memory = MemoryCheckpoint(source.config, source.metadata)
  scheme = Scheme(grid=Grid(3, 64, "minimum"), method=method, head="keep")
  quantize_model(source, lambda _: memory, scheme, tokens=tokens)
  return reference.compare(load_checkpoint(memory)).kl


def test_text_helps(source: GGUFCheckpoint, tokens: np.ndarray, reference: Reference) -> None:
  rounded = kl(source, reference, "rtn")
  assert kl(source, reference, "mse") < rounded
  assert kl(source, reference, "awq", tokens) < 0.9 * rounded
  assert kl(source, reference, "gptq", tokens) < 0.5 * rounded


def test_what_awq_folds_is_undone(source: GGUFCheckpoint, tokens: np.ndarray) -> None:
  """With grids as fine as there are, the block computes what it did: scales cancel."""
  runner = LayerRunner(source, tokens[:2, :64])
  weights = runner.read_block()
  new = blockwise.awq(runner, weights, Grid(8, 16, "minimum", "float32"))
  assert set(new) == set(weights)
  assert not np.array_equal(new["ffn_norm.weight"], weights["ffn_norm.weight"])
  as_floats = {
    n: jnp.asarray(v.dequantize() if isinstance(v, GroupArray) else v) for n, v in new.items()
  }
  before, hidden = [], runner.hidden.copy()
  runner.advance(weights)
  before.append(runner.hidden.copy())
  runner.hidden[:], runner.index = hidden, 0
  runner.advance(as_floats)
  change = np.linalg.norm(runner.hidden - before[0]) / np.linalg.norm(before[0] - hidden)
  assert change < 0.01


def test_each_block_sees_what_the_quantised_ones_before_it_make(
  source: GGUFCheckpoint, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
  seen = []

  def method(runner, weights, grid):
    seen.append(runner.hidden.copy())
    return {name: np.zeros_like(w) if w.ndim == 1 else quantised(w) for name, w in weights.items()}

  def quantised(w):
    from q4jax.quant.rtn import quantize_rtn

    return quantize_rtn(np.zeros(w.shape, np.float32), Grid(4, 32))

  monkeypatch.setattr(blockwise, "BLOCK_METHODS", {"gptq": method})
  monkeypatch.setattr("q4jax.offline.quantize.BLOCK_METHODS", {"gptq": method})
  memory = MemoryCheckpoint(source.config, source.metadata)
  quantize_model(
    source, lambda _: memory, Scheme(grid=Grid(4, 32), method="gptq"), tokens=tokens[:1]
  )
  assert len(seen) == source.config.num_layers
  assert all((hidden == seen[0]).all() for hidden in seen)  # Blocks of zeros add nothing.
  assert not floats(memory, "blk.1.attn_q.weight").any()
  assert isinstance(memory.tensors["blk.1.attn_q.weight"], Tensor)
