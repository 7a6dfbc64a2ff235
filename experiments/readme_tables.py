r"""Tables of README.md and docs/, written from committed records.

  python -m experiments.readme_tables            # writes them
  python -m experiments.readme_tables --check    # exit status 1, and which, where one has drifted

A table stands between two comments, the first of which says whose it is, and of which records:

  <!-- table kv_quality experiments/results/kv_quality_tiny.json -->
  <!-- end -->

A file of records is JSON with `records`, or the JSON lines of experiments/reproduce.py. The name
`claims` takes a folder of such lines, and gives what was claimed beside what was measured; `claims`
and further words, only of these experiments.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import experiment
from experiments.provenance import markdown
from q4jax.errors import ConfigError

ROOT = Path(__file__).parents[1]
_MARK = "<!-- table "  # At the beginning of a line; elsewhere it is only spoken of.
_TABLE = re.compile(rf"^({_MARK}([^\n]+?) -->\n).*?^(<!-- end -->)", re.DOTALL | re.MULTILINE)


def written(text: str, root: Path = ROOT) -> str:
  """The text with all its tables as the records say.

  Raises:
    ConfigError: a marker names no experiment or records, or is not ended.
  """
  if len(re.findall(f"^{_MARK}", text, re.MULTILINE)) != len(_TABLE.findall(text)):
    raise ConfigError("a line '<!-- table ... -->' has no '<!-- end -->' behind it; add one.")
  return _TABLE.sub(lambda m: f"{m[1]}\n{_table(m[2].split(), root)}\n\n{m[3]}", text)


def records(path: Path) -> list[dict[str, Any]]:
  """The records of a file of either kind; ConfigError without it."""
  if not path.is_file():
    raise ConfigError(f"{path} is not there; name a file of records from the repository's root.")
  if path.suffix == ".jsonl":
    return [json.loads(line)["record"] for line in path.read_text().splitlines()]
  return json.loads(path.read_text())["records"]


def _table(words: list[str], root: Path) -> str:
  if len(words) < 2:
    raise ConfigError(f"'<!-- table {' '.join(words)} -->' names no records after the experiment.")
  name, where, *only = words
  if name != "claims":
    return markdown(experiment.load(name).table(records(root / where)))
  rows = []
  for each in only or experiment.NAMES:
    module = experiment.load(each)
    if module.CLAIMS and (only or (root / where / f"{each}.jsonl").is_file()):
      rows += [claim.row(found) for found in [records(root / where / f"{each}.jsonl")]
               for claim in module.CLAIMS]  # fmt: skip
  return markdown(experiment.claims_table(rows))


def main(_: list[str]) -> None:
  drifted = []
  for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
    text = path.read_text()
    try:
      new = written(text)
    except ConfigError as error:
      raise app.UsageError(f"{path.relative_to(ROOT)}: {error}") from error
    if new != text:
      drifted.append(str(path.relative_to(ROOT)))
      if not flags.FLAGS.check:
        path.write_text(new)
  if drifted and flags.FLAGS.check:
    print(
      f"not what the records say: {', '.join(drifted)}; run python -m experiments.readme_tables.",
      file=sys.stderr,
    )
    sys.exit(1)
  print(f"{'written' if drifted else 'up to date'}: {', '.join(drifted) or 'all tables'}")


if __name__ == "__main__":
  flags.DEFINE_bool("check", False, "Only say whether the tables are what the records say.")
  app.run(main)
