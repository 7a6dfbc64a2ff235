"""Turns text into token ids and back, with the model's vocabulary; needs no tensors.

  q4jax tokenize tiny --text="Hello world"
  q4jax tokenize model.gguf --file=prompt.txt --json
  q4jax tokenize model.gguf --text="<|user|>hi" --parse_special --noadd_special
  q4jax tokenize model.gguf --ids=1,15043,3186

A text gives one line a token: its id and how the vocabulary writes it. Ids give the text. The
file's text is taken as it is, its last newline included.

--json prints one object with the keys ids, pieces, count and text (the ids decoded).
"""

from absl import flags as absl_flags

from q4jax.cli import common
from q4jax.cli.parsing import UsageError

ARGUMENTS = ("MODEL",)
FLAGS = absl_flags.FlagValues()
absl_flags.DEFINE_string("text", None, "Text to encode.", flag_values=FLAGS)
absl_flags.DEFINE_string("file", None, "File with text to encode; - is stdin.", flag_values=FLAGS)
absl_flags.DEFINE_list("ids", None, "Ids to decode, with commas between.", flag_values=FLAGS)
absl_flags.DEFINE_boolean(
  "add_special", True, "Add the BOS and EOS that the model wants.", flag_values=FLAGS
)
absl_flags.DEFINE_boolean(
  "parse_special",
  False,
  "Read special tokens in the text, such as <|eot_id|>, as tokens; else they are plain text.",
  flag_values=FLAGS,
)
absl_flags.DEFINE_boolean(
  "show_special", False, "Write special tokens out when decoding.", flag_values=FLAGS
)
absl_flags.DEFINE_string(
  "tokenizer",
  None,
  "A tokenizer.json or tokenizer.model to use instead of the file's vocabulary.",
  flag_values=FLAGS,
)
common.define_json(FLAGS)


def run(flags: absl_flags.FlagValues, arguments: list[str]) -> int:
  """Encodes or decodes."""
  if sum(value is not None for value in (flags.text, flags.file, flags.ids)) != 1:
    raise UsageError("give one of --text=TEXT, --file=PATH and --ids=1,2,3.")
  ids = _ids(flags.ids) if flags.ids is not None else None
  text = flags.text if flags.file is None else common.read_text(flags.file)
  path = common.find_model(arguments[0], flags)
  from q4jax.formats.open import read_metadata
  from q4jax.text.tokenizer import Tokenizer

  if flags.tokenizer is not None:
    tokenizer = Tokenizer.from_file(flags.tokenizer)
  else:
    tokenizer = Tokenizer.from_gguf_metadata(read_metadata(path))
  decodes = ids is not None
  if ids is None:
    ids = tokenizer.encode(text, flags.add_special, flags.parse_special)
  decoded = tokenizer.decode(ids, skip_special=not flags.show_special)
  pieces = [tokenizer.id_to_piece(id) for id in ids]
  if flags.json:
    common.print_json({"ids": ids, "pieces": pieces, "count": len(ids), "text": decoded})
  elif decodes:
    print(decoded)
  else:
    for id, piece in zip(ids, pieces, strict=True):
      print(f"{id:8} {piece!r}")
    common.note(f"{len(ids)} tokens")
  return 0


def _ids(words: list[str]) -> list[int]:
  bad = [word for word in words if not word.strip().isdecimal()]
  if bad:
    raise UsageError(f"--ids has {bad[0]!r}; expected whole numbers with commas between.")
  return [int(word) for word in words]
