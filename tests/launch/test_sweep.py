"""Sweeps run: retries, limits, what is done already, and that nothing outlives the command."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local_backend
from launch.local_backend import finished, record_path
from launch.trials import Sweep, Trial
from q4jax.errors import ConfigError

ROOT = Path(__file__).parents[2]
WRITE = 'import json; open(out, "w").write(json.dumps({"records": [1]}))'


@dataclasses.dataclass(frozen=True)
class Script(Trial):
  """Any Python code in place of an experiment; `out` is where its record goes."""

  code: str = ""

  def command(self, out, python="python"):
    return [python, "-c", f"out = {str(out)!r}\n{self.code}"]


def run(tmp_path, *codes, retries=0, timeout_s=0.0, workers=1):
  trials = [Script("x", {"n": str(i)}, f"hash{i}", code) for i, code in enumerate(codes)]
  heard = []
  sweep = Sweep("s", tuple(trials), ("n",), retries, timeout_s)
  results = local_backend.run(sweep, tmp_path, workers, heard.append)
  assert sorted(r.trial.hash for r in heard) == [t.hash for t in trials]
  assert [r.trial for r in results] == trials
  return results


def test_a_record_names_its_trial(tmp_path):
  [result] = run(tmp_path, WRITE)
  record = json.loads((tmp_path / "hash0" / "record.json").read_text())
  about = record.pop("trial")
  assert record == {"records": [1]} and about.pop("seconds") >= 0
  assert about == {
    "hash": "hash0", "experiment": "x", "flags": {"n": "0"}, "sweep": "s", "attempts": 1
  }  # fmt: skip
  assert (result.status, result.attempts) == ("done", 1)


def test_what_is_done_is_not_run_again(tmp_path):
  code = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n{WRITE}"
  run(tmp_path, code, code)
  [first, second] = run(tmp_path, code, code)
  assert first.status == second.status == "found"
  record_path(tmp_path, first.trial).write_text("{}")  # as a killed experiment may leave it
  assert [r.status for r in run(tmp_path, code, code)] == ["done", "found"]
  assert (tmp_path / "runs").read_text() == "xxx"


def test_retries(tmp_path):
  mark = str(tmp_path / "mark")
  flaky = f"import os\nif not os.path.exists({mark!r}): open({mark!r}, 'w'); raise SystemExit(7)\n"
  [flaky_result, hopeless] = run(tmp_path, flaky + WRITE, "print('w' + 'hy'); 1 / 0", retries=2)
  assert (flaky_result.status, flaky_result.attempts) == ("done", 2)
  assert (hopeless.status, hopeless.attempts) == ("failed", 3)
  log = hopeless.log.read_text()
  assert log.count("why") == log.count("ZeroDivisionError") == log.count("exit code 1") == 3
  assert "exit code 7" in flaky_result.log.read_text()


def test_no_record_is_a_failure(tmp_path):
  [result] = run(tmp_path, "pass")
  assert result.status == "failed" and "but no record" in result.log.read_text()


def test_a_limit_ends_children_too(tmp_path):
  code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(60)"""
  [result, after] = run(tmp_path, code, WRITE, timeout_s=1.0)
  assert (result.status, after.status) == ("timeout", "done")
  assert 1 <= result.seconds < 30 and "stopped after 1 s" in result.log.read_text()
  assert gone(int((tmp_path / "pid").read_text()))


def test_workers_run_side_by_side(tmp_path):
  # Each waits for the other's sign of life.
  wait = "import os, time, pathlib\nfolder = pathlib.Path(out).parent.parent\n"
  both = [
    f"{wait}(folder / '{mine}').touch()\n"
    f"while not (folder / '{other}').exists(): time.sleep(0.01)\n"
    for mine, other in (("a", "b"), ("b", "a"))
  ]
  results = run(tmp_path, *(code + WRITE for code in both), workers=2, timeout_s=30)
  assert [r.status for r in results] == ["done", "done"]


def test_an_error_here_leaves_no_process(tmp_path):
  pid = tmp_path / "pid"
  sleeps = f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
  trials = (Script("x", {}, "a", sleeps), Script("x", {}, "b", "1 / 0"))

  def report(_):
    until(lambda: pid.exists() and pid.read_text())
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    local_backend.run(Sweep("s", trials, (), 0, 0.0), tmp_path, 2, report)
  assert gone(int(pid.read_text()))


def test_one_sweep_a_folder(tmp_path):
  def report(_):
    with pytest.raises(ConfigError, match="another sweep writes to"):
      run(tmp_path, WRITE)

  trial = Script("x", {}, "a", WRITE)
  local_backend.run(Sweep("s", (trial,), (), 0, 0.0), tmp_path, 1, report)
  assert finished(tmp_path, trial) is not None


# The command itself, with a real experiment.

DESCRIPTION = """
experiment = "quant_error"
flags = {kquants = [], rows = 2, methods = "rtn", rules = "absmax", groups = "32"}
cross = {bits = %s}
"""


def start(description, *words):
  return subprocess.Popen(
    [sys.executable, "-m", "launch.sweep", str(description), *map(str, words)],
    cwd=ROOT, env={**os.environ, "PYTHONPATH": ".:kernels"},
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


@pytest.fixture
def description(tmp_path):
  path = tmp_path / "s.toml"
  path.write_text(DESCRIPTION % [4])
  return path


def test_the_command_runs_and_resumes(description, tmp_path):
  out = tmp_path / "out"
  process = start(description, f"--out={out}")
  stdout, stderr = process.communicate(timeout=120)
  assert process.returncode == 0, stderr
  [record] = [json.loads(path.read_text()) for path in out.glob("*/record.json")]
  assert record["config"]["bits"] == [4] and record["trial"]["flags"]["bits"] == "4"
  assert record["trial"]["hash"] in stdout and "done" in stdout

  # A wrong value fails in the experiment; its sweep goes on, and shows why.
  description.write_text(DESCRIPTION % [9, 4])
  process = start(description, f"--out={out}")
  stdout, stderr = process.communicate(timeout=120)
  assert process.returncode == 1
  assert "found" in stdout and "failed" in stdout
  assert "bits=9 is not a grid's" in stderr and "1 of 2 trials done" in stderr


def test_dry_run_runs_nothing(description, tmp_path):
  out = tmp_path / "out"
  process = start(description, f"--out={out}", "--dry_run")
  stdout, stderr = process.communicate(timeout=60)
  assert process.returncode == 0, stderr
  [line] = stdout.splitlines()
  assert line.startswith("python -m experiments.quant_error --kquants= --rows=2 --methods=rtn ")
  assert "1 of 1 trials to run" in stderr and not out.exists()


def test_wrong_flags_start_nothing(description, tmp_path):
  description.write_text(description.read_text().replace("rows", "row"))
  out = tmp_path / "out"
  process = start(description, f"--out={out}")
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 2 and not out.exists()
  assert "has no flag 'row'; nearest: rows" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(description, tmp_path, number, code):
  description.write_text(DESCRIPTION.replace("rows = 2", "rows = 0") % [4, 5, 6])
  out = tmp_path / "out"
  process = start(description, f"--out={out}", "--workers=2")
  until(lambda: len(of(out)) == 2)
  process.send_signal(number)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == code and "Traceback" not in stderr
  assert not of(out) and not list(out.glob("*/record.json"))


def of(folder):
  """Processes whose command line names the folder as the place of a record."""
  found = []
  for path in Path("/proc").glob("[0-9]*/cmdline"):
    try:
      words = path.read_bytes().decode(errors="replace").split("\0")
    except OSError:
      continue
    if any(word.startswith(f"--out={folder}/") for word in words):
      found.append(path)
  return found


def gone(pid):
  """Whether a process has ended; one that nobody has waited for counts as ended."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
  except OSError:
    return True


def until(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)
