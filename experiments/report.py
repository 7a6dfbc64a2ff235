"""What experiments/reproduce.py writes: files of each experiment, and one report of all."""

import base64
import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jinja2

from experiments import experiment
from experiments.experiment import Experiment
from experiments.provenance import provenance
from experiments.tiny.checkpoint import write_atomic
from q4jax.errors import MissingDependencyError

# Where records are from; of each line of JSON.
FROM = ("experiment", "key", "commit", "device", "python", "jax", "jaxlib", "numpy", "time")


@dataclasses.dataclass
class Result:
  """What came of an experiment.

  Attributes:
    runs: of each config, what its cache file holds: config, records, seconds, provenance.
    errors: what failed, with where.
    notes: what is missing though nothing failed.
    rows, claims: the table, and the claims beside what was measured, once they are written.
    cached: configs whose records were there already.
  """

  name: str
  experiment: Experiment | None
  runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  errors: list[str] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)
  rows: list[list[str]] = dataclasses.field(default_factory=list)
  claims: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  cached: int = 0

  @property
  def records(self) -> list[dict[str, Any]]:
    return [record for run in self.runs for record in run["records"]]


def write_tables(result: Result, out: Path) -> None:
  """NAME.jsonl, .csv, .md and, with matplotlib, .png of the records."""
  if not result.runs or result.experiment is None:
    return
  out.mkdir(parents=True, exist_ok=True)
  path = out / result.name
  write_atomic(path.with_suffix(".jsonl"), "".join(lines(result)).encode())
  write_atomic(path.with_suffix(".csv"), _csv(result.records).encode())
  text = experiment.text(result.experiment, result.records)
  write_atomic(path.with_suffix(".md"), text.encode())
  result.rows = result.experiment.table(result.records)
  claims = [claim.row(result.records) for claim in result.experiment.CLAIMS]
  result.claims = [row for row in claims if row["measured"] is not None]
  try:
    result.experiment.plot(result.records, str(path.with_suffix(".png")))
  except MissingDependencyError as error:
    path.with_suffix(".png").unlink(missing_ok=True)  # Of an earlier run, and other records.
    result.notes.append(f"no plot: {error}")


def lines(result: Result) -> list[str]:
  """A line of JSON for each record."""
  return [
    json.dumps({name: run.get(name) for name in FROM} | {"config": run["config"], "record": record})
    + "\n"
    for run in result.runs
    for record in run["records"]
  ]


def _csv(records: list[dict[str, Any]]) -> str:
  columns = list(dict.fromkeys(name for record in records for name in record))
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator="\n")
  writer.writeheader()
  for record in records:
    writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v
                     for k, v in record.items()})  # fmt: skip
  return text.getvalue()


def write(results: list[Result], out: Path, level: str, seconds: float) -> None:
  """report.html and report.md."""
  sections = [_section(result, out) for result in results]
  claims = [row for result in results for row in result.claims]
  about = {**provenance(), "level": level, "seconds": f"{seconds:.1f}"}
  about["commit"] = _commit(about["commit"])
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
  )
  html = environment.get_template("report.html.jinja").render(
    about=about,
    sections=sections,
    claims=experiment.claims_table(claims) if claims else [],
    packages=("python", "jax", "jaxlib", "numpy"),
  )
  write_atomic(out / "report.html", html.encode())
  parts = [f"# Reproduced: {level}\n", *(f"- {name}: {about[name]}" for name in about)]
  for section in sections:
    parts += [f"\n## {section['name']}\n", section["title"] + "\n"]
    parts += [f"```\n{error.strip()}\n```\n" for error in section["errors"]]
    parts += [f"{note}\n" for note in section["notes"]]
    if section["rows"]:
      path = out / f"{section['name']}.md"
      parts.append(path.read_text())
  write_atomic(out / "report.md", ("\n".join(parts).rstrip() + "\n").encode())


def _section(result: Result, out: Path) -> dict[str, Any]:
  """What the template needs of an experiment."""
  title, _, rest = ((result.experiment and result.experiment.__doc__) or "").partition("\n")
  plot = out / f"{result.name}.png"
  sources = [(_commit(run["commit"]), run["device"], run["jax"]) for run in result.runs]
  return {
    "name": result.name,
    "title": title,
    "text": rest.strip("\n"),
    "errors": result.errors,
    "notes": result.notes,
    "rows": result.rows,
    "plot": base64.b64encode(plot.read_bytes()).decode() if result.rows and plot.exists() else "",
    "sources": sorted(set(sources)),
    "seconds": sum(run["seconds"] for run in result.runs),
    "runs": len(result.runs),
    "cached": result.cached,
  }


def _commit(commit: str | None) -> str:
  """A commit in words: provenance marks one whose files were changed with a +."""
  if commit is None:
    return "outside a checkout"
  return f"{commit[:12]}, dirty" if commit.endswith("+") else commit[:12]
