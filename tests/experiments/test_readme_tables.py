"""Tables of the documentation are what the committed records say."""

import json
from pathlib import Path

import pytest

from experiments import readme_tables
from experiments.readme_tables import ROOT, written
from q4jax.errors import ConfigError

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECORD = {
  "row": "int8", "bits": 9.0, "keep_ratio": 1.0, "compression": 2.0, "ppl": 3.0, "ratio": 1.01,
  "ratio_stderr": 0.001, "kl": 0.1, "top1": 0.9,
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_table_has_drifted(page: Path) -> None:
  text = page.read_text()
  assert written(text) == text, "run python -m experiments.readme_tables"


def test_some_table_is_checked() -> None:
  assert sum(page.read_text().count("<!-- table ") for page in PAGES) > 1


def test_a_table_is_written_between_its_marks(tmp_path: Path) -> None:
  (tmp_path / "r.json").write_text(json.dumps({"records": [RECORD]}))
  (tmp_path / "r.jsonl").write_text(json.dumps({"record": RECORD}) + "\n")
  for name in ("r.json", "r.jsonl"):
    text = f"before\n<!-- table kv_quality {name} -->\nold\n<!-- end -->\nafter\n"
    new = written(text, tmp_path)
    assert "old" not in new and "int8 | 9.00 |" in new and "+1.00 % ± 0.10" in new
    assert new.startswith("before\n<!-- table") and new.endswith("\n\n<!-- end -->\nafter\n")
    assert written(new, tmp_path) == new
  spoken_of = "between `<!-- table x -->` and its end"
  assert written(spoken_of, tmp_path) == spoken_of


@pytest.mark.parametrize(
  ("mark", "message"),
  [
    ("<!-- table kv_quality no.json -->\n<!-- end -->", "no.json is not there"),
    ("<!-- table nosuch r.json -->\n<!-- end -->", "'nosuch' is no experiment"),
    ("<!-- table kv_quality -->\n<!-- end -->", "names no records"),
    ("<!-- table kv_quality r.json -->\n", "has no '<!-- end -->'"),
  ],
)
def test_marks_that_mean_nothing(tmp_path: Path, mark: str, message: str) -> None:
  (tmp_path / "r.json").write_text(json.dumps({"records": [RECORD]}))
  with pytest.raises(ConfigError, match=message):
    written(mark, tmp_path)


def test_claims_of_a_folder(tmp_path: Path) -> None:
  found = [
    {"method": "rtn", "bits": bits, "group": "32", "rule": "absmax", "relative": error}
    for bits, error in ((8, 0.006), (4, 0.116))
  ]
  lines = "".join(json.dumps({"record": r}) + "\n" for r in found)
  (tmp_path / "quant_error.jsonl").write_text(lines)
  new = written("<!-- table claims . -->\n<!-- end -->", tmp_path)
  assert "5.8 %" in new and "11.6 %" in new and "2.00" in new and "0.6 %" in new
  assert readme_tables.records(tmp_path / "quant_error.jsonl") == found
