"""`q4jax.load`: the logits of what it loads against float64 arithmetic on the file's weights."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import q4jax
from formats.raw_gguf import good
from gguf_model import ModelSpec, vectors_and_matrices, write
from oracles.float64_llama import Float64Llama
from q4jax.errors import Q4JaxError
from q4jax.loading import aligned_empty, load
from q4jax_kernels import ffi
from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.row_planar_array import RowPlanarArray
from random_blocks import FLOATS, FORMATS

Planes = PlanarArray | RowPlanarArray

TOKENS = np.random.default_rng(1).integers(3, 290, 21)
# Dimensions that every format's block divides.
WIDE = {"d_model": 256, "d_ffn": 512, "heads": 4, "head_dim": 64}

# What activations of 8 bits cost on random blocks; a wrong scale or code costs all.
ROUNDED = 0.06
# What activations of float16 cost: it rounds by up to 2^-11.
HALF_ROUNDED = 2e-3


def logits(path: Path) -> np.ndarray:
  return np.asarray(load(path).logits(TOKENS))[0]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
  """Root mean square of the difference, relative to the expected logits'."""
  return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


def assert_exact(path: Path) -> None:
  """Float arithmetic all through: the difference is float32's rounding."""
  found, expected = logits(path), Float64Llama(path).logits(TOKENS)
  assert np.abs(found).max() > 0.1
  assert distance(found, expected) < 2e-6


SPECS = {
  "llama": ModelSpec(),
  "llama untied": ModelSpec(tied=False, layers=1),
  "llama with as many kv heads": ModelSpec(kv_heads=4, layers=1),
  "llama with one kv head": ModelSpec(kv_heads=1, heads=3, layers=1),
  "llama with narrow heads": ModelSpec(head_dim=10, layers=1),
  "llama with wide heads": ModelSpec(head_dim=48, layers=1),
  "llama with biases": ModelSpec(bias=True, layers=1),
  "llama 3": ModelSpec(rope_factors=(1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0), layers=1),
  "llama with bpe": ModelSpec(vocabulary="bpe", layers=1),
  "llama of theta 500000": ModelSpec(keys={"llama.rope.freq_base": 500_000.0}, layers=1),
  "llama of another epsilon": ModelSpec(
    keys={"llama.attention.layer_norm_rms_epsilon": 0.1}, layers=1
  ),
  "qwen2": ModelSpec("qwen2", layers=1),
  "qwen2 untied": ModelSpec("qwen2", tied=False, layers=1),
  "qwen3": ModelSpec("qwen3"),
  "qwen3 with wide heads": ModelSpec("qwen3", head_dim=40, kv_heads=1, layers=1),
}


@pytest.mark.parametrize("name", SPECS)
def test_float_models(name: str, tmp_path: Path) -> None:
  assert_exact(write(tmp_path / "model.gguf", SPECS[name]))


@pytest.mark.parametrize("name", ["llama", "llama with biases", "qwen2"])
def test_float_models_without_the_library(
  name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(ffi, "library", lambda: None)
  assert_exact(write(tmp_path / "model.gguf", SPECS[name]))


def matrices() -> list[str]:
  spec = ModelSpec(tied=False)
  return [name for name, shape in vectors_and_matrices(spec).items() if len(shape) == 2]


def every_type(name: str) -> str:
  """Another type for each of the 15 matrices of a tied model of two layers."""
  return FORMATS[matrices().index(name) % len(FORMATS)]


def float_types(name: str) -> str:
  return FLOATS[len(name) % len(FLOATS)]


def test_the_types_are_all_there() -> None:
  assert {every_type(name) for name in matrices() if name != "output.weight"} == set(FORMATS)
  assert {float_types(name) for name in matrices()} == set(FLOATS)


def test_every_type_is_its_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Dequantised by XLA, nothing is rounded: a wrong bit of any block would show."""
  monkeypatch.setattr(ffi, "library", lambda: None)
  assert_exact(write(tmp_path / "model.gguf", ModelSpec(**WIDE, type=every_type)))


@pytest.mark.parametrize("layout", ["planes", "row_planes"])
def test_every_type_as_other_devices_keep_it(
  layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Here too XLA multiplies, but with the weights as a TPU's or GPU's kernel reads them."""
  monkeypatch.setattr(ffi, "library", lambda: None)
  monkeypatch.setattr("q4jax.loading.layout_for", lambda device: layout)
  path = write(tmp_path / "model.gguf", ModelSpec(**WIDE, type=every_type))
  leaves = jax.tree.leaves(
    nnx.state(load(path).module), is_leaf=lambda leaf: isinstance(leaf, BlockArray | Planes)
  )
  assert sum(isinstance(leaf, Planes) for leaf in leaves) == 6
  assert_exact(path)


def test_every_type_natively(tmp_path: Path) -> None:
  """The native kernels round activations: to 8 bits for quantised weights, as f16 for f16's."""
  if not ffi.available():
    pytest.skip("needs the native library")
  path = write(tmp_path / "floats.gguf", ModelSpec(**WIDE, type=float_types))
  assert distance(logits(path), Float64Llama(path).logits(TOKENS)) < HALF_ROUNDED
  assert_exact(write(tmp_path / "wide.gguf", ModelSpec(**WIDE, type=lambda _: "f32")))
  path = write(tmp_path / "model.gguf", ModelSpec(**WIDE, type=every_type))
  assert distance(logits(path), Float64Llama(path).logits(TOKENS)) < ROUNDED


@pytest.mark.parametrize("native", [True, False])
def test_weights_keep_the_bits_of_the_file(
  native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """In memory as in the file, but for the order of Q's and K's rows."""
  if not native:
    monkeypatch.setattr(ffi, "library", lambda: None)
  elif not ffi.available():
    pytest.skip("needs the native library")
  path = write(tmp_path / "model.gguf", ModelSpec(**WIDE, type=every_type, tied=False))
  module = load(path).module
  weights: dict[str, Any] = {"token_embd": module.embedding.weight, "output": module.output}
  for i, block in enumerate(module.blocks):
    attn, ffn = block.attn, block.ffn
    weights |= {f"blk.{i}.attn_{x}": getattr(attn, x) for x in ("q", "k", "v", "output")}
    weights |= {f"blk.{i}.ffn_{x}": getattr(ffn, x) for x in ("gate", "up", "down")}
  values = {name: variable.get_value() for name, variable in weights.items()}
  plain = jax.jit(
    lambda ws: {n: w.rows().data if isinstance(w, BlockArray) else w for n, w in ws.items()}
  )(values)
  tensors = [t for t in gguf_tensors(path) if len(t.shape) == 2]
  assert len(tensors) == len(values)
  for tensor in tensors:
    name, type = tensor.name.removesuffix(".weight"), tensor.tensor_type.name.lower()
    assert isinstance(values[name], BlockArray) == (native or type not in FLOATS)
    expected = tensor.data.reshape(tensor.data.shape[0], -1).view(np.uint8)
    if name.endswith(("attn_q", "attn_k")):
      head = expected.reshape(-1, 32, 2, expected.shape[1])  # 64 rows: pairs of neighbours
      expected = np.concatenate([head[:, :, 0], head[:, :, 1]], 1).reshape(expected.shape)
    found = np.asarray(plain[name]).view(np.uint8)
    np.testing.assert_array_equal(found, expected, err_msg=name)


def gguf_tensors(path: Path) -> list:
  import gguf

  return gguf.GGUFReader(path).tensors


@pytest.mark.parametrize(
  "keys",
  [
    {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    {"llama.rope.scale_linear": 4.0},
  ],
)
def test_linear_scaling_divides_every_frequency(keys: dict, tmp_path: Path) -> None:
  scaled = logits(write(tmp_path / "scaled.gguf", ModelSpec(keys=keys)))
  path = write(tmp_path / "divided.gguf", ModelSpec(rope_factors=(4.0,) * 8))
  expected = Float64Llama(path).logits(TOKENS)
  assert distance(scaled, expected) < 2e-6
  assert distance(logits(write(tmp_path / "plain.gguf", ModelSpec())), expected) > 1e-2


def test_a_named_implementation_multiplies(tmp_path: Path) -> None:
  path = write(tmp_path / "model.gguf", ModelSpec(**WIDE, type=lambda _: "q4_k"))
  exact = Float64Llama(path).logits(TOKENS)
  found = {
    name: np.asarray(load(path, implementation=name).logits(TOKENS))[0]
    for name in (None, "cpu_scalar", "cpu_exact", "reference")
  }
  assert 1e-4 < distance(found[None], exact) < ROUNDED
  np.testing.assert_allclose(found["cpu_scalar"], found[None], rtol=1e-4, atol=1e-4)
  for name in ("cpu_exact", "reference"):  # No activation is rounded.
    assert distance(found[name], exact) < 1e-5


@pytest.mark.parametrize(
  ("keys", "scale"),
  [
    ({}, 1.0),
    ({"type": "none"}, 1.0),
    ({"type": "none", "factor": 4.0}, 1.0),
    ({"factor": 4.0}, 4.0),  # llama.cpp's default type is linear
    ({"type": "linear", "factor": 2}, 2.0),
  ],
)
def test_scaling_keys(keys: dict, scale: float, tmp_path: Path) -> None:
  full = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
  path = write(tmp_path / "model.gguf", ModelSpec(keys=full))
  assert load(path).config.rope_scale == scale


def test_keys_that_may_be_missing(tmp_path: Path) -> None:
  """kv heads default to the heads, head_dim to d_model / heads, the base to 10000."""
  spec = ModelSpec(kv_heads=4)
  path = write(tmp_path / "model.gguf", spec)
  full = load(path).config
  data = path.read_bytes()
  for key in ("attention.head_count_kv", "attention.key_length", "rope.freq_base"):
    data = data.replace(f"llama.{key}".encode(), f"other.{key}".encode())
  path.write_bytes(data)
  assert load(path).config == full


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
  keys = {"llama.attention.sliding_window": 256, "llama.expert_count": 0}
  assert_exact(write(tmp_path / "model.gguf", ModelSpec(keys=keys)))


@pytest.mark.parametrize("type", ["f32", "q4_k"])
def test_a_split_file_is_the_whole_one(type: str, tmp_path: Path) -> None:
  spec = ModelSpec(**WIDE, type=type, tied=False, layers=1)
  whole = logits(write(tmp_path / "whole.gguf", spec))
  first = write(tmp_path / "split.gguf", spec, max_tensors=3)
  shards = sorted(tmp_path.glob("split-*.gguf"))
  assert len(shards) == -(-len(vectors_and_matrices(spec)) // 3)
  for shard in (first, shards[-1]):
    np.testing.assert_array_equal(logits(shard), whole)


def test_progress_and_size(tmp_path: Path) -> None:
  path = write(tmp_path / "model.gguf", ModelSpec(**WIDE, type="q4_k"))
  seen: list[tuple[int, int]] = []
  model = load(path, progress=lambda done, total: seen.append((done, total)))
  sizes = [t.n_bytes for t in gguf_tensors(path)]
  assert [total for _, total in seen] == [sum(sizes)] * len(sizes)
  done = [0, *(done for done, _ in seen)]
  assert sorted(np.diff(done)) == sorted(sizes) and done[-1] == sum(sizes)
  # The embedding's 293 rows fill 19 tiles of 16 natively.
  assert sum(sizes) <= model.nbytes <= sum(sizes) + 11 * 144
  assert model.num_params == sum(int(np.prod(t.shape)) for t in gguf_tensors(path))
  assert model.path == str(path)
  assert "general.architecture" in model.metadata
  assert not any(key.startswith("tokenizer.ggml.") for key in model.metadata)


def test_no_float_copy_of_a_weight(tmp_path: Path) -> None:
  """The compiled model's temporaries are smaller than any one matrix in float32."""
  if not ffi.available():
    pytest.skip("XLA alone dequantises into a temporary")
  spec = ModelSpec(d_model=1024, d_ffn=2048, heads=8, head_dim=128, layers=1, type="q4_k")
  model = load(write(tmp_path / "model.gguf", spec))
  tokens = jax.ShapeDtypeStruct((1, 16), np.int32)
  program: Any = model.jit(lambda module, tokens: module(tokens))
  compiled = program.lower(model.leaves, tokens).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 1024 * 1024


def test_weights_are_taken_without_a_copy() -> None:
  for shape in ((3, 5), (1, 1), (100, 1000)):
    array = aligned_empty(shape)
    assert array.shape == shape and array.ctypes.data % 64 == 0
    on_device = jax.device_put(array, jax.local_devices()[0])
    assert on_device.unsafe_buffer_pointer() == array.ctypes.data


def test_an_external_tokenizer(tmp_path: Path) -> None:
  path = write(tmp_path / "model.gguf", ModelSpec())
  with pytest.raises(Q4JaxError, match="no-such.json"):
    load(path, tokenizer=tmp_path / "no-such.json")


def refusal(path: Path | str) -> str:
  with pytest.raises(Q4JaxError) as error:
    load(path)
  assert Path(path).name in str(error.value)
  return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize(
  ("old", "new", "says"),
  [
    (b"blk.0.ffn_up.weight", b"blk.0.ffn_um.weight", "blk.0.ffn_up.weight' is missing"),
    (b"output_norm.weight", b"Output_norm.weight", "output_norm.weight' is missing"),
    (b"llama.block_count", b"llama.block_coun!", "required key llama.block_count is missing"),
    (b"general.architecture", b"general.architectur!", "required key general.architecture"),
    (b"tokenizer.ggml.model", b"tokenizer.ggml.mode!", "tokenizer.ggml.model is missing"),
  ],
)
def test_something_missing(old: bytes, new: bytes, says: str, tmp_path: Path) -> None:
  path = write(tmp_path / "model.gguf", ModelSpec())
  data = path.read_bytes()
  assert old in data
  path.write_bytes(data.replace(old, new))
  assert says in refusal(path)


@pytest.mark.parametrize(
  ("keys", "says"),
  [
    ({"general.architecture": "mamba"}, "'mamba'.*runs llama, qwen2, qwen3"),
    ({"llama.expert_count": 8}, "llama.expert_count is 8.*dense"),
    ({"llama.attention.sliding_window": 128}, "llama.attention.sliding_window is 128"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
    ({"llama.rope.scaling.type": "linear"}, "key llama.rope.scaling.factor is missing"),
    ({"llama.block_count": "2"}, r"llama.block_count is '2' \(str\); expected int"),
    ({"llama.rope.freq_base": True}, "llama.rope.freq_base is True.*expected float"),
    ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0; expected 1"),
    ({"llama.attention.key_length": 32}, "key_length is 32|value_length is 16"),
    ({"llama.embedding_length": 96}, "'token_embd.weight' has shape.*293, 64.*293, 96"),
    ({"llama.feed_forward_length": 64}, "'blk.0.ffn_gate.weight' has shape.*96, 64.*64, 64"),
    ({"llama.block_count": 1}, r"tensor\(s\) are not part of.*'blk.1"),
    ({"llama.block_count": 3}, "'blk.2.attn_norm.weight' is missing"),
    ({"tokenizer.ggml.model": "bert"}, "TokenizerError.*bert"),
  ],
)
def test_something_wrong(keys: dict, says: str, tmp_path: Path) -> None:
  path = write(tmp_path / "model.gguf", ModelSpec(keys=keys))
  found = refusal(path)
  assert re.search(says, found), found
  assert found.startswith("TokenizerError" if "tokenizer" in str(keys) else "FormatError")


def test_an_unknown_tensor(tmp_path: Path) -> None:
  base = good()
  extra = base.tensors[1]
  for name in ("blk.0.attn_sinks.weight", "cls.weight"):
    tensors = (*base.tensors, type(extra)(name, extra.ne, extra.type, extra.data))
    path = tmp_path / "model.gguf"
    path.write_bytes(type(base)(base.keys, tensors).encode())
    assert name in refusal(path)
  # Old converters wrote this one, which holds nothing that the model does not know.
  tensors = (*base.tensors, type(extra)("blk.0.attn_rot_embd.weight", extra.ne, 0, extra.data))
  path.write_bytes(type(base)(base.keys, tensors).encode())
  load(path)


def test_the_public_name_is_the_function_whatever_was_imported_before(tmp_path: Path) -> None:
  path = write(tmp_path / "model.gguf", ModelSpec())
  assert q4jax.load is load
  assert q4jax.load(path).config == load(path).config


def test_no_file(tmp_path: Path) -> None:
  assert "No such file" in refusal(tmp_path / "absent.gguf")
  assert "neither config.json" in refusal(tmp_path)
