"""`tokenize` both ways."""

import json
import subprocess
from pathlib import Path

from .conftest import Run, finished, start


def test_there_and_back(q4jax: Run, vocabulary_file: Path) -> None:
  result = q4jax("tokenize", vocabulary_file, "--text=héllo", "--json")
  row = json.loads(result.out)
  assert row["ids"] == [1] + [3 + byte for byte in "héllo".encode()]
  assert row["pieces"][:2] == ["<s>", "<0x68>"] and row["count"] == 7 and row["text"] == "héllo"
  ids = ",".join(map(str, row["ids"]))
  assert q4jax("tokenize", vocabulary_file, f"--ids={ids}").out == "héllo\n"
  shown = q4jax("tokenize", vocabulary_file, f"--ids={ids}", "--show_special")
  assert shown.out == "<s>héllo\n"


def test_lines_for_people(q4jax: Run, vocabulary_file: Path) -> None:
  result = q4jax("tokenize", vocabulary_file, "--text=ab")
  assert [line.split() for line in result.out.splitlines()] == [
    ["1", "'<s>'"],
    ["100", "'<0x61>'"],
    ["101", "'<0x62>'"],
  ]
  assert result.err == "3 tokens\n"


def test_special_tokens(q4jax: Run, vocabulary_file: Path) -> None:
  def ids(*flags: str) -> list[int]:
    out: list[int] = json.loads(q4jax("tokenize", vocabulary_file, *flags, "--json").out)["ids"]
    return out

  assert ids("--text=</s>", "--noadd_special") == [3 + byte for byte in b"</s>"]
  assert ids("--text=</s>", "--noadd_special", "--parse_special") == [2]
  assert ids("--text=", "--noadd_special") == []
  assert ids("--text=") == [1]


def test_files_are_taken_as_they_are(q4jax: Run, vocabulary_file: Path, tmp_path: Path) -> None:
  (tmp_path / "text").write_bytes(b"a\r\nb\n")
  row = json.loads(q4jax("tokenize", vocabulary_file, "--json", f"--file={tmp_path}/text").out)
  assert row["ids"] == [1] + [3 + byte for byte in b"a\r\nb\n"]
  child = start("tokenize", vocabulary_file, "--file=-", "--json", stdin=subprocess.PIPE)
  assert json.loads(finished(child, "xy").out)["ids"] == [1, 3 + ord("x"), 3 + ord("y")]


def test_errors(q4jax: Run, vocabulary_file: Path) -> None:
  result = q4jax("tokenize", vocabulary_file, "--ids=1,259")
  assert result.code == 1 and result.out == "" and "259" in result.err
  result = q4jax("tokenize", vocabulary_file, "--text=a", "--tokenizer=/none/tokenizer.json")
  assert result.code == 1 and "/none/tokenizer.json" in result.err
