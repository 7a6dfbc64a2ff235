"""Programs that one start compiled, the next finds; and where they are kept."""

from pathlib import Path

import pytest

from q4jax.cli import compile_cache

from .conftest import Result, Run, finished, start

LINE = ("--prompt=abc", "--max_tokens=3", "--temperature=0")


def generate(model: Path, env: dict[str, str], *flags: str) -> Result:
  result = finished(start("generate", model, *LINE, *flags, env=env))
  assert result.code == 0, result.err
  return result


def programs(folder: Path) -> set[str]:
  return {path.name for path in folder.rglob("*-cache")}


def test_the_second_start_compiles_nothing(model_file: Path, tmp_path: Path) -> None:
  env = {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path)}
  # Everything is worth keeping, however quickly it compiled.
  env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  first = generate(model_file, env)
  kept = programs(tmp_path / "q4jax" / "programs")
  assert kept  # of prefill and decode at least
  second = generate(model_file, {**env, "JAX_LOG_COMPILES": "1"})
  assert second.out == first.out
  assert "Persistent compilation cache hit for 'jit_call'" in second.err
  assert programs(tmp_path) == kept


def test_a_named_directory_and_none(model_file: Path, tmp_path: Path) -> None:
  env = {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "other")}
  generate(model_file, env, f"--compile_cache={tmp_path / 'mine'}")
  assert programs(tmp_path / "mine") and not programs(tmp_path / "other")
  generate(model_file, env, "--compile_cache=none")
  assert not programs(tmp_path / "other")


def test_a_directory_that_cannot_be(q4jax: Run, model_file: Path, tmp_path: Path) -> None:
  (tmp_path / "file").write_text("in the way")
  bad = tmp_path / "file" / "cache"
  result = q4jax("generate", model_file, *LINE, f"--compile_cache={bad}")
  assert result.code == 1 and f"--compile_cache={bad}" in result.err


def test_the_default_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  (tmp_path / "file").write_text("in the way")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  with pytest.warns(UserWarning, match="--compile_cache"):
    compile_cache.use(None)


def test_each_processor_has_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  here = compile_cache.default()
  read = Path.read_text

  def other(path: Path, *args: str) -> str:
    text = read(path, *args)
    return text.replace("fpu", "fpu avx10") if str(path) == "/proc/cpuinfo" else text

  monkeypatch.setattr(Path, "read_text", other)
  assert here and here.is_relative_to(tmp_path) and compile_cache.default() != here
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  assert compile_cache.default() is None
