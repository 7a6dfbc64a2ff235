"""Models quantised into memory: every tensor is what its method makes of it alone."""

from pathlib import Path

import numpy as np
import pytest

from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import Tensor, floats
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.memory import MemoryCheckpoint
from q4jax.loading import load_checkpoint
from q4jax.offline.quantize import quantize_model, targets
from q4jax.offline.scheme import Scheme
from q4jax.quant import kquants
from q4jax.quant.grid import Grid, fake_quant
from q4jax.quant.rtn import fit

ROOT = Path(__file__).parents[2]
TINY = ROOT / "experiments" / "tiny" / "tiny.f16.gguf"
PACKAGED = ROOT / "q4jax" / "data" / "tiny.Q4_K_M.gguf"


@pytest.fixture(scope="module")
def source():
  with GGUFCheckpoint.open(TINY) as opened:
    yield opened


def quantised(source: GGUFCheckpoint, scheme: Scheme, **options) -> MemoryCheckpoint:
  memory = MemoryCheckpoint(source.config, source.metadata)
  planned: list[Tensor] = []

  def open_sink(tensors: list[Tensor]) -> MemoryCheckpoint:
    planned.extend(tensors)
    return memory

  quantize_model(source, open_sink, scheme, **options)
  assert {t.name: t for t in planned} == dict(memory.tensors)
  assert set(memory.tensors) == set(source.tensors)
  return memory


def test_rtn_is_rounding_bit_for_bit(source: GGUFCheckpoint) -> None:
  grid = Grid(4, 64, "minimum")
  made = quantised(source, Scheme(grid=grid, head="keep"))
  for name, tensor in source.tensors.items():
    w = floats(source, name)
    if len(tensor.shape) == 1 or not name.startswith("blk."):
      want = w
    else:
      want = fake_quant(w, grid, fit(w, grid))
      assert made.tensors[name].format == "q4a64_f16"
    np.testing.assert_array_equal(floats(made, name), want, err_msg=name)


def test_a_mix_is_the_packaged_model(source: GGUFCheckpoint) -> None:
  made = quantised(source, Scheme(mix="q4_k_m"))
  with GGUFCheckpoint.open(PACKAGED) as packaged:
    for name, tensor in packaged.tensors.items():
      assert made.tensors[name] == tensor
      np.testing.assert_array_equal(made.rows(name), packaged.rows(name), err_msg=name)


def test_importance_reaches_its_matrix(source: GGUFCheckpoint) -> None:
  config, rng = source.config, np.random.default_rng(0)
  widths = {"attn_q": 256, "attn_output": 256, "ffn_gate": 256, "ffn_down": config.d_ffn}
  importance = {
    f"blk.{i}.{name}": rng.uniform(0.1, 9, width).astype(np.float32)
    for i in range(config.num_layers)
    for name, width in widths.items()
  }
  made = quantised(source, Scheme(mix="q4_k_m"), importance=importance)
  for name, shared in (("attn_v", "attn_q"), ("ffn_up", "ffn_gate"), ("ffn_down", "ffn_down")):
    tensor = made.tensors[f"blk.1.{name}.weight"]
    w = floats(source, tensor.name)
    want = kquants.quantize(w, tensor.format, importance[f"blk.1.{shared}"])
    np.testing.assert_array_equal(made.rows(tensor.name), want)
  with pytest.raises(ConfigError, match=r"says nothing of the input of 'blk\.0\.attn_"):
    quantised(source, Scheme(mix="q4_k_m"), importance={"blk.9.attn_q": np.ones(256, np.float32)})


@pytest.mark.parametrize("head", ["same", "q8_0", "q6_k"])
@pytest.mark.parametrize("grid", [Grid(4, 32, "signed"), Grid(5, 32, "absmax"), Grid(8, 64)])
def test_models_run(source: GGUFCheckpoint, grid: Grid, head: str) -> None:
  model = load_checkpoint(quantised(source, Scheme(grid=grid, head=head)))
  ids = np.arange(5, 37)
  want = load_checkpoint(source).logits(ids)
  got = model.logits(ids)
  cosine = (got * want).sum() / np.sqrt((got**2).sum() * (want**2).sum())
  assert cosine > 0.97


def test_what_cannot_be_is_refused(source: GGUFCheckpoint, tmp_path: Path) -> None:
  with pytest.raises(ConfigError, match="does not divide"):
    targets(source, Scheme(grid=Grid(4, 96)))
  with pytest.raises(ConfigError, match="no block format that a model runs"):
    targets(source, Scheme(grid=Grid(8, 16)))
  with GGUFCheckpoint.open(PACKAGED) as packaged:
    with pytest.raises(ConfigError, match="already: rounding it again"):
      targets(packaged, Scheme(mix="q4_0"))
    assert targets(packaged, Scheme(mix="q4_0"), again=True)
  with pytest.raises(ConfigError, match="does not look at text"):
    quantised(source, Scheme(mix="q4_0"), tokens=np.ones((1, 8), np.int32))
  with pytest.raises(ConfigError, match="needs text"):
    quantised(source, Scheme(grid=Grid(), method="gptq"))
  for bad in ({"mix": "int9"}, {"grid": Grid(), "method": "best"}, {"grid": Grid(), "head": "x"}):
    with pytest.raises(ConfigError, match="choose"):
      Scheme(**bad)
  with pytest.raises(ConfigError, match="a mix or a grid"):
    Scheme()
  with pytest.raises(ConfigError, match="a search of its own"):
    Scheme(mix="q4_0", method="mse")
