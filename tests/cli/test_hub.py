"""`hf://` models from a hub on loopback; in children: huggingface_hub reads its settings once."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest

from .conftest import Result, add_vocabulary, finish, finished, start
from .hub_stand_in import Hub, serve

Fetch = Callable[..., Result]


@pytest.fixture
def hub(vocabulary_file: Path) -> Iterator[Hub]:
  data = vocabulary_file.read_bytes()
  with serve(Hub(files={"org/repo/sub/model.gguf": data, "secret/repo/model.gguf": data})) as hub:
    yield hub


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Fetch:
  """Tokenises with a model of the hub."""

  def run(name: str, **environment: str) -> Result:
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "", **environment}
    return finished(start("tokenize", name, "--text=a", "--json", env=env))

  return run


def gets(hub: Hub) -> int:
  return sum(method == "GET" and "/resolve/" in path for method, path in hub.requests)


def test_downloads_once_and_works_offline(hub: Hub, fetch: Fetch) -> None:
  result = fetch("hf://org/repo/sub/model.gguf")
  assert result.code == 0 and result.err == "" and '"ids": [1, 100]' in result.out
  assert gets(hub) == 1
  assert fetch("hf://org/repo/sub/model.gguf").out == result.out
  assert gets(hub) == 1
  seen = len(hub.requests)
  assert fetch("hf://org/repo/sub/model.gguf", HF_HUB_OFFLINE="1").out == result.out
  assert len(hub.requests) == seen


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("hf://org/repo/other.gguf", "org/repo has no such file"),
    ("hf://org/nothing/model.gguf", "no repository org/nothing"),
    ("hf://secret/repo/model.gguf", "HF_TOKEN"),
    ("hf://repo/model.gguf", "no hub address"),
    ("hf://org/repo/model.safetensors", "no hub address"),
    ("hf://org/repo//model.gguf", "no hub address"),
  ],
)
def test_refusals(fetch: Fetch, name: str, said: str) -> None:
  result = fetch(name)
  assert result.code == 1 and result.out == "" and said in result.err and name in result.err
  assert result.err.startswith("q4jax: error: ") and result.err.count("\n") == 1


def test_private_repository_with_a_token(hub: Hub, fetch: Fetch) -> None:
  assert fetch("hf://secret/repo/model.gguf", HF_TOKEN="hf_bad").code == 1
  assert fetch("hf://secret/repo/model.gguf", HF_TOKEN=hub.token).code == 0


def test_nothing_to_reach(fetch: Fetch) -> None:
  result = fetch("hf://org/repo/sub/model.gguf", HF_HUB_OFFLINE="1")
  assert result.code == 1 and "not in the cache" in result.err


def test_interrupted_download_leaves_nothing_broken(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
  hub.break_after = 100
  result = fetch("hf://org/repo/sub/model.gguf")
  assert result.code == 1 and result.out == ""
  assert result.err.splitlines()[-1].startswith("q4jax: error: 'hf://org/repo/sub/model.gguf'")
  assert "Traceback" not in result.err
  assert not list((tmp_path / "home").rglob("model.gguf"))
  hub.break_after = None
  begin = time.monotonic()
  assert fetch("hf://org/repo/sub/model.gguf").code == 0
  assert time.monotonic() - begin < 60


def test_any_shard_brings_all(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
  for i in range(2):
    path = tmp_path / "shard.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    if i == 0:
      add_vocabulary(writer)
    writer.add_uint16("split.no", i)
    writer.add_uint16("split.count", 2)
    writer.add_int32("split.tensors.count", 0)
    hub.files[f"org/repo/big-0000{i + 1}-of-00002.gguf"] = finish(writer, path).read_bytes()
  assert fetch("hf://org/repo/big-00002-of-00002.gguf").code == 0
  assert gets(hub) == 2
