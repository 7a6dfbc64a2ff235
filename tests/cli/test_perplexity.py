"""`perplexity` prints llama-perplexity's figures (recorded in the shared golden.json)."""

import json
from pathlib import Path

import pytest

from shared_data import shared

from .conftest import CONTEXT, Run


def test_agrees_with_llama_cpp(q4jax: Run) -> None:
  golden = json.loads(shared("golden.json").read_text())["perplexity"]
  row = next(r for r in golden if r["model"] == "stories260K-Q8_0.gguf")
  result = q4jax(
    "perplexity",
    shared(f"models/{row['model']}"),
    f"--file={shared('texts/tinystories_eval_a.txt')}",
    f"--ctx={row['ctx']}",
    f"--chunks={row['chunks']}",
    "--json",
  )
  found = json.loads(result.out)
  assert result.code == 0 and result.err == ""
  assert found["ppl"] == pytest.approx(row["ppl"], rel=0.003)
  assert found["stderr"] == pytest.approx(row["stderr"], rel=0.02)
  assert found["chunks"] == row["chunks"] and found["ctx"] == row["ctx"]
  assert found["tokens"] == row["chunks"] * (row["ctx"] // 2 - 1)


def test_line_for_people(q4jax: Run, model_file: Path, tmp_path: Path) -> None:
  (tmp_path / "text").write_text("abc " * 40)
  flags = (f"--file={tmp_path}/text", "--ctx=32")
  row = json.loads(q4jax("perplexity", model_file, *flags, "--json", "--batch=2").out)
  result = q4jax("perplexity", model_file, *flags)
  assert row["chunks"] == 7 and row["ppl"] > 1
  words = result.out.split()
  assert words[0] == "perplexity" and float(words[1]) == pytest.approx(row["ppl"], rel=1e-3)
  assert "7 chunks of 32 tokens" in result.err


@pytest.mark.parametrize(
  ("flags", "said"),
  [(("--ctx=512",), "at least 1024"), ((f"--ctx={CONTEXT + 1}",), "ctx"), (("--ctx=2",), "ctx")],
)
def test_errors(
  q4jax: Run, model_file: Path, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
  (tmp_path / "text").write_text("abc " * 40)
  result = q4jax("perplexity", model_file, f"--file={tmp_path}/text", *flags)
  assert result.code == 1 and result.out == "" and said in result.err
