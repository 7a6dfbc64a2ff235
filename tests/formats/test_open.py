"""Every format by one door; orbax folders."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_model
import hf_model
from oracles import models
from oracles.models import SPECS
from q4jax.errors import ConfigError, FormatError, MissingDependencyError
from q4jax.formats import orbax_checkpoint
from q4jax.formats.checkpoint import Checkpoint, Tensor
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.hub import resolve
from q4jax.formats.open import open_checkpoint, open_sink
from q4jax.formats.orbax_checkpoint import OrbaxCheckpoint
from q4jax.formats.safetensors import SafetensorsCheckpoint
from q4jax.loading import load


def copy(source: Checkpoint, out: Path) -> Path:
  tensors = list(source.tensors.values())
  with open_sink(out, source.config, source.metadata, tensors) as sink:
    for tensor in tensors:
      sink.write(tensor, source.rows(tensor.name))
      source.release(tensor.name)
  return out


def same(a: Checkpoint, b: Checkpoint) -> None:
  assert a.config == b.config
  assert list(a.metadata) == list(b.metadata)
  for key, value in a.metadata.items():
    np.testing.assert_array_equal(value, b.metadata[key], err_msg=key)
    assert type(value) is type(b.metadata[key])
    assert getattr(value, "dtype", None) == getattr(b.metadata[key], "dtype", None)
  assert list(a.tensors.values()) == list(b.tensors.values())
  for name in a.tensors:
    assert a.rows(name).tobytes() == b.rows(name).tobytes(), name


@pytest.fixture(params=["q4_k", "f16", "bf16"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
  spec = gguf_model.ModelSpec(
    d_model=256, d_ffn=256, head_dim=64, type=request.param, rope_factors=(2.0,) * 32
  )
  return gguf_model.write(tmp_path / "in.gguf", spec)


def test_orbax_keeps_everything(
  source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(orbax_checkpoint, "PART_BYTES", 1 << 16)
  with open_checkpoint(source) as model:
    out = copy(model, tmp_path / "out.orbax")
    assert len(list(out.iterdir())) > 3
    with open_checkpoint(out) as found:
      assert isinstance(found, OrbaxCheckpoint)
      same(found, model)
      np.testing.assert_array_equal(
        found.rows("token_embd.weight", 5, 9), model.rows("token_embd.weight", 5, 9)
      )
      copy(found, tmp_path / "back.gguf")
    with open_checkpoint(tmp_path / "back.gguf") as found:
      same(found, model)


def test_orbax_itself_reads_a_part(tmp_path: Path) -> None:
  import orbax.checkpoint as ocp

  source = models.write(SPECS["llama"], tmp_path / "in.gguf")
  with open_checkpoint(source) as model:
    out = copy(model, tmp_path / "out.orbax")
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = checkpointer.restore(out / "00000")
  wanted = models.weights(SPECS["llama"])  # Half-split, as transformers has them.
  assert tree.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_array_equal(tree[name], value, err_msg=name)


def test_load_takes_every_format(tmp_path: Path) -> None:
  source = models.write(SPECS["llama3-rope"], tmp_path / "in.gguf")
  with open_checkpoint(source) as model:
    out = copy(model, tmp_path / "out.orbax")
  tokens = models.prompt(SPECS["llama3-rope"])
  wanted = np.asarray(load(source).logits(tokens))
  np.testing.assert_array_equal(np.asarray(load(out).logits(tokens)), wanted)


def test_doors(tmp_path: Path) -> None:
  with open_checkpoint("tiny") as model:
    assert isinstance(model, GGUFCheckpoint)
  spec = SPECS["llama"]
  folder = hf_model.write(tmp_path / "hf", hf_model.config(spec), hf_model.tensors(spec), shards=2)
  index = "model.safetensors.index.json"
  for name in ("", "config.json", index, "model-00001-of-00002.safetensors"):
    with open_checkpoint(folder / name) as model:
      assert isinstance(model, SafetensorsCheckpoint) and len(model.tensors) == 21
  (tmp_path / "empty").mkdir()
  with pytest.raises(FormatError, match="neither config.json .* Is it a model's"):
    open_checkpoint(tmp_path / "empty")
  (tmp_path / "empty" / "a.gguf").write_bytes(b"")
  with pytest.raises(FormatError, match="Name a file in it: a.gguf"):
    open_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize(
  ("name", "options", "said"),
  [
    ("model.bin", {}, "ends in '.bin', .* .gguf, .qbin, .orbax"),
    ("model", {}, "ends in ''"),
    ("model.orbax", {"layout": "x16"}, "a .orbax file has no option 'layout'; it has none"),
    ("model.gguf", {"layout": "x16"}, "'layout'; it has file_type, types"),
  ],
)
def test_sinks_that_there_are_not(
  name: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
  config = open_checkpoint("tiny").config
  with pytest.raises(ConfigError, match=said):
    open_sink(tmp_path / name, config, {}, [], **options)


def edited(tmp_path: Path, change: Any) -> Path:
  source = models.write(SPECS["llama-tied-mha"], tmp_path / "in.gguf")
  with open_checkpoint(source) as model:
    out = copy(model, tmp_path / "out.orbax")
  document = json.loads((out / "q4jax.json").read_text())
  change(document)
  (out / "q4jax.json").write_text(json.dumps(document))
  return out


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda d: d.update(version=2), "version is 2; q4jax reads 1"),
    (lambda d: d.pop("tensors"), "not laid out .* KeyError"),
    (lambda d: d["tensors"][0].update(format="q9"), "unknown format 'q9'"),
    (lambda d: d["tensors"][0].update(format=["f32"]), "unknown format"),
    (lambda d: d["tensors"][0].update(shape=[]), r"has the shape \[\]"),
    (lambda d: d["tensors"][0].update(shape=[-1, 4]), "has the shape"),
    (lambda d: d["tensors"][0].update(format="q4_k", shape=[3, 100]), "rows of 100"),
    (lambda d: d["tensors"][0].update(part="../00000"), "is in part '../00000'"),
    (lambda d: d["metadata"].update({"a": {"dtype": "O", "values": [3]}}), "not laid out"),
    (lambda d: d["metadata"].pop("llama.block_count"), "llama.block_count is missing"),
  ],
)
def test_orbax_descriptions_that_are_refused(change: Any, said: str, tmp_path: Path) -> None:
  with pytest.raises(FormatError, match=said):
    open_checkpoint(edited(tmp_path, change))


@pytest.mark.parametrize(
  "change",
  [
    lambda d: d["tensors"][1].update(shape=[2, 2]),
    lambda d: d["tensors"][1].update(format="f16"),
    lambda d: d["tensors"][1].update(part="00007"),
    lambda d: d["tensors"][1].update(name="other.weight"),
  ],
)
def test_orbax_parts_that_do_not_fit(change: Any, tmp_path: Path) -> None:
  with (
    open_checkpoint(edited(tmp_path, change)) as model,
    pytest.raises(FormatError, match="00000: tensor|00007: tensor"),
  ):
    model.rows(list(model.tensors)[1])


def test_orbax_leaves_nothing_of_what_fails(tmp_path: Path) -> None:
  config = open_checkpoint("tiny").config
  a, b = Tensor("a", (2, 4), "f32"), Tensor("b", (2, 4), "f32")
  sink = open_sink(tmp_path / "out.orbax", config, {}, [a, b])
  with pytest.raises(ConfigError, match="1 tensor"), sink:
    sink.write(a, np.zeros((2, 16), np.uint8))
  assert not list(tmp_path.iterdir())


def test_orbax_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "orbax", None)
  monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
  with pytest.raises(MissingDependencyError, match=r"q4jax\[train\]"):
    open_sink(tmp_path / "out.orbax", open_checkpoint("tiny").config, {}, [])
  (tmp_path / "q4jax.json").write_text("{}")
  with pytest.raises(MissingDependencyError, match=r"q4jax\[train\]"):
    open_checkpoint(tmp_path)


def test_reading_gguf_imports_neither_writers_nor_orbax() -> None:
  code = (
    "import sys; from q4jax.formats.open import open_checkpoint; open_checkpoint('tiny').close();"
    "print([m for m in ('gguf', 'orbax', 'safetensors', 'huggingface_hub') if m in sys.modules])"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "[]"
  assert resolve("tiny").exists()
