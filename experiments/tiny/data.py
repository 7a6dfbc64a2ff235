"""Windows of the row of all documents' tokens."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

BOS_ID = 0


def windows(length: int, context: int, batch: int, seed: int) -> Iterator[np.ndarray]:
  """Batches int32[batch] of window starts, without end: each epoch covers every token once."""
  rng = np.random.default_rng(seed)
  pending = np.zeros(0, np.int32)
  while True:
    while len(pending) < batch:
      starts = np.arange(rng.integers(context), length - context, context, dtype=np.int32)
      pending = np.concatenate([pending, rng.permutation(starts)])
    yield pending[:batch]
    pending = pending[batch:]


def gather(row: jax.Array, starts: jax.Array, context: int) -> tuple[jax.Array, jax.Array]:
  """Inputs and targets int32[B, T] of the windows at `starts`; inputs begin with BOS."""
  window = row[starts[:, None] + jnp.arange(context + 1)[None]]
  return window[:, :-1].at[:, 0].set(BOS_ID), window[:, 1:]
