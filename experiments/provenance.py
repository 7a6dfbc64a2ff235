"""What a record of a measurement must name: where, when, with which versions and command."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.tiny import checkpoint


def provenance() -> dict[str, Any]:
  """Processor, versions, commit (None outside a checkout), command line and time (UTC)."""
  return {
    "device": _processor(),
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
    "commit": _commit(),
    "command": " ".join(sys.argv),
    "time": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
  }


def _processor() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor() or platform.machine()
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return f"{names[0]}, {len(names)} CPUs" if names else platform.machine()


def _commit() -> str | None:
  """The commit's hash, with "+" where files differ from it."""
  git = ["git", "-C", str(Path(__file__).parent)]
  try:
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run(
      [*git, "status", "--porcelain", "--untracked-files=no"],
      capture_output=True, text=True, check=True,
    )  # fmt: skip
  except (OSError, subprocess.CalledProcessError):
    return None
  return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def save(path: str | Path, config: Any, records: list[dict[str, Any]]) -> None:
  """Writes what was measured, and how (`config` is a dataclass), as JSON, in one step."""
  whole = {**provenance(), "config": dataclasses.asdict(config), "records": records}
  checkpoint.write_atomic(Path(path), (json.dumps(whole, indent=1) + "\n").encode())


def markdown(rows: list[list[str]]) -> str:
  """A Markdown table; the first row is its head."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + " |"
    for row in rows
  ]
  rule = "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"
  return "\n".join([lines[0], rule, *lines[1:]])
