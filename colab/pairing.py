"""Notebooks from the .py files of this folder, which are what people edit.

  python -m colab.pairing              writes each .ipynb anew, without outputs
  python -m colab.pairing --check      exit code 1 where one is not what its .py says
  python -m colab.pairing --execute    writes them, and runs each as a notebook (needs ipykernel)

Needs jupytext (pip install 'q4jax[notebooks]').
"""

import sys
from pathlib import Path

from absl import app, flags

FOLDER = Path(__file__).parent
# Of a cell in seconds, when notebooks are executed.
_TIMEOUT_S = 600


def sources() -> list[Path]:
  """The notebooks' .py files."""
  return sorted(path for path in FOLDER.glob("*.py") if path.read_text().startswith("# %%"))


def notebook(source: Path) -> str:
  """The .ipynb of a .py: the same text each time, so that a repeated run changes nothing."""
  import jupytext

  made = jupytext.read(source, fmt="py:percent")
  for i, cell in enumerate(made.cells):
    cell["id"] = f"cell-{i}"  # else random
  made.metadata = {
    "accelerator": "GPU",
    "colab": {"name": f"{source.stem}.ipynb", "provenance": []},
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
  }
  made.nbformat, made.nbformat_minor = 4, 5
  return str(jupytext.writes(made, fmt="ipynb")).rstrip("\n") + "\n"


def execute(path: Path) -> None:
  """Runs a notebook in a kernel of its own, from the folder it lies in; raises if a cell does."""
  import nbformat
  from nbclient import NotebookClient

  made = nbformat.read(path, as_version=4)
  NotebookClient(
    made, timeout=_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
  ).execute()


def main(_: list[str]) -> int:
  """Returns the exit code."""
  stale = []
  for source in sources():
    target, made = source.with_suffix(".ipynb"), notebook(source)
    if not target.exists() or target.read_text() != made:
      stale.append(target)
    if not flags.FLAGS.check:
      target.write_text(made)
    if flags.FLAGS.execute:
      print(f"{target.name} ...", file=sys.stderr, flush=True)
      execute(target)
  if flags.FLAGS.check and stale:
    names = ", ".join(path.name for path in stale)
    print(f"pairing: not what their .py say: {names}. Run make notebooks.", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  flags.DEFINE_boolean("check", False, "Write nothing; exit code 1 where a notebook is stale.")
  flags.DEFINE_boolean("execute", False, "Run each notebook.")
  app.run(main)
