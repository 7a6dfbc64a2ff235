"""The frame of all tables: what is kept, what goes on after a kill, what a failure does."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments import experiment, inputs, report, reproduce
from experiments.experiment import Claim, each, key
from experiments.intervals import bootstrap
from q4jax.errors import ConfigError, MissingDependencyError


@dataclasses.dataclass(frozen=True)
class Config:
  numbers: tuple[int, ...] = (1, 2, 3)
  out: str = ""


def two_squared(records: list[dict[str, Any]]) -> float | None:
  return next((r["square"] for r in records if r["n"] == 2), None)


def small(**changes: Any) -> Any:
  """An experiment that squares numbers, and counts its runs."""
  done: list[int] = []

  def run(config: Config) -> list[dict[str, Any]]:
    done.extend(config.numbers)
    return [{"n": n, "square": n * n, "parts": [n, n]} for n in config.numbers]

  def plot(records: list[dict[str, Any]], path: str) -> None:
    Path(path).write_bytes(b"\x89PNG" + bytes(len(records)))

  members = {
    "__doc__": "Squares <of> numbers.\n\n  the command & more", "Config": Config, "run": run,
    "table": lambda records: [["n", "square"]] + [[str(r["n"]), str(r["square"])] for r in records],
    "plot": plot, "VERSION": 1, "quick": lambda: each(Config(), "numbers"),
    "full": lambda: [Config((7,))], "done": done,
    "CLAIMS": (Claim("two squared", 5.0, "", "by hand", two_squared, "no"),),
  }  # fmt: skip
  return SimpleNamespace(**(members | changes))


def test_records_are_kept_and_written(tmp_path: Path) -> None:
  one = small()
  (result,) = reproduce.reproduce({"small": one}, "quick", tmp_path)
  assert one.done == [1, 2, 3] and (result.cached, result.errors) == (0, [])
  assert len(list((tmp_path / "cache").glob("small-*.json"))) == 3
  before = (tmp_path / "small.jsonl").read_text()
  lines = [json.loads(line) for line in before.splitlines()]
  assert [line["record"]["square"] for line in lines] == [1, 4, 9]
  assert lines[1]["config"] == {"numbers": [2], "out": ""} and lines[1]["experiment"] == "small"
  assert {"commit", "device", "jax", "time"} <= set(lines[0])
  rows = list(csv.DictReader((tmp_path / "small.csv").open()))
  assert rows[2] == {"n": "3", "square": "9", "parts": "[3, 3]"}
  assert "| 3 |      9 |" in (tmp_path / "small.md").read_text()
  (again,) = reproduce.reproduce({"small": one}, "quick", tmp_path)
  assert one.done == [1, 2, 3] and again.cached == 3
  assert (tmp_path / "small.jsonl").read_text() == before
  (_,) = reproduce.reproduce({"small": one}, "quick", tmp_path, fresh=True)
  assert one.done == [1, 2, 3] * 2
  reproduce.reproduce({"small": one}, "full", tmp_path)
  assert one.done[6:] == [7]


def test_a_failure_is_reported_and_stops_nobody(tmp_path: Path) -> None:
  def run(config: Config) -> list[dict[str, Any]]:
    if config.numbers == (2,):
      raise ZeroDivisionError("two is <too> much")
    return [{"n": config.numbers[0], "square": 0}]

  bad, good, ugly = small(run=run, CLAIMS=()), small(), small(quick=lambda: 1 / 0)
  results = reproduce.reproduce({"bad": bad, "ugly": ugly, "good": good}, "quick", tmp_path)
  assert [len(r.errors) for r in results] == [1, 1, 0]
  assert [len(r.records) for r in results] == [2, 0, 3]
  html = (tmp_path / "report.html").read_text()
  assert "two is &lt;too&gt; much" in html and html.count("<strong>failed</strong>") == 2
  assert "ZeroDivisionError" in (tmp_path / "report.md").read_text()
  assert (tmp_path / "good.csv").exists() and not (tmp_path / "ugly.csv").exists()


class Balanced(HTMLParser):
  """Fails where a tag closes another than the innermost."""

  def __init__(self) -> None:
    super().__init__()
    self.open: list[str] = []
    self.seen: list[str] = []

  def handle_starttag(self, tag: str, attrs: Any) -> None:
    self.open.append(tag)
    self.seen.append(tag)

  def handle_startendtag(self, tag: str, attrs: Any) -> None:
    self.seen.append(tag)

  def handle_endtag(self, tag: str) -> None:
    assert self.open.pop() == tag


def test_the_report_is_one_whole_page(tmp_path: Path) -> None:
  reproduce.reproduce({"small": small()}, "quick", tmp_path)
  html = (tmp_path / "report.html").read_text()
  page = Balanced()
  page.feed(html)
  page.close()
  assert not page.open and page.seen.count("table") == 2 and page.seen.count("img") == 1
  assert 'src="data:image/png;base64,iVBORw' in html or "base64,iVBO" in html
  assert "Squares &lt;of&gt; numbers." in html and "http" not in html.replace("http://www.w3", "")
  assert "<td>two squared</td><td>5</td><td>4</td><td>0.80</td><td>by hand</td><td>no</td>" in html


def test_without_matplotlib_there_is_no_plot_but_all_else(tmp_path: Path) -> None:
  def plot(records: list[dict[str, Any]], path: str) -> None:
    raise MissingDependencyError("plots need matplotlib")

  reproduce.reproduce({"small": small()}, "quick", tmp_path)
  (result,) = reproduce.reproduce({"small": small(plot=plot)}, "quick", tmp_path)
  assert not result.errors and result.notes and not (tmp_path / "small.png").exists()
  assert "plots need matplotlib" in (tmp_path / "report.html").read_text()


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_reproduce import Config, small
from experiments import reproduce
def run(config):
  with open({log!r}, "a") as log:
    log.write(str(config.numbers[0]))
  if config.numbers == (2,) and {wait}:
    time.sleep(60)
  return [{{"n": n, "square": n * n}} for n in config.numbers]
if __name__ == "__main__":
  results = reproduce.reproduce({{"small": small(run=run)}}, "quick", Path({out!r}))
  print(results[0].cached)
"""


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
  log, out = tmp_path / "log", tmp_path / "out"
  log.touch()

  def code(wait: bool) -> list[str]:
    text = SLOW.format(tests=str(Path(__file__).parent), log=str(log), out=str(out), wait=wait)
    return [sys.executable, "-c", text]

  environment = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))}
  running = subprocess.Popen(code(True), env=environment, stderr=subprocess.DEVNULL)
  try:
    for _ in range(600):
      if log.read_text() == "12":
        break
      assert running.poll() is None
      time.sleep(0.1)
  finally:
    running.send_signal(signal.SIGKILL)
    running.wait()
  assert log.read_text() == "12" and not (out / "report.html").exists()
  done = subprocess.run(code(False), env=environment, capture_output=True, text=True, check=True)
  assert log.read_text() == "1223" and done.stdout == "1\n"
  assert len((out / "small.jsonl").read_text().splitlines()) == 3


def test_the_key_names_all_that_matters(tmp_path: Path) -> None:
  @dataclasses.dataclass(frozen=True)
  class OfText(Config):
    text: str = ""

  first = key("a", 1, Config())
  assert first == key("a", 1, Config(out="elsewhere")) and len(first) == 16
  others = [key("b", 1, Config()), key("a", 2, Config()), key("a", 1, Config((1,)))]
  text = tmp_path / "text"
  for content in ("one", "two"):
    text.write_text(content)
    inputs.digest.cache_clear()
    others.append(key("a", 1, OfText(text=str(text))))
  assert len({first, *others}) == 6


def test_each_is_every_combination() -> None:
  @dataclasses.dataclass(frozen=True)
  class Two:
    a: tuple[int, ...] = (1, 2)
    b: tuple[str, ...] = ("x", "y")

  assert each(Two(), "a", "b") == [
    Two((a,), (b,)) for a in (1, 2) for b in ("x", "y")
  ]  # fmt: skip


def test_a_claim_without_its_records_says_so() -> None:
  claim = Claim("speed", 2.0, "x", "somehow", lambda records: None, "why")
  row = claim.row([])
  assert row["measured"] is None and row["ratio"] is None
  assert experiment.claims_table([row])[1] == ["speed", "2 x", "not here", "", "somehow", "why"]


def test_bootstrap_covers_as_often_as_it_says() -> None:
  rng = np.random.default_rng(0)
  inside = 0
  for i in range(200):
    low, high = bootstrap(rng.normal(3, 2, 40).tolist(), resamples=400, seed=i)
    inside += low < 3 < high
  assert 0.88 < inside / 200 < 0.99
  assert np.isnan(bootstrap([1.0])).all()


def test_names_that_are_no_experiment() -> None:
  with pytest.raises(ConfigError, match="'nosuch' is no experiment; there are quant_error"):
    experiment.load("nosuch")
  with pytest.raises(ConfigError, match="--only: x, y is no experiment"):
    reproduce._load(["x", "sinks", "y"])


@pytest.mark.parametrize("name", experiment.NAMES)
def test_every_experiment_has_the_shape(name: str) -> None:
  module = experiment.load(name)
  assert module.__doc__ and f"python -m experiments.{name}" in module.__doc__
  for configs in (module.quick(), module.full()):
    assert configs and all(isinstance(config, module.Config) for config in configs)
    assert len({key(name, module.VERSION, config) for config in configs}) == len(configs)
  assert all(claim.claimed for claim in module.CLAIMS)
  assert report.FROM[0] == "experiment"
