"""Training states by orbax: what was saved last is whole, and fits the run that goes on from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from q4jax.errors import ConfigError, MissingDependencyError, TrainingError

KEEP = 2


class Checkpoints:
  """Steps of a run in a folder, the last `KEEP` of them; a step appears whole or not at all.

  A state is a pytree; its leaves are saved by their paths, with a description of the run. The
  position in the data and the random numbers are functions of the step, so that it is all there is.

  Args:
    folder: made where it is missing.
    about: the run's settings, JSON; another run's checkpoints are refused.
  """

  def __init__(self, folder: Path, about: Mapping[str, Any]):
    ocp = _orbax()
    self.folder, self.about = folder.absolute(), dict(about)
    options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=False)
    self._manager = ocp.CheckpointManager(self.folder, options=options)

  @property
  def latest(self) -> int | None:
    """The last step that was saved whole."""
    step: int | None = self._manager.latest_step()
    return step

  def save(self, step: int, state: Any) -> None:
    """Writes a state to the disk."""
    ocp = _orbax()
    leaves = {name: np.asarray(x) for name, x in _named(state).items()}
    about = self.about | {"leaves": {n: [list(x.shape), str(x.dtype)] for n, x in leaves.items()}}
    items = {"state": ocp.args.PyTreeSave(leaves), "about": ocp.args.JsonSave(about)}
    self._manager.save(step, args=ocp.args.Composite(**items))
    self._manager.wait_until_finished()

  def restore(self, like: Any) -> tuple[int, Any]:
    """The last step and its state, with the structure, types and shardings of `like`.

    Raises:
      TrainingError: there is no checkpoint.
      ConfigError: it is of another run; it says what differs.
    """
    ocp, step = _orbax(), self.latest
    if step is None:
      raise TrainingError(f"{self.folder}: there is no checkpoint to resume from.")
    loaded = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
    self._check(loaded["about"], like)
    numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in _named(like)}
    args = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=numpy))
    leaves = self._manager.restore(step, args=args)["state"]
    paths, structure = jax.tree.flatten(like)
    put = [
      jax.device_put(leaves[name], old.sharding)
      for name, old in zip(_named(like), paths, strict=True)
    ]
    return step, jax.tree.unflatten(structure, put)

  def close(self) -> None:
    """Lets go of the folder."""
    self._manager.close()

  def _check(self, about: dict[str, Any], like: Any) -> None:
    shapes = {n: [list(x.shape), str(x.dtype)] for n, x in _named(like).items()}
    saved = about.pop("leaves")
    mine = json.loads(json.dumps(self.about))
    for name in sorted(mine.keys() | about.keys()):
      if mine.get(name) != about.get(name):
        raise ConfigError(
          f"{self.folder}: the checkpoint is of a run with {name}={about.get(name)!r}; this one "
          f"has {mine.get(name)!r}. Give the same, or another folder."
        )
    for name in sorted(shapes.keys() | saved.keys()):
      if shapes.get(name) != saved.get(name):
        raise ConfigError(
          f"{self.folder}: the checkpoint has {name} as {saved.get(name)}; this model needs "
          f"{shapes.get(name)}. It is of another model; give another folder."
        )


def _named(state: Any) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _orbax() -> Any:
  try:
    import orbax.checkpoint as ocp
  except ImportError:
    raise MissingDependencyError(
      "training needs orbax-checkpoint: pip install 'q4jax[train]'."
    ) from None
  return ocp
