"""The Hugging Face tokenizers library's BPE, so set up that no text is lost or becomes control."""

import contextlib
import operator
from collections.abc import Container, Iterator, Mapping, Sequence

from tokenizers import models

from q4jax.errors import TokenizerError
from q4jax.text.vocabulary import Kind

_PLAIN = (Kind.NORMAL, Kind.USER_DEFINED, Kind.BYTE)


def plain_ids(texts: Sequence[str], kinds: Sequence[Kind]) -> dict[str, int]:
  """The tokens that plain text may become, and their ids."""
  return {texts[id]: id for id, kind in enumerate(kinds) if kind in _PLAIN}


def plain_merges(
  merges: Sequence[tuple[str, ...]], ids: Mapping[str, int], known: Container[str]
) -> list[tuple[str, str]]:
  """The merges between plain tokens, each once; merges with a control token are left out.

  Raises:
    TokenizerError: a merge is no pair, or names or makes something that is no token at all.
  """
  if _all_plain(merges, ids):
    return list(dict.fromkeys(merges))  # type: ignore[arg-type]
  found: dict[tuple[str, str], None] = {}
  for number, merge in enumerate(merges):
    left, right = merge if len(merge) == 2 else ("", "")
    if left in ids and right in ids and left + right in ids:
      found[left, right] = None
    elif not (left in known and right in known and left + right in known):
      raise TokenizerError(
        f"merges[{number}] is {' '.join(merge)[:80]!r}; expected two tokens that join to a third."
      )
  return list(found)


def _all_plain(merges: Sequence[tuple[str, ...]], ids: Mapping[str, int]) -> bool:
  """Whether all merges join two plain tokens to a third, as nearly every file's do.

  A vocabulary may have 300,000, and loading waits: sets look at them in C.
  """
  if set(map(len, merges)) - {2}:
    return False
  parts = (operator.itemgetter(0), operator.itemgetter(1), "".join)
  return all(ids.keys() >= set(map(part, merges)) for part in parts)


def build_bpe(
  ids: Mapping[str, int], merges: list[tuple[str, str]], size: int, **options: bool
) -> models.Model:
  """A BPE of these tokens and merges; text that no token writes becomes the id `size`.

  Without such an id the library drops that text. Its name here is a space, which is no token's text
  in either kind of vocabulary: both write a space as another character.
  """
  vocabulary = {text: id for text, id in ids.items() if text != " "} | {" ": size}
  with library_errors("the vocabulary"):
    return models.BPE(vocabulary, merges, unk_token=" ", **options)


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
  """Turns whatever the library raises, panics included, into a TokenizerError about `what`."""
  try:
    yield
  except BaseException as e:
    # A panic of the library's Rust code is no Exception, and its type cannot be imported.
    if isinstance(e, Exception) or type(e).__name__ == "PanicException":
      raise TokenizerError(f"The tokenizers library refuses {what}: {e}") from e
    raise
