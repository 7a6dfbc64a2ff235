"""Our GGUF files: equal to their source as gguf-py's reader sees both; exact group-wise weights."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import gguf_model
from q4jax.config import LlamaConfig
from q4jax.errors import ConfigError
from q4jax.formats.checkpoint import Tensor
from q4jax.formats.gguf import GGUFFile
from q4jax.formats.gguf_checkpoint import GGUFCheckpoint
from q4jax.formats.gguf_sink import GGUFSink
from q4jax_kernels import q4_formats

T = gguf.GGUFValueType
CONFIG = LlamaConfig("llama", 8, 16, 32, 32, 1, 2, 1, 16)


def copy(source: Path, out: Path, backwards: bool = False, **options: Any) -> Path:
  with GGUFCheckpoint.open(source) as model:
    tensors = list(model.tensors.values())
    with GGUFSink(
      out, model.config, model.metadata, tensors, types=model.value_types, **options
    ) as sink:
      for tensor in reversed(tensors) if backwards else tensors:
        sink.write(tensor, model.rows(tensor.name))
  return out


def fields(path: Path) -> list[tuple]:
  """Everything gguf-py sees but the three counts of the header, whose order is the file's."""
  reader = gguf.GGUFReader(path)
  return [
    (field.name, field.types, [np.asarray(part).tobytes() for part in field.parts])
    for field in reader.fields.values()
    if not field.name.startswith("GGUF.")
  ]


def tensors(path: Path) -> list[tuple]:
  return [
    (t.name, t.shape.tolist(), t.tensor_type, t.data.tobytes())
    for t in gguf.GGUFReader(path).tensors
  ]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
  "spec",
  [
    gguf_model.ModelSpec(
      d_model=256, d_ffn=256, head_dim=64, type="q4_k", rope_factors=(1.0,) * 32
    ),
    gguf_model.ModelSpec(type="q4_0", bias=True, tied=False),
    gguf_model.ModelSpec("qwen2", type="bf16", vocabulary="bpe", vocab=300),
  ],
  ids=["q4_k", "q4_0-bias", "qwen2-bf16"],
)
def test_a_copy_is_equal(spec: gguf_model.ModelSpec, backwards: bool, tmp_path: Path) -> None:
  source = gguf_model.write(tmp_path / "in.gguf", spec)
  out = copy(source, tmp_path / "out.gguf", backwards)
  assert fields(out) == fields(source)
  assert tensors(out) == tensors(source)
  with GGUFCheckpoint.open(out) as a, GGUFCheckpoint.open(source) as b:
    for name in b.tensors:
      assert a.rows(name).tobytes() == b.rows(name).tobytes()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in.gguf", "out.gguf"]


def test_values_of_every_type_keep_it(tmp_path: Path) -> None:
  writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
  for kind in T:
    if kind in (T.ARRAY, T.STRING):
      continue
    value: Any = {T.BOOL: True, T.FLOAT32: 0.1, T.FLOAT64: 0.1}.get(kind, 7)
    writer.add_key_value(f"one.{kind.name}", value, kind)
    writer.add_key_value(f"many.{kind.name}", [value, 0], T.ARRAY, kind)
  writer.add_key_value("text", "Grüße, 世界 \U0001f642", T.STRING)
  writer.add_key_value("empty", "", T.STRING)
  writer.add_key_value("texts", ["", "a b", "é"], T.ARRAY)
  writer.add_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with GGUFFile.open(tmp_path / "in.gguf") as file:
    x = Tensor("x", (2, 3), "f32")
    rows = file.read_rows(file.tensors["x"], 0, 2)
    sink = GGUFSink(tmp_path / "out.gguf", CONFIG, file.metadata, [x], types=file.value_types)
    with sink:
      sink.write(x, rows)
  assert fields(tmp_path / "out.gguf") == fields(tmp_path / "in.gguf")
  assert tensors(tmp_path / "out.gguf") == tensors(tmp_path / "in.gguf")


@pytest.mark.parametrize(
  ("value", "types"),
  [
    (7, [T.UINT32]),  # What llama.cpp insists on for its counts and ids.
    (-1, [T.INT32]),
    (2**32, [T.UINT64]),
    (-(2**31) - 1, [T.INT64]),
    (0.5, [T.FLOAT32]),
    (1e-5, [T.FLOAT64]),
    (float(np.float32(1e-5)), [T.FLOAT32]),
    (True, [T.BOOL]),
    ("text", [T.STRING]),
    (["a", "b"], [T.ARRAY, T.STRING]),
    ([1, 2], [T.ARRAY, T.INT32]),
    ([1, 2.5], [T.ARRAY, T.FLOAT32]),
    (np.array([1, 2], np.uint16), [T.ARRAY, T.UINT16]),
  ],
)
def test_types_of_values_without_a_known_one(value: Any, types: list, tmp_path: Path) -> None:
  with GGUFSink(tmp_path / "out.gguf", CONFIG, {"key": value}, []):
    pass
  assert gguf.GGUFReader(tmp_path / "out.gguf").fields["key"].types[: len(types)] == types


def test_constants_of_the_architecture_are_float32(tmp_path: Path) -> None:
  with GGUFSink(tmp_path / "out.gguf", CONFIG, {"llama.attention.epsilon": 1e-5}, []):
    pass
  field = gguf.GGUFReader(tmp_path / "out.gguf").fields["llama.attention.epsilon"]
  assert field.types == [T.FLOAT32] and field.contents() == np.float32(1e-5)


@pytest.mark.parametrize("value", [2**64, [1, "a"], {"a": 1}, None, 1e300 + 0j])
def test_values_that_no_type_holds(value: Any, tmp_path: Path) -> None:
  with pytest.raises(ConfigError, match="key is .* no type of GGUF"):
    GGUFSink(tmp_path / "out.gguf", CONFIG, {"key": value}, []).__enter__()
  assert not list(tmp_path.iterdir())


def test_what_the_file_says_of_its_quantisation(tmp_path: Path) -> None:
  matrix = Tensor("x", (1, 256), "q4_k")
  with GGUFSink(
    tmp_path / "out.gguf", CONFIG, {"general.file_type": 1, "split.no": 0}, [matrix], None, "q4_k_m"
  ) as sink:
    sink.write(matrix, np.zeros((1, 144), np.uint8))
  reader = gguf.GGUFReader(tmp_path / "out.gguf")
  found = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
  assert found == {
    "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "general.quantization_version": gguf.GGML_QUANT_VERSION,
  }
  with pytest.raises(ConfigError, match="file_type is 'q9'; expected one of f32, f16, q4_0"):
    GGUFSink(tmp_path / "out.gguf", CONFIG, {}, [], None, "q9")


def group_rows(form: q4_formats.Q4Format, seed: int) -> np.ndarray:
  """Random rows of a group-wise format; scales of both signs, minimums with both zeros."""
  rng = np.random.default_rng(seed)
  n, blocks = 5, 512 // form.block_size
  groups = form.block_size // form.group
  codes = rng.integers(0, 16, (n, blocks, form.block_size), np.uint8)
  scale = rng.normal(0, 0.1, (n, blocks, groups))
  minimum = np.where(rng.random(scale.shape) < 0.3, rng.choice([0.0, -0.0]), rng.normal(0, 1))
  rows = form.join(codes, scale, None if form.symmetric else minimum, np)
  return np.asarray(rows).reshape(n, -1)


EXACT = [f"q4{kind}{group}_f16" for kind in "sa" for group in (32, 64, 128, 256)]


@pytest.mark.parametrize("name", EXACT)
def test_group_wise_weights_stay_bit_for_bit(name: str, tmp_path: Path) -> None:
  form = q4_formats.Q4_FORMATS[name]
  rows = group_rows(form, seed=form.group)
  matrix = Tensor("x", (5, 512), name)
  with GGUFSink(tmp_path / "out.gguf", CONFIG, {}, [matrix]) as sink:
    sink.write(matrix, rows)
  (found,) = gguf.GGUFReader(tmp_path / "out.gguf").tensors
  assert found.tensor_type.name == ("Q4_0" if form.symmetric else "Q4_1")
  theirs = gguf.quants.dequantize(found.data, found.tensor_type)
  ours = np.asarray(form.dequantize(rows.reshape(5, -1, form.block_bytes), np)).reshape(5, 512)
  assert theirs.tobytes() == ours.tobytes()


@pytest.mark.parametrize("name", ["q4s8_f16", "q4a16_f16", "q4s32_f32", "q4a128_f32"])
def test_other_group_wise_weights_are_refused(name: str, tmp_path: Path) -> None:
  with pytest.raises(ConfigError, match=rf"x: '{name}' weights .* q4_k.*\.qbin"):
    GGUFSink(tmp_path / "out.gguf", CONFIG, {}, [Tensor("x", (1, 512), name)])


def test_alignment(tmp_path: Path) -> None:
  matrices = [Tensor(name, (1, 3), "f32") for name in "abc"]
  rows = np.arange(12, dtype=np.uint8)[None]
  with GGUFSink(tmp_path / "out.gguf", CONFIG, {"general.alignment": 256}, matrices) as sink:
    for matrix in matrices:
      sink.write(matrix, rows)
  found = gguf.GGUFReader(tmp_path / "out.gguf").tensors
  assert [t.data_offset % 256 for t in found] == [0, 0, 0]
  assert [t.data.tobytes() for t in found] == [rows.tobytes()] * 3
  with pytest.raises(ConfigError, match="general.alignment is 3"):
    GGUFSink(tmp_path / "out.gguf", CONFIG, {"general.alignment": 3}, [])


X, Y = Tensor("x", (2, 4), "f32"), Tensor("y", (4,), "f32")
ROWS = np.zeros((2, 16), np.uint8)


def misuse(sink: GGUFSink, what: str) -> None:
  sink.write(X, ROWS)
  if what == "twice":
    sink.write(X, ROWS)
  elif what == "unknown":
    sink.write(Tensor("z", (2, 4), "f32"), ROWS)
  elif what == "other":
    sink.write(Tensor("y", (4,), "f16"), ROWS[:1, :8])
  elif what == "size":
    sink.write(Y, ROWS)
  elif what == "error":
    raise KeyboardInterrupt


@pytest.mark.parametrize(
  ("what", "kind", "said"),
  [
    ("missing", ConfigError, "1 tensor\\(s\\) were not written, first 'y'"),
    ("twice", ConfigError, "'x'.* is not a tensor that is still to be written"),
    ("unknown", ConfigError, "'z'.* is not a tensor"),
    ("other", ConfigError, "'f16'.* is not a tensor"),
    ("size", ConfigError, r"y comes as uint8\[2, 16\]; expected uint8\[1, 16\]"),
    ("error", KeyboardInterrupt, None),
  ],
)
def test_nothing_is_left_of_what_fails(
  what: str, kind: type[BaseException], said: str | None, tmp_path: Path
) -> None:
  (tmp_path / "out.gguf").write_bytes(b"before")
  with (
    pytest.raises(kind, match=said),
    GGUFSink(tmp_path / "out.gguf", CONFIG, {}, [X, Y]) as sink,
  ):
    misuse(sink, what)
  assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
  assert (tmp_path / "out.gguf").read_bytes() == b"before"


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
  with pytest.raises(ConfigError, match="two of the 2 tensors"):
    GGUFSink(tmp_path / "out.gguf", CONFIG, {}, [X, X])


SLOW_WRITER = """
  import sys, time
  import numpy as np
  from q4jax.config import LlamaConfig
  from q4jax.formats.checkpoint import Tensor
  from q4jax.formats.gguf_sink import GGUFSink
  tensors = [Tensor(f"x{i}", (64, 4096), "f32") for i in range(200)]
  with GGUFSink(sys.argv[1], LlamaConfig("llama", 8, 16, 32, 32, 1, 2, 1, 16), {}, tensors) as sink:
    print("begun", flush=True)
    for tensor in tensors:
      sink.write(tensor, np.ones((64, 16384), np.uint8))
      time.sleep(0.005)
"""


@pytest.mark.parametrize("after", [0.0, 0.1, 0.5])
def test_a_kill_leaves_what_was_there(after: float, tmp_path: Path) -> None:
  out = tmp_path / "out.gguf"
  out.write_bytes(b"before")
  code = textwrap.dedent(SLOW_WRITER)
  with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE) as child:
    assert child.stdout is not None and child.stdout.readline() == b"begun\n"
    time.sleep(after)
    os.kill(child.pid, signal.SIGKILL)
  assert out.read_bytes() == b"before"
  assert len(list(tmp_path.iterdir())) == 2  # What the kill left has another name,
  with GGUFSink(out, CONFIG, {}, [X]) as sink:
    sink.write(X, ROWS)
  assert len(list(tmp_path.iterdir())) == 1  # and goes with the next that is written.
