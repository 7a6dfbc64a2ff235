r"""How byte-level BPE vocabularies cut text into words before merging, by GGUF's name for it.

A GGUF file names its cut (`tokenizer.ggml.pre`) and leaves the patterns to the reader. Those here
are the model makers' own (each model's tokenizer.json or released code), as llama.cpp reads them:
the case-insensitive English contractions are ASCII, and Qwen's normalisation to NFC is left out. A
wrong cut gives wrong tokens without any error, so an unknown name is refused.
"""

import dataclasses

from tokenizers import Regex, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTION = "'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def _gpt4(number: str) -> str:
  """The pattern of tiktoken's cl100k family, which differs by how many digits make a word."""
  words = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}"
  return words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
  """Patterns applied one after the other, and what else goes with the name."""

  patterns: tuple[str, ...]
  ignore_merges: bool = False  # a word that is a token stays whole, whatever the merges say
  add_bos: bool = False  # unless the file says otherwise

  def build(self) -> pre_tokenizers.PreTokenizer:
    """Cuts by each pattern in turn, then writes the words in the byte alphabet."""
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in self.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, to_bytes])


_LLAMA3 = PreTokenizer((_gpt4(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_GPT2_WORDS = PreTokenizer((_GPT2,))
_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_QWEN2 = PreTokenizer((_gpt4(r"\p{N}"),))
# Upper case runs, then lower case runs; letters without case belong to both.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
) + _SPACES

PRE_TOKENIZERS = {
  "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
  **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral"), _LLAMA3),
  **dict.fromkeys(("smaug-bpe", "dbrx"), PreTokenizer(_LLAMA3.patterns)),
  **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
  "qwen35": PreTokenizer(
    (
      rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
      r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES,
    )
  ),
  **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), _GPT2_WORDS),
  **dict.fromkeys(
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    _SINGLE_DIGITS,
  ),
  "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
  "deepseek-coder": PreTokenizer(
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
  ),
  "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
}
