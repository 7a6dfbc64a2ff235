"""Rotated models: what they compute in float64, what is in them, and all methods on top of them."""

from pathlib import Path

import numpy as np
import pytest

import gguf_model
from oracles.float64_llama import Float64Llama
from q4jax.errors import ConfigError, FormatError
from q4jax.formats.checkpoint import Tensor, floats
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.memory import MemoryCheckpoint
from q4jax.formats.open import open_checkpoint, open_sink
from q4jax.loading import load_checkpoint
from q4jax.offline.convert import convert
from q4jax.offline.quantize import quantize_model
from q4jax.offline.rotate import RotatedCheckpoint
from q4jax.offline.scheme import NEEDS_TEXT, Scheme
from q4jax.offline.sequences import sequences
from q4jax.quant.grid import Grid, fake_quant
from q4jax.quant.rtn import fit

ROOT = Path(__file__).parents[2]
TINY = ROOT / "experiments" / "tiny" / "tiny.f16.gguf"
PACKAGED = ROOT / "q4jax" / "data" / "tiny.Q4_K_M.gguf"
CALIBRATION = (ROOT / "q4jax" / "data" / "calibration.txt").read_text()

Spec = gguf_model.ModelSpec
# Four query heads on two of keys; a width of 3 * 32 and heads of 3 * 8; heads that are wider than
# the model; all that a Qwen has more.
ODD = Spec(d_model=96, d_ffn=136, head_dim=24, tied=False)
SPECS = {
  "odd": ODD,
  "tied": Spec(rope_factors=tuple(1.0 + i for i in range(8))),
  "wide": Spec(d_model=32, heads=6, kv_heads=3, head_dim=32, type="bf16", tied=False),
  "qwen2": Spec(architecture="qwen2", kv_heads=4, tied=False),
  "qwen3": Spec(architecture="qwen3", type="f16"),
  "q8_0": Spec(type="q8_0"),
}
NORMS = ("attn_norm.weight", "ffn_norm.weight", "output_norm.weight")
TOKENS = np.random.default_rng(0).integers(3, 290, 48)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return gguf_model.write(tmp_path_factory.mktemp("odd") / "in.gguf", ODD)


@pytest.fixture(scope="module")
def tiny():
  with GGUFCheckpoint.open(TINY) as opened:
    yield opened


@pytest.mark.parametrize("name", SPECS)
def test_it_computes_the_same(name: str, tmp_path: Path) -> None:
  before = gguf_model.write(tmp_path / "in.gguf", SPECS[name])
  convert(before, tmp_path / "out.gguf", rotate=3)
  one, other = Float64Llama(before), Float64Llama(tmp_path / "out.gguf")
  want, got = one.logits(TOKENS), other.logits(TOKENS)
  assert np.abs(want).max() > 1
  np.testing.assert_allclose(got, want, atol=2e-5)
  assert other.fields[f"{SPECS[name].architecture}.embedding_length"] == SPECS[name].d_model
  for tensor, w in other.w.items():
    if tensor.endswith(NORMS):
      assert (w == 1).all() and (one.w[tensor] != 1).any(), tensor
    elif "rope_freqs" in tensor or tensor.endswith(("q.bias", "k.bias", "q_norm.weight")):
      np.testing.assert_array_equal(w, one.w[tensor], tensor)
    elif tensor != "output.weight" and "k_norm" not in tensor:
      assert np.abs(w - one.w[tensor]).mean() > 0.3 * np.abs(w).mean(), tensor


@pytest.mark.parametrize("suffix", [".gguf", ".qbin", ".orbax"])
def test_tiny_is_the_same_in_every_format(suffix: str, tmp_path: Path) -> None:
  convert(TINY, tmp_path / f"out{suffix}", rotate=0)
  with open_checkpoint(TINY) as tiny, open_checkpoint(tmp_path / f"out{suffix}") as made:
    assert tiny.config.tied and not made.config.tied
    want, got = (float_model(c).logits(np.arange(5, 69)) for c in (tiny, made))
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.abs(want).max() > 5


def test_q_is_orthogonal_and_of_hadamards_numbers(odd: Path) -> None:
  """Q solved for from the embeddings, and R from v and Q."""
  with GGUFCheckpoint.open(odd) as source, RotatedCheckpoint(source, 5) as rotated:
    q, *_ = np.linalg.lstsq(
      floats(source, "token_embd.weight").astype(np.float64),
      floats(rotated, "token_embd.weight").astype(np.float64),
    )
    gain = floats(source, "blk.1.attn_norm.weight")
    v = (floats(source, "blk.1.attn_v.weight") * gain).reshape(2, 24, 96)
    new = floats(rotated, "blk.1.attn_v.weight").reshape(2, 24, 96) @ q.T
    r = [np.linalg.lstsq(a.T.astype(np.float64), b.T)[0] for a, b in zip(v, new, strict=True)]
    down = floats(rotated, "blk.0.ffn_down.weight")
    np.testing.assert_allclose(down, q.T @ floats(source, "blk.0.ffn_down.weight"), atol=1e-5)
  np.testing.assert_allclose(r[0], r[1], atol=1e-5)
  for matrix, block in ((q, 32), (r[0], 8)):
    n = len(matrix)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-5)
    inside = np.kron(np.eye(n // block), np.ones((block, block)))
    np.testing.assert_allclose(np.abs(matrix), inside / np.sqrt(block), atol=1e-5)
    assert (matrix[:, 0] < 0).any()  # Plain H has none there.


def test_a_seed_is_a_model(odd: Path) -> None:
  with GGUFCheckpoint.open(odd) as source:
    a, b, c = (RotatedCheckpoint(source, seed) for seed in (1, 1, 2))
    for name in a.tensors:
      np.testing.assert_array_equal(a.rows(name), b.rows(name), name)
      if not name.endswith(NORMS):
        assert (a.rows(name) != c.rows(name)).any(), name


def test_rows_are_the_whole_ones_and_only_what_is_needed_is_read(
  odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  with GGUFCheckpoint.open(odd) as source, GGUFCheckpoint.open(TINY) as tied:
    for model in (source, tied):
      rotated = RotatedCheckpoint(model)
      for name, tensor in rotated.tensors.items():
        whole = rotated.rows(name)
        assert whole.shape == (tensor.num_rows, tensor.row_bytes)
        n = tensor.num_rows
        for start, stop in ((0, 1), (n // 3, n // 2 + 1), (max(0, n - 3), None)):
          np.testing.assert_array_equal(rotated.rows(name, start, stop), whole[start:stop])
    read: list[str] = []
    inner = source.rows
    monkeypatch.setattr(source, "rows", lambda name, *a: read.append(name) or inner(name, *a))
    rotated = RotatedCheckpoint(source)
    assert not read
    rotated.rows("blk.1.attn_output.weight")
    assert read == ["blk.1.attn_output.weight"]
    rotated.rows("blk.1.ffn_up.weight")
    assert read[1:] == ["blk.1.ffn_up.weight", "blk.1.ffn_norm.weight"]


@pytest.mark.parametrize("method", ["rtn", "mse", "hqq", "awq", "gptq"])
def test_methods_work_on_it(tiny: GGUFCheckpoint, method: str) -> None:
  rotated = RotatedCheckpoint(tiny, 7)
  made = MemoryCheckpoint(rotated.config, rotated.metadata)
  grid = Grid(4, 64, "minimum")
  tokens = sequences(tiny, CALIBRATION, 64, 4, seed=0) if method in NEEDS_TEXT else None
  quantize_model(rotated, lambda _: made, Scheme(grid=grid, method=method), tokens=tokens)
  if method == "rtn":
    w = floats(rotated, "blk.3.ffn_down.weight")
    want = fake_quant(w, grid, fit(w, grid))
    np.testing.assert_array_equal(floats(made, "blk.3.ffn_down.weight"), want)
  assert made.tensors["output.weight"].format == "q6_k"
  assert similarity(made, tiny) > 0.97


@pytest.mark.parametrize("suffix", [".gguf", ".qbin"])
def test_a_mix_of_it(tiny: GGUFCheckpoint, suffix: str, tmp_path: Path) -> None:
  out = tmp_path / f"out{suffix}"
  rotated = RotatedCheckpoint(tiny)
  quantize_model(
    rotated,
    lambda tensors: open_sink(out, rotated.config, rotated.metadata, tensors),
    Scheme(mix="q4_k_m"),
  )
  with open_checkpoint(out) as made:
    formats = [made.tensors[f"{n}.weight"].format for n in ("output", "token_embd", "blk.1.attn_q")]
    assert formats == ["q6_k", "q4_k", "q4_k"]
    assert similarity(made, tiny) > 0.97


def test_what_cannot_be_is_refused(odd: Path, tmp_path: Path) -> None:
  with GGUFCheckpoint.open(odd) as source:
    with pytest.raises(ConfigError, match="seed of a rotation is -1"):
      RotatedCheckpoint(source, -1)
    biased = MemoryCheckpoint(source.config, source.metadata, "biased")
    for name, tensor in source.tensors.items():
      biased.write(tensor, source.rows(name))
    extra = Tensor("blk.0.attn_output.bias", (96,), "f32")
    biased.write(extra, np.zeros((1, 384), np.uint8))
    with pytest.raises(FormatError, match=r"biased.*'blk\.0\.attn_output\.bias'.*no such tensor"):
      RotatedCheckpoint(biased)
    biased.tensors = {n: t for n, t in source.tensors.items() if n != "blk.1.ffn_norm.weight"}
    with pytest.raises(FormatError, match=r"'blk\.1\.ffn_norm\.weight' has shape None"):
      RotatedCheckpoint(biased)
  with GGUFCheckpoint.open(PACKAGED) as packaged:
    with pytest.raises(ConfigError, match=r"is q\d_k already"):
      RotatedCheckpoint(packaged)
    again = RotatedCheckpoint(packaged, again=True)
    assert {t.format for t in again.tensors.values()} == {"f32"}
  with pytest.raises(ConfigError, match="already"):
    convert(PACKAGED, tmp_path / "out.gguf", rotate=0)
  assert not list(tmp_path.iterdir())


def float_model(checkpoint):
  """The model with all weights in float32: on a CPU, products with float16 round their inputs."""
  plain = MemoryCheckpoint(checkpoint.config, checkpoint.metadata)
  for name, tensor in checkpoint.tensors.items():
    values = np.ascontiguousarray(floats(checkpoint, name).reshape(tensor.num_rows, -1))
    plain.write(Tensor(name, tensor.shape, "f32"), values.view(np.uint8))
  return load_checkpoint(plain)


def similarity(made, source) -> float:
  """The cosine between the logits of two models."""
  got, want = (load_checkpoint(c).logits(np.arange(5, 37)) for c in (made, source))
  return float((got * want).sum() / np.sqrt((got**2).sum() * (want**2).sum()))
