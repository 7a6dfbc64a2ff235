"""The cuts that each `tokenizer.ggml.pre` stands for, as llama.cpp makes them."""

import pytest

from q4jax.text.pretokenizers import PRE_TOKENIZERS

TEXT = (
  "I'LLx IT'Sx he'Dx I'Mx u'REx u'VEx n'Tx we'll 'tis 1234567 3.14 Ünï e\u0301 工作12"
  "  \n\n x=[a_b]+$`c`~\r\n\tABcDEf don't/é!!\n  /z ¿Qué?\u3000²\n "
)
# Words of TEXT, by llama.cpp as vendored in llama-cpp-python 0.3.36: it encoded TEXT with a
# vocabulary in which every word of up to 14 bytes is a token and every pair of tokens merges.
WORDS = {
  "default": (
    "I|'|LLx| IT|'|Sx| he|'|Dx| I|'|Mx| u|'|REx| u|'|VEx| n|'|Tx| we|'|ll| |'|tis| |"
    "123|456|7| |3|.|14| Ünï| e|\u0301| 工作|12|  \n\n| x|=[|a|_|b|]+$|`|c|`|~|\r\n|\t|"
    "ABcDEf| don|'|t|/|é|!!|\n  |/|z| |¿|Qué|?|\u3000|²|\n "
  ),
  "llama-bpe": (
    "I|'LL|x| IT|'S|x| he|'D|x| I|'M|x| u|'RE|x| u|'VE|x| n|'T|x| we|'ll| '|tis| |123|"
    "456|7| |3|.|14| Ünï| e|\u0301| 工作|12|  \n\n| x|=[|a|_b|]+$`|c|`~\r\n|\tABcDEf|"
    " don|'t|/é|!!\n| | /|z| ¿|Qué|?|\u3000|²|\n| "
  ),
  "qwen2": (
    "I|'LL|x| IT|'S|x| he|'D|x| I|'M|x| u|'RE|x| u|'VE|x| n|'T|x| we|'ll| '|tis| |1|2|"
    "3|4|5|6|7| |3|.|1|4| Ünï| e|\u0301| 工作|1|2|  \n\n| x|=[|a|_b|]+$`|c|`~\r\n|"
    "\tABcDEf| don|'t|/é|!!\n| | /|z| ¿|Qué|?|\u3000|²|\n| "
  ),
  "qwen35": (
    "I|'LL|x| IT|'S|x| he|'D|x| I|'M|x| u|'RE|x| u|'VE|x| n|'T|x| we|'ll| '|tis| |1|2|"
    "3|4|5|6|7| |3|.|1|4| Ünï| e\u0301| 工作|1|2|  \n\n| x|=[|a|_b|]+$`|c|`~\r\n|"
    "\tABcDEf| don|'t|/é|!!\n| | /|z| ¿|Qué|?|\u3000|²|\n| "
  ),
  "gpt-2": (
    "I|'|LLx| IT|'|Sx| he|'|Dx| I|'|Mx| u|'|REx| u|'|VEx| n|'|Tx| we|'ll| '|tis|"
    " 1234567| 3|.|14| Ünï| e|\u0301| 工作|12|  \n\n| x|=[|a|_|b|]+$`|c|`~|\r\n|\t|"
    "ABcDEf| don|'t|/|é|!!|\n | /|z| ¿|Qué|?|\u3000|²|\n "
  ),
  "smollm": (
    "I|'|LLx| IT|'|Sx| he|'|Dx| I|'|Mx| u|'|REx| u|'|VEx| n|'|Tx| we|'ll| '|tis| |1|2|"
    "3|4|5|6|7| |3|.|1|4| Ünï| e|\u0301| 工作|1|2|  \n\n| x|=[|a|_|b|]+$`|c|`~|\r\n|\t|"
    "ABcDEf| don|'t|/|é|!!|\n | /|z| ¿|Qué|?|\u3000|²|\n "
  ),
  "falcon": (
    "I|'|LLx| IT|'|Sx| he|'|Dx| I|'|Mx| u|'|REx| u|'|VEx| n|'|Tx| we|'|ll| |'|tis| |"
    "123|456|7| 3|.|14| Ünï| e|\u0301| 工作|12|  \n\n| x|=[|a|_|b|]+$`|c|`~|\r\n|\t|"
    "ABcDEf| don|'|t|/|é|!!|\n  |/|z| |¿|Qué|?|\u3000|²|\n "
  ),
  "deepseek-coder": (
    "I|'|LLx| IT|'|Sx| he|'|Dx| I|'|Mx| u|'|REx| u|'|VEx| n|'|Tx| we|'|ll| '|tis| |1|2|"
    "3|4|5|6|7| |3|.|1|4| Ünï| e|\u0301| |工作|1|2|  |\n|\n| x|=|[|a|_|b|]|+$`|c|`~|\r|"
    "\n|\tABcDEf| don|'|t|/|é|!!|\n| | /|z| ¿|Qué|?|\u3000|²|\n| "
  ),
  # But for the combining accent, which the maker's pattern counts as a letter.
  "tekken": (
    "I|'LLx| IT|'Sx| he|'Dx| I|'Mx| u|'REx| u|'VEx| n|'Tx| we|'ll| '|tis| |1|2|3|4|5|6|"
    "7| |3|.|1|4| Ünï| e\u0301| 工作|1|2|  \n\n| x|=[|a|_b|]+$`|c|`~\r\n|\tABc|DEf| don|"
    "'t|/é|!!\n| | /|z| ¿|Qué|?|\u3000|²|\n| "
  ),
}
SAME = {
  "llama-bpe": ["llama3", "llama-v3", "falcon3", "lfm2", "pixtral", "smaug-bpe", "dbrx"],
  "qwen2": ["deepseek-r1-qwen", "stablelm2", "megrez"],
  "gpt-2": ["phi-2", "mpt", "olmo", "jais"],
  "smollm": ["starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_cuts_words_as_llama_cpp_does(name: str) -> None:
  family = next((family for family, names in SAME.items() if name in names), name)
  cuts = PRE_TOKENIZERS[name].build().pre_tokenize_str(TEXT)
  # The words come in the byte alphabet; where they lie in the text is plain.
  assert "|".join(TEXT[begin:end] for _, (begin, end) in cuts) == WORDS[family]


def test_what_else_a_name_stands_for() -> None:
  keeps_words = {name for name, pre in PRE_TOKENIZERS.items() if pre.ignore_merges}
  assert keeps_words == {"llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral", "tekken"}
  assert keeps_words == {name for name, pre in PRE_TOKENIZERS.items() if pre.add_bos}
