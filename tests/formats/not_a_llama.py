"""Valid GGUF files that are no Llama: what the config, the tokenizer or the loader must refuse."""

from dataclasses import replace

from formats.raw_gguf import (
  BOOL,
  F32,
  I32,
  STRING,
  U32,
  U64,
  Case,
  Cases,
  Gguf,
  Value,
  array,
  one_file,
  scalar,
  text,
)


def cases(base: Gguf) -> Cases:
  def key(name: str, value: Value | None, says: str | None = None) -> Case:
    return one_file(base.with_key(name, value), name if says is None else says, "load")

  arch = "general.architecture"
  yield "architecture missing", key(arch, None)
  yield "architecture int", key(arch, scalar(U32, 1))
  yield "architecture array", key(arch, array(STRING, ["llama"]))
  yield "architecture empty", key(arch, text(""))
  yield "architecture unknown", key(arch, text("mamba"), "mamba")
  for name in (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
  ):
    full = f"llama.{name}"
    yield f"{name} missing", key(full, None)
    for kind, value in {
      "string": text("1"),
      "float": scalar(F32, 1.0),
      "bool": scalar(BOOL, 1),
      "array": array(U32, [1, 1]),
      "0": scalar(U32, 0),
      "negative": scalar(I32, -1),
      "2e63": scalar(U64, 2**63),
    }.items():
      yield f"{name} {kind}", key(full, value)
  yield "more blocks than tensors", key("llama.block_count", scalar(U32, 2), "blk.1")
  yield "kv heads 0", key("llama.attention.head_count_kv", scalar(U32, 0))
  yield "kv heads do not divide", key("llama.attention.head_count_kv", scalar(U32, 3), "head_count")
  yield "heads do not divide", key("llama.attention.head_count", scalar(U32, 3), "head_count")
  yield "other width", key("llama.embedding_length", scalar(U32, 64), "")
  yield "other ffn", key("llama.feed_forward_length", scalar(U32, 32), "ffn")
  yield "key length odd", key("llama.attention.key_length", scalar(U32, 15), "15")
  yield "key length other", key("llama.attention.key_length", scalar(U32, 32), "")
  eps = "llama.attention.layer_norm_rms_epsilon"
  yield "epsilon missing", key(eps, None)
  for name in (eps, "llama.rope.freq_base"):
    for kind, value in {
      "string": text("1"),
      "0": scalar(F32, 0.0),
      "negative": scalar(F32, -1.0),
      "nan": scalar(F32, float("nan")),
      "infinite": scalar(F32, float("inf")),
      "array": array(F32, [1.0]),
    }.items():
      yield f"{name.split('.')[-1]} {kind}", key(name, value)
  for name in ("llama.expert_count", "llama.attention.sliding_window"):
    yield f"{name.split('.')[-1]}", key(name, scalar(U32, 8))
    yield f"{name.split('.')[-1]} string", key(name, text("8"))
    yield f"{name.split('.')[-1]} array", key(name, array(U32, [8, 8]))
  yield "scaling unknown", key("llama.rope.scaling.type", text("yarn"), "yarn")
  yield "scaling int", key("llama.rope.scaling.type", scalar(U32, 1))
  linear = base.with_key("llama.rope.scaling.type", text("linear"))
  yield "scaling without factor", one_file(linear, "llama.rope.scaling.factor", "load")

  tokenizer = "tokenizer.ggml"
  yield "tokenizer missing", key(f"{tokenizer}.model", None, f"{tokenizer}.model")
  yield "tokenizer unknown", key(f"{tokenizer}.model", text("bert"), "bert")
  yield "tokenizer int", key(f"{tokenizer}.model", scalar(U32, 1))
  yield "tokens missing", key(f"{tokenizer}.tokens", None, "vocab")
  yield "tokens string", key(f"{tokenizer}.tokens", text("abc"))
  yield "tokens numbers", key(f"{tokenizer}.tokens", array(I32, [1, 2, 3]))
  yield "tokens empty", key(f"{tokenizer}.tokens", array(STRING, []), "")
  yield "fewer tokens than rows", key(f"{tokenizer}.tokens", array(STRING, ["a"] * 9), "")
  yield "fewer scores", key(f"{tokenizer}.scores", array(F32, [1.0]))
  yield "scores strings", key(f"{tokenizer}.scores", array(STRING, ["1"] * 289))
  yield "fewer types", key(f"{tokenizer}.token_type", array(I32, [1]))
  yield "bos outside", key(f"{tokenizer}.bos_token_id", scalar(U32, 289))
  yield "bos string", key(f"{tokenizer}.bos_token_id", text("1"))
  yield "eos negative", key(f"{tokenizer}.eos_token_id", scalar(I32, -1))
  normal = base.with_key(f"{tokenizer}.token_type", array(I32, [1] * 289))
  bpe = normal.with_key(f"{tokenizer}.model", text("gpt2")).with_key(
    f"{tokenizer}.pre", text("smollm")
  )
  yield "bpe without merges", one_file(bpe, f"{tokenizer}.merges", "load")

  for i, tensor in enumerate(base.tensors):
    name = str(tensor.name)
    without = base.tensors[:i] + base.tensors[i + 1 :]
    yield f"without {name}", one_file(replace(base, tensors=without), name, "load")
    # The same bytes under another shape: a row more and the columns fewer, or one dimension more.
    yield f"{name} 3-d", one_file(base.with_tensor(i, ne=(*tensor.ne, 1, 1)), name, "load")
  transposed = base.with_tensor(9, ne=(32, 64))
  yield "ffn_down transposed", one_file(transposed, "blk.0.ffn_down.weight", "load")
  yield "q of k", one_file(base.with_tensor(2, ne=(32, 16)), "blk.0.attn_q.weight", "load")
  yield "no tensors", one_file(replace(base, tensors=()), "token_embd.weight", "load")
