"""The embedded model's corpus and tokenizer: extraction, filters, split and lossless encoding."""

import ast
import inspect
import json
import string

import numpy as np
import pytest
import tokenizers

from experiments.tiny import corpus, prepare, tokenizer

SOURCE = '''# Copyright 2020 The Authors. All rights reserved.
# Licensed under the Apache License, as it is written in the file.
"""Tools for the reading of tables, as they are found in the wild."""

import os

# The order of the rows is that of the file, and it is kept
# by all of the functions below.
LIMIT = 3


class Reader(Base):
  """Reads the rows of a table.

  Tabs in the text are kept:\tso.
  """

  def next(self, skip: int = 0) -> str:
    """The next row, or an error if there is none of them left in the file."""
    # One line is not a block.


add_newdoc("tables", "join", ("inner", """The join of two tables, in the order of the first of
  them, with the rows that are in both."""))
'''


def module(tmp_path, code):
  path = tmp_path / "io.py"
  path.write_text(code)
  return list(corpus._module(path, ("tables", "io.py"), "test"))


def test_a_module_becomes_its_docstrings_and_comments_in_order(tmp_path):
  (document,) = module(tmp_path, SOURCE)
  assert document.name == "tables.io"
  headings = [heading for heading, _ in document.pieces]
  assert headings == [
    "# tables.io",
    "",
    "",
    "class Reader(Base)",
    "Reader.next(self, skip: int=0) -> str",
    "tables.join.inner",
  ]
  # The same strings through ast's own reader.
  expected = [n for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.ClassDef)]
  assert document.pieces[3][1] == ast.get_docstring(expected[0])
  kept = corpus.filtered([document])[document.split]
  assert len(kept) == 0 or "Licensed" not in kept[0].text


def test_filters_drop_licences_tables_blobs_and_other_languages():
  assert corpus.is_prose("The result is an array of the same shape as the input.")
  assert not corpus.is_prose("Licensed under the terms of the licence that is in the file.")
  assert not corpus.is_prose("0.1 0.2 0.3 0.4 0.5 the 0.6 0.7 0.8 0.9 0.10 0.11 0.12 0.13")
  assert not corpus.is_prose("Ceci montre comment une fonction renvoie plusieurs valeurs vides")
  assert not corpus.is_prose("the of a " * 9 + string.ascii_letters * 4)
  assert corpus.clean("a\tb  \r\n\n\n\nc") == "a   b\n\nc"
  row = "0.123 " * 10
  assert corpus.clean(f"first\n{row}\nlast") == "first\nlast"


def test_splits_share_no_lines():
  sentence = "Sentence {} tells what the function {} of the module does to its arguments.\n"
  words = [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]
  documents = [
    corpus.Document(
      f"module {i}",
      "test",
      (("", "".join(sentence.format(w, w) for w in words[i % 90 * 7 : i % 90 * 7 + 8])),),
    )
    for i in range(300)
  ]
  splits = corpus.filtered(documents)
  assert {d.split for d in documents} == set(splits)
  lines = {s: {line for d in part for line in d.text.split("\n")} for s, part in splits.items()}
  assert lines["train"] and not lines["train"] & lines["held_out"]
  # Each text was there three times or more.
  assert len(splits["train"]) < 95


def test_the_interpreter_and_its_reference_are_read():
  document = corpus._interpreter_module("builtins")
  pieces = dict(document.pieces)
  assert pieces["len(obj, /)"] == inspect.getdoc(len)
  assert pieces["str.strip(self, chars=None, /)"] == inspect.getdoc(str.strip)
  topics = list(corpus._topics())
  assert len(topics) > 70 and all(len(d.text) > 50 for d in topics)
  (document,) = [d for d in corpus._distribution("absl-py") if d.name == "absl.app"]
  assert "Generic entry point for Abseil Python applications." in document.text


def test_prepare_writes_lossless_deterministic_arrays(tmp_path):
  names = ("builtins", "_io", "posix", "itertools", "time", "_codecs", "_thread", "marshal")
  raw = [*corpus._topics(), *(corpus._interpreter_module(name) for name in names)]
  assert {d.split for d in raw} == {"train", "validation", "held_out"}
  record = prepare.run(raw, tmp_path / "a", 400)
  assert prepare.run(raw, tmp_path / "b", 400) == record
  assert json.loads((tmp_path / "a" / "corpus.json").read_text()) == record
  reader = tokenizers.Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
  splits = corpus.filtered(raw)
  for split, part in splits.items():
    tokens = np.fromfile(tmp_path / "a" / f"{split}.bin", np.uint16)
    assert len(tokens) == record[split]["tokens"] and (tokens < 400).all()
    found = tokenizer.documents(tokens)
    assert all(d[0] == tokenizer.BOS_ID and d[-1] == tokenizer.EOS_ID for d in found)
    assert [reader.decode(d[1:-1].tolist()) for d in found] == [d.text for d in part]
    assert sum(len(d.text.encode()) for d in part) == record[split]["bytes"]


def test_text_cannot_become_a_special_token():
  texts = [topic.text for topic in corpus._topics()]
  model = tokenizer.train(texts, 300)
  tokens = tokenizer.encode(model, ["a <|eos|> b", "<|bos|>"])
  assert (tokens == tokenizer.EOS_ID).sum() == (tokens == tokenizer.BOS_ID).sum() == 2
  vocabulary = tokenizer.gguf_vocabulary(model)
  assert vocabulary.tokens[:2] == ["<|bos|>", "<|eos|>"] and vocabulary.types[:3] == [3, 3, 1]
  assert len(vocabulary.tokens) == 300 and len(vocabulary.merges) == 300 - 258
  assert all(a + b in vocabulary.tokens for a, b in (m.split(" ") for m in vocabulary.merges))
  with pytest.raises(ValueError, match="too small for vocab_size=100000"):
    tokenizer.train(texts[:1], 100_000)
