"""tokenizer.json as GGUF metadata: the ids that the tokenizers library itself gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hf_model import llama2_tokenizer
from q4jax.errors import TokenizerError
from q4jax.text.hf_metadata import tokenizer_metadata
from q4jax.text.tokenizer import Tokenizer

# The makers' own spelling: meta-llama's and Qwen's tokenizer.json.
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
TEXTS = [
  "The quick brown fox, don't you know? I'LL say 1234567 times.",
  "Die Größe der Straße überrascht niemanden; naïve Café.",
  "世界は広い。今日はとても寒いですね。",
  "Быстрая коричневая лиса прыгает через ленивую собаку.",
  "الثعلب البني السريع يقفز فوق الكلب الكسول",
  "नमस्ते दुनिया 안녕하세요 세계",
  "def f(x):\n    return x**2  # square\r\n\n\n\tprint(f(3.14))",
  "  two  spaces   three \u00a0 nbsp\u3000wide ",
  "\U0001f642\U0001f44d\U0001f3fd \U0001f469\u200d\U0001f469\u200d\U0001f467 ₿ ∑∫",
  "e\u0301 combining, ﬁ ligature, ½ and ² and Ⅻ",
  " leading",
  "",
]
SPECIAL = ["<|begin|>", "<|end_of_text|>", "<|eot_id|>"]


def byte_level(*cuts: Any, ignore_merges: bool = False, normalizer: Any = None) -> Any:
  tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
  tokenizer.normalizer = normalizer
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(cuts))
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=900,
    special_tokens=SPECIAL,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS * 3, trainer)
  return tokenizer


def split(pattern: str) -> Any:
  return pre_tokenizers.Split(Regex(pattern), "isolated")


def bytes_(use_regex: bool = False) -> Any:
  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


BYTE_LEVEL: dict[str, Callable[[], Any]] = {
  "llama-bpe": lambda: byte_level(split(LLAMA3), bytes_(), ignore_merges=True),
  "smaug-bpe": lambda: byte_level(split(LLAMA3), bytes_()),
  "qwen2": lambda: byte_level(split(QWEN), bytes_()),
  "gpt-2": lambda: byte_level(bytes_(use_regex=True)),
  "smollm": lambda: byte_level(
    pre_tokenizers.Digits(individual_digits=True), bytes_(use_regex=True)
  ),
}


def save(tokenizer: Any, folder: Path, **config: Any) -> Path:
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder / "tokenizer.json"


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level(pre: str, tmp_path: Path) -> None:
  library = BYTE_LEVEL[pre]()
  path = save(library, tmp_path, eos_token=SPECIAL[1])
  found = tokenizer_metadata(path, library.get_vocab_size())
  assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == pre
  assert found["tokenizer.ggml.eos_token_id"] == 1
  ours = Tokenizer.from_gguf_metadata(found)
  for text in TEXTS:
    wanted = library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, add_special=False) == wanted, text
    assert ours.decode(wanted) == text
  assert ours.encode(SPECIAL[2], parse_special=True)[-1] == 2
  assert 2 not in ours.encode(SPECIAL[2])


def test_what_begins_and_ends_a_text(tmp_path: Path) -> None:
  library = BYTE_LEVEL["llama-bpe"]()
  library.post_processor = processors.TemplateProcessing("<|begin|> $A", None, [("<|begin|>", 0)])
  path = save(
    library,
    tmp_path,
    bos_token={"content": "<|begin|>"},
    eos_token="<|eot_id|>",
    pad_token="<|eot_id|>",
  )
  (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
  found = tokenizer_metadata(path, library.get_vocab_size())
  about = {k.removeprefix("tokenizer."): v for k, v in found.items() if not isinstance(v, list)}
  assert about == {
    "ggml.model": "gpt2",
    "ggml.pre": "llama-bpe",
    "ggml.bos_token_id": 0,
    "ggml.eos_token_id": 2,
    "ggml.padding_token_id": 2,
    "ggml.add_bos_token": True,
    "ggml.add_eos_token": False,
    "chat_template": "{{ messages }}",
  }
  assert Tokenizer.from_gguf_metadata(found).encode("Hi") == library.encode("Hi").ids


def test_rows_without_a_token_are_unused(tmp_path: Path) -> None:
  library = BYTE_LEVEL["gpt-2"]()
  size = library.get_vocab_size()
  found = tokenizer_metadata(save(library, tmp_path), size + 2)
  assert found["tokenizer.ggml.tokens"][size:] == [f"[PAD{size}]", f"[PAD{size + 1}]"]
  assert found["tokenizer.ggml.token_type"][size:] == [5, 5]
  with pytest.raises(TokenizerError, match=f"ids up to {size - 1}, .* table {size - 1} rows"):
    tokenizer_metadata(save(library, tmp_path), size - 1)


@pytest.mark.parametrize("spaces", ["normalizer", "metaspace"])
def test_sentencepiece(spaces: str, tmp_path: Path) -> None:
  library, scores = llama2_tokenizer()
  if spaces == "normalizer":
    library.normalizer = normalizers.Sequence(
      [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
  else:
    library.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=False)
  found = tokenizer_metadata(save(library, tmp_path, bos_token="<s>", eos_token="</s>"), 32000)
  assert found["tokenizer.ggml.model"] == "llama"
  # The same order as the model's own scores wherever a merge makes the piece.
  ours, theirs = np.array(found["tokenizer.ggml.scores"]), np.array(scores)
  made = ours > ours.min()
  assert made.sum() > 20_000
  order = [np.argsort(-values[made], kind="stable") for values in (ours, theirs)]
  np.testing.assert_array_equal(*order)
  tokenizer = Tokenizer.from_gguf_metadata(found)
  for text in TEXTS:
    if spaces == "metaspace":
      text = text.lstrip(" ")  # Metaspace adds no second space; GGUF, as SentencePiece, does.
    wanted = library.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, add_special=False) == wanted, text


def changed(change: Callable[[dict], Any], tmp_path: Path, pre: str = "gpt-2") -> Path:
  path = save(BYTE_LEVEL[pre](), tmp_path)
  document = json.loads(path.read_text())
  change(document)
  path.write_text(json.dumps(document))
  return path


def cut_first(behavior: str) -> Callable[[dict], Any]:
  cut = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": behavior, "invert": False}
  return lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, cut)


def space_first(document: dict) -> None:
  document["pre_tokenizer"]["pretokenizers"][0]["add_prefix_space"] = True


def pad_token(document: dict) -> None:
  document["added_tokens"].append({"id": 900, "content": "[PAD901]", "special": True})


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (cut_first("Isolated"), "no name .*'x\\+'"),
    (cut_first("Removed"), "part of its pre_tokenizer: .*Removed"),
    (space_first, "part of its pre_tokenizer: .*ByteLevel"),
    (lambda d: d["model"].update(ignore_merges=True), "ignore_merges True"),
    (lambda d: d.update(normalizer={"type": "NFKC"}), "normalizer, .*NFKC"),
    (pad_token, "called \\[PAD"),
    (lambda d: d["model"].pop("merges"), "not laid out as a tokenizer.json"),
  ],
)
def test_what_gguf_cannot_say(change: Callable[[dict], Any], said: str, tmp_path: Path) -> None:
  with pytest.raises(TokenizerError, match=said):
    tokenizer_metadata(changed(change, tmp_path), 902)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda merges: merges.pop(3), "no merge makes 'abc' of 'a' and 'bc'"),
    (lambda merges: merges.append(merges.pop(2)), "make 'abc' do not follow each other"),
  ],
)
def test_merges_that_no_scores_give(
  change: Callable[[list], Any], said: str, tmp_path: Path
) -> None:
  path = save(small_sentencepiece(), tmp_path)
  document = json.loads(path.read_text())
  change(document["model"]["merges"])
  path.write_text(json.dumps(document))
  with pytest.raises(TokenizerError, match=said):
    tokenizer_metadata(path, 265)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 1, 0, 3, 2], [2, 3, 1, 0, 4]])
def test_scores_follow_the_merges(order: list[int], tmp_path: Path) -> None:
  path = save(small_sentencepiece(), tmp_path)
  document = json.loads(path.read_text())
  merges = document["model"]["merges"]
  document["model"]["merges"] = [merges[i] for i in order]
  path.write_text(json.dumps(document))
  library = tokenizers.Tokenizer.from_file(str(path))
  ours = Tokenizer.from_gguf_metadata(tokenizer_metadata(path, 265))
  for text in ("abc", "aabcc bca", " a ab  bc", "bab\u00e9c"):
    assert ours.encode(text) == library.encode(text).ids


def small_sentencepiece(**options: Any) -> Any:
  pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abc", "ab", "bc", "abc", "▁a"]
  merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("▁", "a")]
  model = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True} | options
  tokenizer = tokenizers.Tokenizer(
    models.BPE({piece: id for id, piece in enumerate(pieces)}, merges, **model)
  )
  tokenizer.normalizer = normalizers.Replace(" ", "▁")
  return tokenizer


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"byte_fallback": False}, "model.byte_fallback is False"),
    ({"fuse_unk": False}, "model.fuse_unk is False"),
    ({"ignore_merges": True}, "model.ignore_merges is True"),
  ],
)
def test_sentencepiece_options_that_are_refused(options: dict, said: str, tmp_path: Path) -> None:
  with pytest.raises(TokenizerError, match=said):
    tokenizer_metadata(save(small_sentencepiece(**options), tmp_path), 265)


def test_words_cut_at_spaces_are_no_sentencepiece(tmp_path: Path) -> None:
  library = small_sentencepiece()
  library.pre_tokenizer = pre_tokenizers.Metaspace("▁", "never", split=True)
  with pytest.raises(TokenizerError, match="cannot say this part of it: .*Metaspace"):
    tokenizer_metadata(save(library, tmp_path), 265)
