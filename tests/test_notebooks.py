"""The notebooks: each .ipynb is what its .py says, without outputs, and each .py runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from colab import pairing

ROOT = Path(__file__).parents[1]
SOURCES = pairing.sources()
# Long work, made short.
CHANGED = {"qat_in_ten_minutes": {"STEPS = 60": "STEPS = 6", "chunks=16": "chunks=4"}}
by_name = pytest.mark.parametrize("source", SOURCES, ids=[path.stem for path in SOURCES])


def test_there_are_some():
  names = {"quickstart", "kv_explorer", "quantization_explorer", "qat_in_ten_minutes"}
  assert names | {"ablation_tables"} <= {path.stem for path in SOURCES}


@by_name
def test_pairs(source):
  pytest.importorskip("jupytext")
  assert source.with_suffix(".ipynb").read_text() == pairing.notebook(source), "run make notebooks"


@by_name
def test_no_outputs_and_the_same_cells(source):
  """By hand, so that it holds without jupytext too."""
  cells = json.loads(source.with_suffix(".ipynb").read_text())["cells"]
  code = [cell for cell in cells if cell["cell_type"] == "code"]
  assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
  lines = [line for cell in cells for line in "".join(cell["source"]).splitlines() if line.strip()]
  text = source.read_text()
  assert all(line in text for line in lines)
  assert sum(line.startswith("# %%") for line in text.splitlines()) == len(cells)


@by_name
def test_badge_and_install_cell(source):
  text = source.read_text()
  assert f"colab/{source.stem}.ipynb" in text.split("# %%")[1]
  # One cell for all: jax stays at the version that is there.
  install = text.split("# %%")[2]
  assert install == SOURCES[0].read_text().split("# %%")[2]
  assert 'find_spec("q4jax") is None' in install and "jax=={jax.__version__}" in install


@by_name
def test_runs_as_a_script(source, tmp_path):
  pytest.importorskip("matplotlib")
  path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
  text = source.read_text()
  for long, short in CHANGED.get(source.stem, {}).items():
    assert long in text
    text = text.replace(long, short)
  script = tmp_path / source.name
  script.write_text(text)
  done = subprocess.run(
    [sys.executable, str(script)],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "Agg"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert len(done.stdout) > 300
