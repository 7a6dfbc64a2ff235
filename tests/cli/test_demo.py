"""`demo`, with a stand-in for the model and the figures that come with q4jax."""

import json
from pathlib import Path

import pytest

from q4jax.cli import demo
from q4jax.formats import hub

from .conftest import Run

REPORT = {
  "params": 3_000_000,
  "bytes_f16": 6_100_000,
  "bytes_q4_k_m": 2_000_000,
  "held_out_bits_per_byte_f16": 1.25,
  "held_out_bits_per_byte_q4_k_m": 1.3125,
  "xz_bits_per_byte": 2.5,
  "perplexity_f16": 9.5,
}


@pytest.fixture(autouse=True)
def tiny(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(hub.ALIASES, "tiny", str(model_file))


def test_writes_and_reports(q4jax: Run, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(demo, "read_report", lambda: REPORT)
  result = q4jax("demo", "--prompt=a cat", "--max_tokens=12")
  assert result.code == 0 and result.out.startswith("a cat")
  assert "3,000,000 weights; xz needs 2.500 bits per byte" in result.out
  rows = {line[:26].strip(): line[26:].split() for line in result.out.splitlines()}
  assert rows["bytes"] == ["6,100,000", "2,000,000"]
  assert rows["perplexity, held-out text"] == ["9.500", "-"]  # One was not recorded.
  assert rows["bits per byte, same text"] == ["1.2500", "1.3125"]
  assert "what to try next" in result.out and "tok/s" in result.err


def test_json(q4jax: Run, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(demo, "read_report", lambda: None)
  row = json.loads(q4jax("demo", "--prompt=a cat", "--max_tokens=12", "--json").out)
  assert row["report"] is None and row["text"] and row["timing"]["decoded_tokens"] == 11
  assert "No figures are recorded" in q4jax("demo", "--max_tokens=1").out
