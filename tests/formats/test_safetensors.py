"""Hugging Face folders: the same model as its GGUF twin, and clear refusals of all others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import hf_model
import q4jax
from oracles import models
from oracles.models import FLOAT_SPECS, SPECS, Spec
from q4jax.errors import FormatError
from q4jax.formats.checkpoint import floats
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.safetensors import SafetensorsCheckpoint
from q4jax.loading import load
from q4jax.text.tokenizer import Tokenizer

TINY = Spec("hf-tiny", d_model=32, d_ffn=48, layers=1, heads=2, kv_heads=1, head_dim=16, vocab=40)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("spec", FLOAT_SPECS, ids=lambda spec: spec.name)
def test_the_same_tensors_as_the_gguf_twin(spec: Spec, dtype: str, tmp_path: Path) -> None:
  twin = models.write(spec, tmp_path / "twin.gguf")
  folder = hf_model.write(
    tmp_path / "hf", hf_model.config(spec), hf_model.tensors(spec, dtype), shards=3
  )
  with SafetensorsCheckpoint.open(folder) as a, GGUFCheckpoint.open(twin) as b:
    assert a.config == b.config
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
      wanted = floats(b, name)
      is_vector = len(tensor.shape) == 1
      assert tensor.format == ("f32" if is_vector else dtype.lower()), name
      if name != "rope_freqs.weight":
        wanted = wanted.astype(hf_model.DTYPES[dtype]).astype(np.float32)
      np.testing.assert_array_equal(floats(a, name), wanted, err_msg=name)
      if not is_vector:
        np.testing.assert_array_equal(a.rows(name, 2, 7), a.rows(name)[2:7])
      a.release(name)
      np.testing.assert_array_equal(floats(a, name), wanted, err_msg=f"{name}, once more")


class FromTwin:
  """A tokenizer for folders that have none: the stand-in vocabulary of the GGUF twin."""

  @pytest.fixture
  def borrow(self, monkeypatch: pytest.MonkeyPatch) -> Any:
    def borrow(twin: Path) -> None:
      with GGUFCheckpoint.open(twin) as file:
        text = Tokenizer.from_gguf_metadata(file.metadata)
      monkeypatch.setattr(Tokenizer, "from_tokenizer_json", classmethod(lambda *_: text))

    return borrow


class TestLogits(FromTwin):
  @pytest.mark.parametrize("spec", FLOAT_SPECS, ids=lambda spec: spec.name)
  def test_equal_the_gguf_twins(self, spec: Spec, borrow: Any, tmp_path: Path) -> None:
    twin = models.write(spec, tmp_path / "twin.gguf")
    folder = hf_model.write(tmp_path / "hf", hf_model.config(spec), hf_model.tensors(spec))
    borrow(twin)
    tokens = models.prompt(spec)
    ours = np.asarray(load(folder, tokenizer="borrowed").logits(tokens))
    np.testing.assert_allclose(ours, np.asarray(load(twin).logits(tokens)), atol=1e-6)

  @pytest.mark.oracle
  @pytest.mark.parametrize("spec", FLOAT_SPECS, ids=lambda spec: spec.name)
  def test_equal_transformers(self, spec: Spec, borrow: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: `make oracles`")
    import torch
    from transformers import AutoModelForCausalLM

    twin = models.write(spec, tmp_path / "twin.gguf")
    folder = hf_model.write(tmp_path / "hf", hf_model.config(spec), hf_model.tensors(spec), 2)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    borrow(twin)
    tokens = models.prompt(spec)
    with torch.no_grad():
      wanted = theirs(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    ours = np.asarray(load(folder, tokenizer="borrowed").logits(tokens))[0]
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_what_config_json_may_leave_out_or_say_otherwise(tmp_path: Path) -> None:
  """Llama's defaults, transformers 5's `rope_parameters`, linear scaling, a tied copy of the head,
  a buffer that follows from the config.
  """
  tensors = hf_model.tensors(TINY)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
  tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((32, 32), np.float32)
  tensors["model.layers.0.self_attn.v_proj.weight"] = np.ones((32, 32), np.float32)
  document = hf_model.config(TINY, tie_word_embeddings=True)
  for key in ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling"):
    del document[key]
  document["rope_parameters"] = {"rope_type": "linear", "factor": 4, "rope_theta": 5e5}
  with SafetensorsCheckpoint.open(hf_model.write(tmp_path / "hf", document, tensors)) as found:
    config = found.config
  assert (config.num_kv_heads, config.head_dim) == (2, 16)
  assert (config.rope_theta, config.rope_scale) == (5e5, 4.0)
  assert config.norm_eps == np.float32(1e-6)
  assert config.tied and "output.weight" not in found.tensors


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_llama3_scaling_divides_as_the_paper_says(kind: str, tmp_path: Path) -> None:
  spec = SPECS["llama3-rope"]
  document = hf_model.config(spec)
  document["rope_scaling"][kind] = document["rope_scaling"].pop("rope_type")
  with SafetensorsCheckpoint.open(
    hf_model.write(tmp_path / "hf", document, hf_model.tensors(spec))
  ) as found:
    factors = floats(found, "rope_freqs.weight")
  # Piece by piece, as llama.cpp's converter has it (wavelengths, not turns).
  factor, low, high, original = spec.rope_scaling or ()
  for i, found_factor in enumerate(factors):
    wavelength = 2 * np.pi * spec.theta ** (2 * i / spec.head_dim)
    if wavelength < original / high:
      wanted = 1.0
    elif wavelength > original / low:
      wanted = factor
    else:
      smooth = (original / wavelength - low) / (high - low)
      wanted = 1 / ((1 - smooth) / factor + smooth)
    assert found_factor == pytest.approx(wanted, rel=1e-6)
  assert len({*factors.tolist()}) > 2


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"architectures": ["GemmaForCausalLM"]}, "architectures is .*Gemma.*; q4jax runs Llama"),
    ({"architectures": None}, "architectures is None"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config says 'awq'"),
    ({"quantization_config": 4}, "quantization_config says 4"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is of type 'dynamic'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling is of type 'yarn'"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected an object"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; q4jax runs only 'silu'"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"sliding_window": 16}, "sliding_window is 16: sliding-window attention is not supported"),
    ({"hidden_size": "32"}, "hidden_size is '32'; expected an integer"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776"),
    ({"num_hidden_layers": 2}, "'model.layers.1.input_layernorm.weight' is missing"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"rope_theta": -1}, "rope_theta is -1"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"vocab_size": 41}, r"'model.embed_tokens.weight' has shape \[40, 32\]; .* \[41, 32\]"),
    ({"head_dim": 15}, "15"),
  ],
)
def test_configs_that_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
  document = hf_model.config(TINY, **changes)
  folder = hf_model.write(tmp_path / "hf", document, hf_model.tensors(TINY))
  with pytest.raises(FormatError, match=said) as caught:
    SafetensorsCheckpoint.open(folder)
  assert str(folder) in str(caught.value)


def test_qwen_needs_its_window_switched_on(tmp_path: Path) -> None:
  spec = Spec("hf-qwen2", "qwen2", d_model=32, d_ffn=48, layers=1, heads=2, head_dim=16, vocab=40)
  window = {"sliding_window": 16, "use_sliding_window": False}
  tensors = hf_model.tensors(spec)
  SafetensorsCheckpoint.open(
    hf_model.write(tmp_path / "a", hf_model.config(spec, **window), tensors)
  ).close()
  window["use_sliding_window"] = True
  with pytest.raises(FormatError, match="sliding_window is 16"):
    SafetensorsCheckpoint.open(
      hf_model.write(tmp_path / "b", hf_model.config(spec, **window), tensors)
    )


NORM, HEAD = "model.norm.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({HEAD: None}, "'lm_head.weight' is missing"),
    ({NORM: np.ones(31, np.float32)}, r"'model.norm.weight' has shape \[31\]; .* \[32\]"),
    ({Q: np.ones((32, 32), np.int8)}, "q_proj.weight' is of type I8; q4jax reads F32, F16, BF16"),
    ({NORM: np.ones(32, np.float64)}, "model.norm.weight' is of type F64"),
    (
      {"model.layers.0.self_attn.o_proj.bias": np.ones(32, np.float32)},
      r"1 tensor\(s\) are no part .* first 'model.layers.0.self_attn.o_proj.bias'",
    ),
    ({"model.layers.1.mlp.up_proj.weight": np.ones((48, 32), np.float32)}, "model.layers.1.mlp"),
  ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_tensors_that_are_refused(
  shards: int, changes: dict[str, np.ndarray | None], said: str, tmp_path: Path
) -> None:
  tensors = {n: t for n, t in (hf_model.tensors(TINY) | changes).items() if t is not None}
  folder = hf_model.write(tmp_path / "hf", hf_model.config(TINY), tensors, shards)
  with pytest.raises(FormatError, match=said):
    SafetensorsCheckpoint.open(folder)


def raw(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
  return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"1234567",
    raw(b"", b"", 0),
    raw({"a": entry([16], 0, 64)}, length=2**63),
    raw({"a": entry([16], 0, 64)}, length=200),
    raw({"a": entry([16], 0, 60)}),
    raw({"a": entry([8], 0, 32)}),
    raw({"a": entry([8], 0, 32), "b": entry([8], 16, 48)}),
    raw({"a": entry([2**62, 4], 0, 64)}),
    raw({"a": entry([-1], 0, 64)}),
    raw({"a": entry([16], 0, 64, "F99")}),
    raw(b'{"a": %b, "a": %b}' % ((json.dumps(entry([16], 0, 64)).encode(),) * 2)),
    raw(b"[]"),
    raw(b"[" * 100_000),
    raw(b'{"a": \xff}'),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
  ],
)
def test_files_that_break_the_format(data: bytes, tmp_path: Path) -> None:
  folder = hf_model.write(tmp_path / "hf", hf_model.config(TINY), hf_model.tensors(TINY))
  (folder / "model.safetensors").write_bytes(data)
  with pytest.raises(FormatError, match="model.safetensors"):
    SafetensorsCheckpoint.open(folder)


def test_files_cut_short(tmp_path: Path) -> None:
  folder = hf_model.write(tmp_path / "hf", hf_model.config(TINY), hf_model.tensors(TINY))
  path = folder / "model.safetensors"
  whole = path.read_bytes()
  for size in [*range(0, 40, 7), len(whole) // 2, len(whole) - 1]:
    path.write_bytes(whole[:size])
    with pytest.raises(FormatError):
      SafetensorsCheckpoint.open(folder)


def sharded(tmp_path: Path) -> tuple[Path, Path]:
  folder = hf_model.write(tmp_path / "hf", hf_model.config(TINY), hf_model.tensors(TINY), shards=2)
  return folder, folder / "model.safetensors.index.json"


def test_a_missing_shard(tmp_path: Path) -> None:
  folder, _ = sharded(tmp_path)
  (folder / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(FormatError, match=r"00002-of-00002.*missing; .* 2 file\(s\)"):
    SafetensorsCheckpoint.open(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
  folder, _ = sharded(tmp_path)
  first, second = sorted(folder.glob("model-*.safetensors"))
  save_file(load_file(second) | dict([*load_file(first).items()][:1]), second)
  with pytest.raises(FormatError, match="is in model-00001.* and in model-00002"):
    SafetensorsCheckpoint.open(folder)


@pytest.mark.parametrize(
  ("index", "said"),
  [
    ("[]", "is a JSON list"),
    ("{", "is not JSON"),
    ('{"weight_map": {}}', "weight_map is no object"),
    ('{"weight_map": {"a": "../../etc/passwd"}}', "names '../../etc/passwd'"),
    ('{"weight_map": {"a": "pytorch_model.bin"}}', "names 'pytorch_model.bin'"),
    ('{"weight_map": {"a": 3}}', "names '3'"),
    ('{"weight_map": {"a": "b", "a": "c"}}', "'a' occurs twice"),
  ],
)
def test_an_index_that_is_refused(index: str, said: str, tmp_path: Path) -> None:
  folder, path = sharded(tmp_path)
  path.write_text(index)
  with pytest.raises(FormatError, match=said):
    SafetensorsCheckpoint.open(folder)


def test_folders_without_weights(tmp_path: Path) -> None:
  folder = hf_model.write(tmp_path / "hf", hf_model.config(TINY), hf_model.tensors(TINY))
  (folder / "model.safetensors").unlink()
  with pytest.raises(FormatError, match="neither model.safetensors nor"):
    SafetensorsCheckpoint.open(folder)
  (folder / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(FormatError, match="pickled"):
    SafetensorsCheckpoint.open(folder)
  (folder / "config.json").write_text("null")
  with pytest.raises(FormatError, match="is a JSON NoneType"):
    SafetensorsCheckpoint.open(folder)
  with pytest.raises(FormatError, match="config.json: the model's config cannot be read"):
    SafetensorsCheckpoint.open(tmp_path / "none")


def test_a_folder_without_a_tokenizer_needs_one(tmp_path: Path) -> None:
  folder = hf_model.write(tmp_path / "hf", hf_model.config(TINY), hf_model.tensors(TINY))
  with pytest.raises(q4jax.TokenizerError, match="tokenizer.ggml.model is missing"):
    load(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("fuzz") / "hf"
  return hf_model.write(folder, hf_model.config(TINY), hf_model.tensors(TINY))


@given(
  name=st.sampled_from(["model.safetensors", "config.json"]),
  at=st.integers(0, 1500),
  data=st.binary(min_size=1, max_size=12),
)
def test_damage_is_an_error_or_another_model(whole: Path, name: str, at: int, data: bytes) -> None:
  path = whole / name
  good = path.read_bytes()
  at %= min(len(good), 1500)
  path.write_bytes(good[:at] + data + good[at + len(data) :])
  try:
    with SafetensorsCheckpoint.open(whole) as found:
      for tensor in found.tensors.values():
        assert found.rows(tensor.name).shape == (tensor.num_rows, tensor.row_bytes)
  except q4jax.Q4JaxError:
    pass
  finally:
    path.write_bytes(good)
