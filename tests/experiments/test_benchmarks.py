"""The measuring scripts run, and report what they were given; no number here is about speed."""

import math
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

import q4jax
from experiments import (
  bench_int4_matmul,
  bench_kv_attention,
  bench_vs_llamacpp,
  profile_decode,
)
from experiments.provenance import markdown
from gguf_model import ModelSpec, write
from q4jax_kernels import ffi, probe

native = pytest.mark.skipif(not ffi.available(), reason="needs the native library")


@native
def test_profile_decode() -> None:
  record = profile_decode.run(profile_decode.Config(tokens=6, runs=2))
  for key in ("inside_ms", "outside_ms", "dispatch_ms", "python_ms"):
    low, high = record[f"{key}_range"]
    assert 0 < low <= record[key] <= high
  # tiny's norms and biases are one array; its KV cache is no weight.
  assert record["arrays"] < 40 and record["batch"] == 1


@native
def test_int4_matmul_rows(tmp_path: Path) -> None:
  config = bench_int4_matmul.Config(
    shapes=("gemm32", "llama1b.kv"), m=(1,), formats=("q4_k", "q4_0"), reps=1, rotate_mib=2,
    seconds=0.0,
  )  # fmt: skip
  records = bench_int4_matmul.run(config)
  found = [(r["shape"], r["m"], r["implementation"], r["format"]) for r in records]
  # A block of 256 does not fit 32 columns.
  assert ("gemm32", 32, "cpu", "q4_0") in found and ("gemm32", 32, "cpu", "q4_k") not in found
  assert found[-7:] == [
    ("llama1b.kv", 1, name, format)
    for name, format in (
      ("cpu", "q4_k"), ("cpu", "q4_0"), ("xla", "q4_k"), ("xla", "q4_0"), ("f32", "f32"),
      ("bf16", "bf16"), ("scalar", "g32"),
    )
  ]  # fmt: skip
  row = records[-7]
  assert row["nbytes"] == 512 * 2048 * 144 // 256
  assert row["gb_per_s"] == pytest.approx(row["nbytes"] / row["seconds"] / 1e9)
  assert row["of_read"] == pytest.approx(row["gb_per_s"] / row["read_gb_per_s"])
  assert row["gops"] == pytest.approx(2 * 512 * 2048 / row["seconds"] / 1e9)
  assert row["of_peak"] == pytest.approx(row["gops"] / row["peak_gops"])
  assert len(bench_int4_matmul.table(records)) == 1 + len(records)
  loop, simd, ratio = (claim.measure(records) for claim in bench_int4_matmul.CLAIMS)
  assert loop == 1e3 * next(r["seconds"] for r in records if r["implementation"] == "scalar")
  assert ratio == loop / simd
  with pytest.raises(q4jax.ConfigError, match=r"--shapes: nothing; there are gemm32, "):
    bench_int4_matmul.run(bench_int4_matmul.Config(shapes=("nothing",)))


@native
def test_the_scalar_loop_is_the_product_it_claims() -> None:
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 8)).astype(np.float32)
  packed = rng.integers(0, 256, (5, 4), np.uint8)
  scale, minimum = rng.random((2, 5, 2), np.float32)
  codes = np.stack([packed & 15, packed >> 4], -1).reshape(5, 8)
  w = scale.repeat(4, 1) * codes - minimum.repeat(4, 1)
  np.testing.assert_allclose(probe.scalar_matmul(x, packed, scale, minimum), x @ w.T, rtol=1e-5)
  with pytest.raises(ValueError, match="do not fit"):
    probe.scalar_matmul(x, packed[:, :3], scale, minimum)


@native
def test_limits_are_those_of_a_machine() -> None:
  """Within a factor of what any CPU of this century does; a lost unit is a factor of 1000."""
  assert 1e8 < probe.read_bandwidth(np.ones(32 << 20, np.uint8), 1) < 1e12
  assert 1e8 < probe.int8_peak(1, 0.01) < 1e13


@native
def test_kv_attention_rows() -> None:
  config = bench_kv_attention.Config(slots=(64,), layers=2, reps=2)
  records = bench_kv_attention.run(config)
  assert [r["cache"] for r in records] == [
    *bench_kv_attention.FORMATS, "dense float16", "bfloat16 (XLA)"
  ]  # fmt: skip
  of = {r["cache"]: r for r in records}
  # Two of 8 heads of 64 numbers: five bits each with scale and minimum, and 16.
  assert of["int4 g32"]["nbytes"] == 64 * 2 * 8 * 64 * 5 // 8
  assert of["float16 blocks"]["nbytes"] == 64 * 2 * 8 * 64 * 2
  assert of["dense float16"]["speedup"] == 1
  fast = of["int4 g64"]
  assert fast["speedup"] == pytest.approx(of["dense float16"]["seconds"] / fast["seconds"])
  assert len(bench_kv_attention.table(records)) == 1 + len(records)


LLAMA_BENCH = """#!{python}
import json, sys
words = sys.argv[1:]
if "--help" in words:
  print("usage: [--repack <0|1>]" if {repack} else "usage:")
  sys.exit()
if "-m" not in words or words[words.index("-t") + 1] != "1":
  sys.exit("what?")
held = b"x" * (64 << 20)
on = "--repack 0" not in " ".join(words)
sys.stderr.write("chatter" * 50000)
def record(p, n, d):
  return dict(n_prompt=p, n_gen=n, n_depth=d, avg_ts=(10.0 if on else 20.0) + d)
p, n = (int(words[words.index(flag) + 1]) for flag in ("-p", "-n"))
depths = words[words.index("-d") + 1].split(",")
import time; time.sleep(0.2)
print(json.dumps([record(*t, int(d)) for d in depths for t in ((p, 0), (0, n))]))
"""
BATCHED = """#!{python}
import json, sys
words = sys.argv[1:]
if "--help" in words:
  print("-nr, --no-repack", file=sys.stderr)
  sys.exit()
value = {{flag: words[words.index(flag) + 1] for flag in ("-npp", "-ntg", "-npl", "-c")}}
assert int(value["-c"]) == 2 * (int(value["-npp"]) + int(value["-ntg"]))
print("build: 1")
for pl in value["-npl"].split(","):
  speed = int(pl) * (5.0 if "--no-repack" in words else 4.0)
  print(json.dumps(dict(pp=int(value["-npp"]), tg=int(value["-ntg"]), pl=int(pl), speed_tg=speed)))
"""


def program(path: Path, text: str) -> str:
  """A stand-in for one of llama.cpp's programs, which speaks as its source prints."""
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return str(path)


@native
def test_both_sides_are_measured_in_turn(tmp_path: Path) -> None:
  text = LLAMA_BENCH.format(python=sys.executable, repack=True)
  config = bench_vs_llamacpp.Config(
    model=str(write(tmp_path / "small.gguf", ModelSpec(layers=1))),
    llama_bench=program(tmp_path / "llama-bench", text),
    llama_batched_bench=program(tmp_path / "batched", BATCHED.format(python=sys.executable)),
    reps=1, pp=16, tg=4, depth=(0, 8), batch=(1, 2), batch_depth=8, threads=1, probe_mib=8,
  )  # fmt: skip
  *_, records = bench_vs_llamacpp.run(config)
  turns = list(dict.fromkeys((r["repetition"], r["batched"], r["side"]) for r in records))
  names = ["q4jax", "llama.cpp repacked", "llama.cpp not repacked"]
  assert turns == [(0, batched, name) for batched in (False, True) for name in names]
  tests = ["pp16", "tg4", "pp16 @ d8", "tg4 @ d8"]
  batches = ["tg4 x 1 @ d8", "tg4 x 2 @ d8"]
  for name in names:
    assert [r["test"] for r in records if r["side"] == name] == tests + batches
  held = [r["peak_rss_bytes"] for r in records if r["side"] == names[1] and not r["batched"]]
  assert all(64 << 20 < bytes < 128 << 20 for bytes in held)
  rows = bench_vs_llamacpp.summary(records)
  assert rows[0] == ["test", "side", "result", "of default", "of best"]
  found = {(row[0], row[1]): row[2:] for row in rows}
  assert [found["pp16 @ d8", name][0] for name in names[1:]] == ["18.00", "28.00"]
  ours, default, best = map(float, found["tg4 x 2 @ d8", "q4jax"])
  assert best == pytest.approx(ours / 10, abs=0.01) and default >= best
  assert found["tg4 x 2 @ d8", names[1]][1:] == ["", ""]
  least = min(float(found["peak memory, MiB", name][0]) for name in names[1:])
  memory = found["peak memory, MiB", "q4jax"]
  assert float(memory[2]) == pytest.approx(float(memory[0]) / least, rel=0.02)
  assert markdown(rows).count("\n") == len(rows)


def test_compressed_caches_are_sides_of_their_own(tmp_path: Path) -> None:
  text = LLAMA_BENCH.format(python=sys.executable, repack=True)
  config = bench_vs_llamacpp.Config(
    model="tiny", llama_bench=program(tmp_path / "llama-bench", text), threads=2, batch=(),
    kv="--kv_bits=4;--kv_bits=4 --keep=0.6", cache_types=("f16", "q4_0"),
  )  # fmt: skip
  sides = {side.name: side.command for side in bench_vs_llamacpp.sides(config)}
  assert list(sides) == [
    "q4jax", "q4jax --kv_bits=4", "q4jax --kv_bits=4 --keep=0.6",
    "llama.cpp repacked", "llama.cpp repacked q4_0",
    "llama.cpp not repacked", "llama.cpp not repacked q4_0",
  ]  # fmt: skip
  assert sides["q4jax --kv_bits=4 --keep=0.6"][-2:] == ["--kv_bits=4", "--keep=0.6"]
  assert sides["llama.cpp repacked q4_0"][-6:] == ["-ctk", "q4_0", "-ctv", "q4_0", "-fa", "1"]
  assert "-ctk" not in sides["llama.cpp repacked"]


def test_an_older_llama_bench_has_one_side_and_a_failing_one_is_said(tmp_path: Path) -> None:
  text = LLAMA_BENCH.format(python=sys.executable, repack=False)
  old = program(tmp_path / "llama-bench", text)
  config = bench_vs_llamacpp.Config(model="tiny", llama_bench=old, threads=2)
  assert [side.name for side in bench_vs_llamacpp.sides(config)] == ["q4jax", "llama.cpp"]
  with pytest.raises(RuntimeError, match="what\\?"):
    bench_vs_llamacpp.measure(bench_vs_llamacpp.sides(config)[1].command)
  assert math.isnan(bench_vs_llamacpp._median([], "tokens_per_s"))
