"""`q4jax convert`: from every format to every other, and what it refuses."""

import dataclasses
import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest

import gguf_model
import hf_model
from oracles import models
from oracles.models import SPECS
from q4jax.formats.checkpoint import floats
from q4jax.formats.open import open_checkpoint, open_sink
from q4jax.formats.qbin import QbinCheckpoint
from q4jax.formats.qbin_sink import set_records
from q4jax.records import Record
from q4jax_kernels.q4_formats import Q4_FORMATS

from .conftest import Run, finished, start
from .hub_stand_in import Hub, serve


@pytest.fixture
def source(tmp_path: Path) -> Path:
  spec = gguf_model.ModelSpec(d_model=256, d_ffn=512, head_dim=64, type="q4_k")
  return gguf_model.write(tmp_path / "in.gguf", spec)


def tensors(path: Path) -> list[tuple]:
  return [
    (t.name, t.shape.tolist(), t.tensor_type, t.data.tobytes())
    for t in gguf.GGUFReader(path).tensors
  ]


def metadata(path: Path) -> dict:
  fields = gguf.GGUFReader(path).fields.values()
  return {f.name: f.contents() for f in fields if not f.name.startswith("GGUF.")}


def types(path: Path) -> dict:
  return {field.name: field.types for field in gguf.GGUFReader(path).fields.values()}


@pytest.mark.parametrize("middle", ["gguf", "qbin", "orbax"])
def test_there_and_back(middle: str, q4jax: Run, source: Path, tmp_path: Path) -> None:
  there, back = tmp_path / f"there.{middle}", tmp_path / "back.gguf"
  result = q4jax("convert", source, there)
  assert result.code == 0 and result.err == ""
  assert result.out.startswith(f"{there}: 20 tensors, ")
  result = q4jax("convert", there, back, "--json")
  assert result.code == 0 and result.err == ""
  assert tensors(back) == tensors(source)
  if middle != "orbax":  # It keeps the values; whole numbers become UINT32.
    assert types(back) == types(source)
  assert metadata(back) == metadata(source)
  about = json.loads(result.out)
  assert about == {
    "source": str(there),
    "out": str(back),
    "tensors": 20,
    "weights": sum(int(t.n_elements) for t in gguf.GGUFReader(source).tensors),
    "source_bytes": sum(int(t.n_bytes) for t in gguf.GGUFReader(source).tensors),
    "out_bytes": back.stat().st_size,
    "has_tokenizer": True,
    "stored_as": {},
  }


@pytest.mark.parametrize("layout", ["rows", "x16"])
def test_layouts_and_records_of_qbin(layout: str, q4jax: Run, source: Path, tmp_path: Path) -> None:
  a, b = tmp_path / "a.qbin", tmp_path / "b.qbin"
  assert q4jax("convert", source, a, f"--layout={layout}").code == 0
  record = Record(
    "blk.0.ffn_up", "input", "int8", None, 0, "minmax", np.float32([0.5]), np.int32([0])
  )
  set_records(a, [record])
  assert q4jax("convert", a, b, f"--layout={layout}").code == 0
  assert a.read_bytes() == b.read_bytes()
  with QbinCheckpoint.open(b) as model:
    assert model.places["token_embd.weight"].layout == layout
    assert [found.layer_name for found in model.records()] == ["blk.0.ffn_up"]


def test_split_models_become_whole(q4jax: Run, tmp_path: Path) -> None:
  spec = gguf_model.ModelSpec()
  whole = gguf_model.write(tmp_path / "whole.gguf", spec)
  shard = gguf_model.write(tmp_path / "split.gguf", spec, max_tensors=7)
  assert q4jax("convert", shard, tmp_path / "out.gguf").code == 0
  assert tensors(tmp_path / "out.gguf") == tensors(whole)
  assert metadata(tmp_path / "out.gguf") == metadata(whole)


def test_overwriting(q4jax: Run, source: Path, tmp_path: Path) -> None:
  out = tmp_path / "out.gguf"
  out.write_bytes(b"before")
  result = q4jax("convert", source, out)
  assert (
    result.code == 1 and "--force to replace it" in result.err and out.read_bytes() == b"before"
  )
  assert q4jax("convert", source, out, "--force").code == 0
  assert tensors(out) == tensors(source)
  before = source.read_bytes()
  (tmp_path / "link.gguf").symlink_to(source)
  for same in (source, tmp_path / "link.gguf", tmp_path / "." / "in.gguf"):
    result = q4jax("convert", source, same, "--force")
    assert result.code == 1 and "is what is read" in result.err
  assert source.read_bytes() == before


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (("in.gguf", "out.bin"), "ends in '.bin'"),
    (("none.gguf", "out.gguf"), "No such file"),
    (("in.gguf", "none/out.gguf"), "the folder .*none does not exist"),
    (("in.gguf", "out.gguf", "--layout=x16"), "is of .qbin files"),
  ],
)
def test_refusals(
  arguments: tuple[str, ...], said: str, q4jax: Run, source: Path, tmp_path: Path
) -> None:
  paths = [str(tmp_path / name) for name in arguments[:2]]
  result = q4jax("convert", *paths, *arguments[2:])
  assert result.code == 1 and result.out == "" and result.err.count("\n") == 1
  assert re.search(said, result.err)
  assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_hub_folder(q4jax: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  spec = SPECS["qwen2"]
  folder = hf_model.write(
    tmp_path / "hf", hf_model.config(spec), hf_model.tensors(spec, "BF16"), shards=2
  )
  files = {f"org/repo/{path.name}": path.read_bytes() for path in folder.iterdir()}
  files |= {"org/repo/README.md": b"", "org/repo/pytorch_model.bin": b"", "org/other/a": b""}
  with serve(Hub(files=files)) as hub:
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
    out = tmp_path / "out.gguf"
    result = finished(start("convert", "hf://org/repo", out, "--json", env=env))
    assert result.code == 0, result.err
    asked = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET"}
    assert not asked & {"README.md", "pytorch_model.bin"}
    offline = env | {"HF_HUB_OFFLINE": "1"}
    result = finished(start("convert", "hf://org/repo", tmp_path / "b.gguf", env=offline))
    assert result.code == 0, result.err
    assert (tmp_path / "b.gguf").read_bytes() != b""
    result = finished(start("convert", "hf://org/other", tmp_path / "c.gguf", env=env))
    assert result.code == 1 and "org/other has no such file" in result.err
  assert tensors(tmp_path / "b.gguf") == tensors(out)
  assert metadata(out)["general.name"] == "repo"
  matrix = next(t for t in gguf.GGUFReader(out).tensors if t.name == "blk.1.ffn_up.weight")
  wanted = hf_model.tensors(spec, "BF16")["model.layers.1.mlp.up_proj.weight"]
  assert matrix.tensor_type.name == "BF16" and matrix.data.tobytes() == wanted.tobytes()


def test_interleaving_by_hand(q4jax: Run, tmp_path: Path) -> None:
  """Arch llama: rows i and i + head_dim / 2 of a head become neighbours; Qwen's stay."""
  spec = SPECS["llama"]
  folder = hf_model.write(tmp_path / "hf", hf_model.config(spec), hf_model.tensors(spec))
  result = q4jax("convert", folder, tmp_path / "out.gguf")
  assert result.code == 0 and "no tokenizer.json" in result.err
  twin = {t.name: t for t in gguf.GGUFReader(models.write(spec, tmp_path / "twin.gguf")).tensors}
  found = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
  assert found.keys() == twin.keys()
  for name, tensor in found.items():
    assert tensor.data.tobytes() == twin[name].data.tobytes(), name


def test_info_and_tokenize_read_every_format(q4jax: Run, source: Path, tmp_path: Path) -> None:
  spec = SPECS["llama"]
  hf = hf_model.write(tmp_path / "hf", hf_model.config(spec), hf_model.tensors(spec))
  wanted = json.loads(q4jax("info", source, "--json").out)
  ids = json.loads(q4jax("tokenize", source, "--text=abc d", "--json").out)["ids"]
  for suffix in ("qbin", "orbax"):
    out = tmp_path / f"out.{suffix}"
    assert q4jax("convert", source, out).code == 0
    about = json.loads(q4jax("info", out, "--json").out)
    changed = {"path": str(out), "format": suffix, "gguf_version": None}
    for name, value in (wanted | changed).items():
      assert name == "memory" or about[name] == value, name
    assert f"out.{suffix} ({suffix})" in q4jax("info", out).out
    assert json.loads(q4jax("tokenize", out, "--text=abc d", "--json").out)["ids"] == ids
  result = q4jax("info", hf)
  assert result.code == 0 and "(safetensors)" in result.out and "f32" in result.out


def with_groups(source: Path, out: Path, name: str) -> Path:
  """The model with its ffn_up in random blocks of a group-wise format."""
  form, rng = Q4_FORMATS[name], np.random.default_rng(0)
  with open_checkpoint(source) as model:
    tensors = [
      dataclasses.replace(t, format=name) if "ffn_up" in t.name else t
      for t in model.tensors.values()
    ]
    with open_sink(out, model.config, model.metadata, tensors) as sink:
      for tensor in tensors:
        rows = model.rows(tensor.name)
        if tensor.format == name:
          n, blocks = tensor.num_rows, tensor.shape[-1] // form.block_size
          groups = (n, blocks, form.block_size // form.group)
          codes = rng.integers(0, 16, (n, blocks, form.block_size), np.uint8)
          minimum = None if form.symmetric else rng.normal(0, 0.1, groups)
          rows = form.join(codes, rng.normal(0, 0.01, groups), minimum, np).reshape(n, -1)
        sink.write(tensor, rows)
  return out


@pytest.mark.parametrize(("name", "as_"), [("q4s128_f16", "q4_0"), ("q4a64_f16", "q4_1")])
def test_groups_are_stored_as_blocks(
  name: str, as_: str, q4jax: Run, source: Path, tmp_path: Path
) -> None:
  grouped, out = with_groups(source, tmp_path / "grouped.qbin", name), tmp_path / "out.gguf"
  result = q4jax("convert", grouped, out)
  assert result.code == 0 and f"{name} is stored as {as_}" in result.err
  result = q4jax("convert", grouped, out, "--force", "--json")
  assert json.loads(result.out)["stored_as"] == {name: as_} and result.err == ""
  with open_checkpoint(grouped) as a, open_checkpoint(out) as b:
    assert b.tensors["blk.1.ffn_up.weight"].format == as_
    for tensor in a.tensors:
      assert floats(a, tensor).tobytes() == floats(b, tensor).tobytes(), tensor


def test_groups_that_no_block_holds(q4jax: Run, source: Path, tmp_path: Path) -> None:
  grouped = with_groups(source, tmp_path / "grouped.qbin", "q4s16_f16")
  result = q4jax("convert", grouped, tmp_path / "out.gguf")
  assert result.code == 1 and "'q4s16_f16' weights are in no GGUF type exactly" in result.err
  assert not (tmp_path / "out.gguf").exists()
