"""Injection against float64 numpy, from every source, while generating, undone, and refused."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import gguf_model
import q4jax
from calibrated import rounded_llama
from q4jax.calibrated import Affine, CalibratedModel, Range, Source, with_calibration
from q4jax.engine.prefill import prefill
from q4jax.engine.programs import Programs
from q4jax.errors import ConfigError, FormatError
from q4jax.formats.qbin_sink import set_records
from q4jax.kv.config import KVConfig
from q4jax.kv.protect import Protect
from q4jax.model.calib import Calib
from q4jax.model.model import Model
from q4jax.offline.calibration import read_records
from q4jax.offline.convert import convert
from q4jax.records import RANGES, Record

TOKENS = np.random.default_rng(1).integers(3, 290, 24)


@pytest.fixture
def calibrated(model: Model) -> CalibratedModel:
  return with_calibration(model)


@pytest.mark.parametrize("type", ["f32", "q4_k"])
def test_neutral_slots_change_no_bit(type: str, tmp_path: Path) -> None:
  spec = gguf_model.ModelSpec(d_model=256, d_ffn=256, head_dim=64, type=type)
  plain = q4jax.load(gguf_model.write(tmp_path / "m.gguf", spec))
  model = with_calibration(plain)
  np.testing.assert_array_equal(model.logits(TOKENS), plain.logits(TOKENS))
  options = {"max_tokens": 8, "temperature": 0, "logprobs": 3}
  a, b = (q4jax.Engine(m).generate(TOKENS, **options) for m in (plain, model))
  assert a.tokens == b.tokens and a.logprobs == b.logprobs


def test_only_who_asks_has_slots(model: Model, calibrated: CalibratedModel) -> None:
  assert not jax.tree.leaves(nnx.state(model.module, Calib))
  assert len(calibrated.leaves) == len(model.leaves) + 1
  [table] = jax.tree.leaves(nnx.state(calibrated.module, Calib))
  assert table.shape == (2 * (4 + 2 * 2) + 1, 4)
  _, rest = nnx.state(calibrated.module, Calib, ...)
  mine, weights = jax.tree.leaves(rest), jax.tree.leaves(nnx.state(model.module))
  assert [id(leaf) for leaf in mine] == [id(leaf) for leaf in weights], "they were copied"


def rounding_of(records: list[Record]) -> rounded_llama.Rounding:
  out = {}
  for r in records:
    name = r.layer_name.removeprefix("blk.").removesuffix(".weight")
    name = {"input": name, "key": f"{name}.key", "value": f"{name}.value"}.get(r.target)
    if name is not None:
      out["head" if name == "token_embd" else name] = r.scale, r.zero_point, *RANGES[r.dtype]
  return out


def test_logits_are_float64s(file: Path, folder: Path, calibrated: CalibratedModel) -> None:
  exact = rounded_llama.logits(file, TOKENS, {})
  np.testing.assert_allclose(calibrated.logits(TOKENS)[0], exact, atol=1e-3)
  calibrated.inject(folder)
  rounded = rounded_llama.logits(file, TOKENS, rounding_of(read_records(folder)))
  effect = np.abs(rounded - exact).mean()
  error = np.abs(np.asarray(calibrated.logits(TOKENS)[0]) - rounded)
  # A value within a float32's error of a rounding's edge may fall on the other side.
  assert np.median(error) < effect / 50 and error.mean() < effect / 5


def test_each_stream_has_its_own_slot(file: Path, calibrated: CalibratedModel) -> None:
  exact = rounded_llama.logits(file, TOKENS, {})
  for i in range(2):
    for stream in ("attn_q", "attn_output", "ffn_gate", "ffn_down", "key", "value"):
      heads = stream in ("key", "value")
      scale = np.array([0.05, 0.4]) if heads else 0.3
      name = f"blk.{i}.{stream}" + ("" if heads else ".weight")
      with calibrated.inject({name: Affine(scale, 1, "int4")}):
        mine = np.asarray(calibrated.logits(TOKENS)[0])
      array = np.atleast_1d(np.float32(scale))
      rule = {f"{i}.{stream}": (array, np.ones(len(array)), -8, 7)}
      rounded = rounded_llama.logits(file, TOKENS, rule)
      effect, error = np.abs(rounded - exact).mean(), np.abs(mine - rounded)
      assert np.median(error) < effect / 50 and error.mean() < effect / 5, name


def test_the_cache_holds_codes(calibrated: CalibratedModel) -> None:
  engine = q4jax.Engine(calibrated, kv_dtype="f32")
  scales = np.array([0.25, 0.125])
  calibrated.inject({"blk.1.key": Affine(scales, 0, "int4"), "blk.0.value": (scales, 0)})
  programs = Programs.of(calibrated, logprobs=False)
  state, _ = prefill(engine, programs, [TOKENS.astype(np.int32)], 1, 256)
  keys, values = (np.asarray(x)[:, 0, :, : len(TOKENS)] for x in state.cache)
  for x, most in ((keys[1], 8), (values[0], 128)):
    codes = x / scales[:, None, None]
    np.testing.assert_array_equal(codes, np.rint(codes))
    assert np.abs(codes).max() <= most and len(np.unique(codes[0])) > 4
  assert not np.array_equal(keys[0] / 0.125, np.rint(keys[0] / 0.125))


def test_one_program_serves_all(folder: Path, calibrated: CalibratedModel) -> None:
  engine = q4jax.Engine(calibrated)
  plain = np.asarray(calibrated.logits(TOKENS))
  tokens = engine.generate(TOKENS, max_tokens=6, temperature=0).tokens
  injections = [calibrated.inject(folder)]
  rounded = np.asarray(calibrated.logits(TOKENS))
  assert not np.array_equal(rounded, plain)
  for i in range(3):
    name = f"blk.{i % 2}.ffn_down.weight"
    injections.append(calibrated.inject({name: Range(-1 - i, 2, "uint8")}))
    calibrated.logits(TOKENS)
    engine.generate(TOKENS, max_tokens=6, temperature=0)
  for injection in reversed(injections[1:]):
    injection.undo()
  np.testing.assert_array_equal(calibrated.logits(TOKENS), rounded)
  injections[0].undo()
  injections[0].undo()
  np.testing.assert_array_equal(calibrated.logits(TOKENS), plain)
  assert engine.generate(TOKENS, max_tokens=6, temperature=0).tokens == tokens
  programs = Programs.of(calibrated, logprobs=False)
  for program in (calibrated._logits, programs.prefill, programs.first, programs.decode):
    assert program._cache_size() == 1  # type: ignore[attr-defined]


def test_a_generation_under_way_sees_it(calibrated: CalibratedModel) -> None:
  engine, options = q4jax.Engine(calibrated), {"max_tokens": 12, "logprobs": 0}
  before = engine.generate(TOKENS, **options).logprobs
  stream = engine.stream(TOKENS, **options)
  got = [next(stream).logprobs for _ in range(4)]
  with calibrated.inject({"blk.0.ffn_down.weight": Range(-0.2, 0.2, "int4")}):
    # One step is always under way when a token is handed out.
    got += [next(stream).logprobs for _ in range(4)]
  got += [chunk.logprobs for chunk in stream]
  assert got[:5] == before[:5] and got[5] != before[5]
  assert engine.generate(TOKENS, **options).logprobs == before


def test_a_compressed_cache_gets_what_was_rounded(calibrated: CalibratedModel) -> None:
  engine = q4jax.Engine(calibrated, kv=KVConfig(protect=Protect(2, 4), block_size=16))
  options = {"max_tokens": 8, "temperature": 0, "logprobs": 0}
  calibrated.inject({f"blk.{i}.{x}": ([0.25, 0.5], 0) for i in (0, 1) for x in ("key", "value")})
  rounded = engine.generate(TOKENS, **options)
  dense = q4jax.Engine(calibrated).generate(TOKENS, **options)
  assert rounded.tokens == dense.tokens and rounded.timing.kv is not None
  # Codes times 0.25 are float16s: what is stored in blocks is what was rounded.
  for a, b in zip(rounded.logprobs, dense.logprobs, strict=True):
    assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_no_gradient_reaches_what_was_injected(folder: Path, calibrated: CalibratedModel) -> None:
  calibrated.inject(folder)
  graph, calib, params, rest = nnx.split(calibrated.module, Calib, nnx.Param, ...)
  calib = jax.tree.map(lambda _: calibrated.calibration, calib)

  def loss(calib: nnx.State, params: nnx.State) -> jax.Array:
    return (nnx.merge(graph, calib, params, rest)(TOKENS[None]) ** 2).sum()

  to_calib, to_params = jax.grad(loss, argnums=(0, 1))(calib, params)
  [to_table] = jax.tree.leaves(to_calib)
  assert to_table.shape == calibrated.calibration.shape and not np.asarray(to_table).any()
  assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(to_params))


def test_all_sources_say_the_same(
  file: Path, folder: Path, calibrated: CalibratedModel, tmp_path: Path
) -> None:
  records = read_records(folder)
  qbin = tmp_path / "m.qbin"
  convert(file, qbin)
  set_records(qbin, [r for r in records if r.target != "weight"])
  state = {
    r.layer_name + ("" if r.target == "input" else f".{r.target}"): Affine(
      r.scale, r.zero_point, r.dtype
    )
    for r in records
    if r.target != "weight"
  }
  tables = []
  for source in (folder, str(folder), records, iter(records), qbin, state):
    with calibrated.inject(source):
      tables.append(calibrated.calibration)
  assert tables[0][:, 0].all()
  for table in tables[1:]:
    np.testing.assert_array_equal(table, tables[0])
  with calibrated.inject(folder / "blk.001.json"):  # Layer by layer.
    mine = calibrated.calibration
    assert not mine[:8].any() and not mine[16].any()
    np.testing.assert_array_equal(mine[8:16], tables[0][8:16])


def test_a_model_keeps_its_own(model: Model, folder: Path) -> None:
  own = with_calibration(model, folder)
  before, table = own.calibration, own.table
  with own.inject({"blk.0.key": (np.ones(2), 0)}):
    [stored] = jax.tree.leaves(nnx.state(own.module, Calib))
    np.testing.assert_array_equal(stored, before)
    assert not np.array_equal(own.calibration, before)
  assert own.table is table
  with pytest.raises(ConfigError, match="has slots for a calibration already"):
    with_calibration(own)


def test_injections_end_in_the_order_in_which_they_stack(calibrated: CalibratedModel) -> None:
  first = calibrated.inject({"blk.0.key": (np.ones(2), 0)})
  second = calibrated.inject({"blk.1.key": (np.ones(2), 0)})
  with pytest.raises(ConfigError, match="injected after this one"):
    first.undo()
  second.undo()
  first.undo()
  assert not calibrated.calibration.any()
  with pytest.raises(ZeroDivisionError), calibrated.inject({"blk.0.key": (np.ones(2), 0)}):
    raise ZeroDivisionError
  assert not calibrated.calibration.any()


Q = "blk.0.attn_q.weight"
GOOD = Record(Q, "input", "int8", None, 0, "minmax", np.float32([0.1]), np.int32([0]))
KEY = dataclasses.replace(
  GOOD, layer_name="blk.1", target="key", axis=-1, group_size=16, scale=np.ones(2, np.float32),
  zero_point=np.zeros(2, np.int32),
)  # fmt: skip


@pytest.mark.parametrize(
  ("source", "says"),
  [
    ({"blk.2.attn_q.weight": (1, 0)}, "layer 'blk.2.attn_q.weight' has no input .* blk.1 with"),
    ({"blk.00.attn_q.weight": (1, 0)}, "layer 'blk.00.attn_q.weight' has no input"),
    ({"blk.0.attn_norm.weight": (1, 0)}, "layer 'blk.0.attn_norm.weight' has no input"),
    ({"output.weight": (1, 0)}, "layer 'output.weight' has no input .* or token_embd.weight"),
    ({"blk.7.key": ([1, 1], 0)}, "layer 'blk.7' has no key"),
    ({"blk.1.key": (1, 0)}, r"'blk.1' \(key\): scale has shape \[\]; expected one for each of 2"),
    ({"blk.1.value": ([1, 1, 1], 0)}, r"'blk.1' \(value\): scale has shape \[3\]; .* of 2 heads"),
    ({Q: ([1, 2], 0)}, r"attn_q.weight' \(input\): scale has shape \[2\]; expected one for the"),
    ({Q: (0, 0)}, r"attn_q.weight' \(input\): scale is \[0.0\]; expected positive"),
    ({Q: (-0.1, 0)}, r"scale is \[-0.1\]; expected positive"),
    ({Q: (float("nan"), 0)}, r"attn_q.weight' \(input\): scale is \[nan\]; expected finite"),
    ({Q: (float("inf"), 0)}, r"scale is \[inf\]; expected finite"),
    ({Q: (1e300, 0)}, r"scale is \[1e\+300\]; expected positive numbers within float32"),
    ({Q: (1e-42, 0)}, r"scale is .*; expected positive numbers within float32"),
    ({Q: (1, 128)}, r"zero_point is \[128.0\]; .* int8's codes \(-128..127\)"),
    ({Q: (1, 0.5)}, r"zero_point is \[0.5\]; expected whole numbers"),
    ({Q: (1, float("nan"))}, r"zero_point is \[nan\]; expected finite"),
    ({Q: Affine(1, 0, "int9")}, "attn_q.weight' .*: dtype is 'int9'; expected one of int2"),
    ({Q: Range(1, -1)}, "layer 'blk.0.attn_q.weight': the range's min 1 is above its max -1"),
    ({Q: Range(0, float("inf"))}, "layer 'blk.0.attn_q.weight': the range is 0 to inf; expected"),
    ({Q: Range(0, 1, "float8")}, "layer 'blk.0.attn_q.weight': dtype is 'float8'"),
    ({Q: "0.1"}, r"layer 'blk.0.attn_q.weight': expected \(scale, zero_point\), Affine or Range"),
    ({Q: ("a", 0)}, "layer 'blk.0.attn_q.weight': 'a' is no number"),
    ({Q: (1, 0), "blk.0.attn_k.weight": (2, 0)}, "attn_k.*not those of 'blk.0.attn_q.weight'"),
    ([dataclasses.replace(GOOD, minimum=np.ones(1))], "attn_q.weight' .* it has a minimum"),
    ([dataclasses.replace(GOOD, statistics={"min": 2, "max": 1})], "attn_q.*min 2 and max 1"),
    ([dataclasses.replace(GOOD, target="weight")], "there is nothing to inject"),
    ([dataclasses.replace(GOOD, target="query")], "has no query"),
    ([KEY, dataclasses.replace(KEY, scale=np.ones(1))], r"'blk.1' \(key\): scale has shape \[1\]"),
    ([], "there is nothing to inject"),
  ],
)  # fmt: skip
def test_refused_and_nothing_is_half_injected(
  calibrated: CalibratedModel, source: Source, says: str
) -> None:
  calibrated.inject({"blk.1.ffn_down.weight": (0.5, 3)})
  leaves, values = calibrated.leaves, calibrated.calibration
  if isinstance(source, dict):
    source = {"blk.1.attn_output.weight": (0.25, 0), **source}
  with pytest.raises(ConfigError, match=says):
    calibrated.inject(source)
  assert calibrated.leaves is leaves
  np.testing.assert_array_equal(calibrated.calibration, values)


def test_bad_files_are_named(calibrated: CalibratedModel, tmp_path: Path) -> None:
  (tmp_path / "x.json").write_text("{}")
  for path in (tmp_path / "x.json", tmp_path / "none.json", tmp_path / "none.qbin"):
    with pytest.raises(FormatError, match=path.name):
      calibrated.inject(path)
  assert not calibrated.calibration.any()
