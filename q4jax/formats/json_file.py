"""Reads a JSON object from a file that may be anyone's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from q4jax.errors import FormatError

MAX_BYTES = 64 << 20  # An index of 10^5 tensors has 10 MB.


def read_object(path: Path, what: str) -> dict[str, Any]:
  """The JSON object in a file of at most MAX_BYTES; `what` it is, for messages.

  Raises:
    FormatError: the file cannot be read, or is not one JSON object with distinct keys.
  """
  try:
    size = path.stat().st_size
    if size > MAX_BYTES:
      raise FormatError(f"{path}: {what} has {size} bytes; expected at most {MAX_BYTES}.")
    return parse_object(path.read_bytes(), path, what)
  except OSError as error:
    raise FormatError(
      f"{path}: {what} cannot be read: {error.strerror}. Is it the folder of a model?"
    ) from None


def parse_object(data: bytes, path: Path, what: str) -> dict[str, Any]:
  """The JSON object that `data` is; see `read_object`."""
  try:
    document = json.loads(data, object_pairs_hook=_distinct)
  except (ValueError, RecursionError) as error:  # Bad UTF-8 is a ValueError too.
    raise FormatError(f"{path}: {what} is not JSON: {error}. Download it again.") from None
  if not isinstance(document, dict):
    raise FormatError(f"{path}: {what} is a JSON {type(document).__name__}; expected an object.")
  return document


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    repeated = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f"the key {repeated[:80]!r} occurs twice")
  return found
