"""Small complete GGUF models, the same bytes on every machine: what peers and q4jax both run.

Float models hold the weights of `weights(spec)`, which a Hugging Face model can be given too.
Quantised models hold random blocks, so that any block format can be had without a quantiser.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from random_blocks import ggml_type

K_MIX = "q4_k_m"  # as llama.cpp mixes: Q6_K for the head and a few more, Q4_K for the rest
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Spec:
  """One small model.

  Attributes:
    type: of every matrix: a GGUF type's name in lower case, or K_MIX.
    rope_scaling: Llama 3's (factor, low_freq_factor, high_freq_factor, original context), or None.
  """

  name: str
  architecture: str = "llama"
  type: str = "f32"
  d_model: int = 256
  d_ffn: int = 512
  layers: int = 2
  heads: int = 4
  kv_heads: int = 2
  head_dim: int = 64
  vocab: int = 293  # no multiple of 16, so that the last tile of rows is ragged
  tied: bool = False
  theta: float = 10_000.0
  rope_scaling: tuple[float, float, float, int] | None = None
  norm_eps: float = 1e-5
  context: int = 256

  @property
  def seed(self) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(self.name)) % 2**31


# Every block format that q4jax reads.
_QUANTISED = (
  *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
  *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"),
)
_LLAMA3 = (8.0, 1.0, 4.0, 64)

SPECS = {
  spec.name: spec
  for spec in (
    # Float models, for Hugging Face parity as well.
    Spec("llama", d_model=128, d_ffn=352, head_dim=32),
    Spec("llama-tied-mha", d_model=128, tied=True, kv_heads=4, theta=500_000.0),
    Spec("llama3-rope", d_model=128, rope_scaling=_LLAMA3, kv_heads=1, theta=500_000.0),
    Spec("llama-wide-heads", d_model=128, heads=2, kv_heads=1, head_dim=256),
    Spec("qwen2", "qwen2", d_model=128, head_dim=32, tied=True, theta=1e6, norm_eps=1e-6),
    Spec("qwen3", "qwen3", d_model=128, head_dim=96, theta=1e6, norm_eps=1e-6),
    # Every block format in a Llama, and the mix that people run in each architecture.
    *(Spec(f"llama-{type}", type=type) for type in _QUANTISED),
    Spec("llama3-q4_k_m", type=K_MIX, tied=True, rope_scaling=_LLAMA3, theta=500_000.0),
    Spec("qwen2-q4_k_m", "qwen2", type=K_MIX, tied=True, theta=1e6, norm_eps=1e-6),
    Spec("qwen3-q4_k_m", "qwen3", type=K_MIX, head_dim=128, theta=1e6, norm_eps=1e-6),
  )
}
FLOAT_SPECS = [spec for spec in SPECS.values() if spec.type == "f32"]
QUANTISED_SPECS = [spec for spec in SPECS.values() if spec.type != "f32"]

# Shapes on which llama.cpp's mixes of types depend.
MIX_SPECS = {
  spec.name: spec
  for spec in (
    Spec("tied", layers=4, kv_heads=2, tied=True),
    Spec("untied", layers=20),
    Spec("70b", layers=80),
    Spec("narrow", layers=3, d_model=96, d_ffn=80, heads=3, kv_heads=3, head_dim=32),
    Spec("qwen2", "qwen2", layers=9),
  )
}


def prompt(spec: Spec, tokens: int = PROMPT_TOKENS) -> np.ndarray:
  """int32[tokens]: BOS and then the same random ids every time."""
  ids = np.random.default_rng(spec.seed + 1).integers(3, spec.vocab, tokens, dtype=np.int32)
  ids[0] = 1
  return ids


def weights(spec: Spec) -> dict[str, np.ndarray]:
  """float32 parameters by GGUF name, Q and K half-split as Hugging Face keeps them."""
  rng = np.random.default_rng(spec.seed)
  out: dict[str, np.ndarray] = {}
  for name, shape in shapes(spec):
    draw = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
      out[name] = 1 + 0.1 * draw
    elif name == "rope_freqs.weight":
      out[name] = rope_factors(spec)
    elif name.endswith(".bias"):
      out[name] = 0.1 * draw
    else:
      out[name] = draw * np.float32(_std(shape))
  return out


def shapes(spec: Spec) -> Iterator[tuple[str, tuple[int, ...]]]:
  """(GGUF name, shape) of each parameter; matrices are [outputs, inputs]."""
  d, q_dim, kv_dim = spec.d_model, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
  yield "token_embd.weight", (spec.vocab, d)
  yield "output_norm.weight", (d,)
  if not spec.tied:
    yield "output.weight", (spec.vocab, d)
  if spec.rope_scaling:
    yield "rope_freqs.weight", (spec.head_dim // 2,)
  for i in range(spec.layers):
    layer: dict[str, tuple[int, ...]] = {
      "attn_norm": (d,),
      "attn_q": (q_dim, d),
      "attn_k": (kv_dim, d),
      "attn_v": (kv_dim, d),
      "attn_output": (d, q_dim),
      "ffn_norm": (d,),
      "ffn_gate": (spec.d_ffn, d),
      "ffn_up": (spec.d_ffn, d),
      "ffn_down": (d, spec.d_ffn),
    }
    if spec.architecture == "qwen3":
      layer |= {"attn_q_norm": (spec.head_dim,), "attn_k_norm": (spec.head_dim,)}
    yield from ((f"blk.{i}.{name}.weight", shape) for name, shape in layer.items())
    if spec.architecture == "qwen2":
      for name in ("attn_q", "attn_k", "attn_v"):
        yield f"blk.{i}.{name}.bias", layer[name][:1]


def rope_factors(spec: Spec) -> np.ndarray:
  """Divisors of the rotary frequencies, float32[H/2] (Llama 3.1's rope scaling).

  Long wavelengths are divided by the factor, short ones kept, those between interpolated.
  """
  assert spec.rope_scaling
  factor, low, high, original = spec.rope_scaling
  freqs = spec.theta ** -(np.arange(0, spec.head_dim, 2) / spec.head_dim)
  turns = original * freqs / (2 * np.pi)  # rotations within the original context
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def write(spec: Spec, path: Path) -> Path:
  """Writes the model to `path` and returns it."""
  writer = gguf.GGUFWriter(str(path), spec.architecture)
  writer.add_context_length(spec.context)
  writer.add_embedding_length(spec.d_model)
  writer.add_block_count(spec.layers)
  writer.add_feed_forward_length(spec.d_ffn)
  writer.add_head_count(spec.heads)
  writer.add_head_count_kv(spec.kv_heads)
  writer.add_key_length(spec.head_dim)
  writer.add_value_length(spec.head_dim)
  writer.add_rope_dimension_count(spec.head_dim)
  writer.add_rope_freq_base(spec.theta)
  writer.add_layer_norm_rms_eps(spec.norm_eps)
  _add_vocabulary(writer, spec)
  values, rng = weights(spec), np.random.default_rng(spec.seed)
  for name, value in values.items():
    type = _type(spec, name) if value.ndim == 2 and not name.endswith("norm.weight") else "f32"
    if type == "f32":
      writer.add_tensor(name, _as_stored(spec, name, value))
    else:
      blocks = random_blocks(rng, type, value.shape, _std(value.shape))
      writer.add_tensor(name, blocks, raw_dtype=ggml_type(type))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def random_blocks(
  rng: np.random.Generator, type: str, shape: tuple[int, ...], std: float
) -> np.ndarray:
  """uint8[N, row_bytes]: all bits random but the float16 scales, which set `std` and the mean.

  The mean is 0 where blocks have a minimum, else what the format's range of codes makes it.
  """
  kind = ggml_type(type)
  size, nbytes = gguf.GGML_QUANT_SIZES[kind]
  blocks = rng.integers(0, 256, (shape[0] * shape[1] // size, nbytes), dtype=np.uint8)
  spread = rng.uniform(0.8, 1.2, len(blocks))

  def moments(*units: float) -> tuple[float, float]:
    """Mean and standard deviation of the weights with these scale and minimum."""
    for at, unit in zip(_FLOAT16_FIELDS[type], units, strict=True):
      half = (spread * unit).astype("<f2")
      blocks[:, at : at + 2] = half.view(np.uint8).reshape(-1, 2)
    # In float64 the order of summation, which differs between machines, cannot show in a float16.
    values = gguf.quants.dequantize(blocks, kind).astype(np.float64)
    return float(values.mean()), float(values.std())

  ratios = [1.0]
  if len(_FLOAT16_FIELDS[type]) == 2:
    ratios = [1.0, -moments(1, 0)[0] / moments(0, 1)[0]]
  unit = std / moments(*ratios)[1]
  moments(*(unit * ratio for ratio in ratios))
  return blocks.reshape(shape[0], -1)


# Where a block keeps its float16 scale, and its minimum if it has one.
_FLOAT16_FIELDS = {
  "q4_0": (0,),
  "q4_1": (0, 2),
  "q5_0": (0,),
  "q5_1": (0, 2),
  "q8_0": (0,),
  "q2_k": (80, 82),
  "q3_k": (108,),
  "q4_k": (0, 2),
  "q5_k": (0, 2),
  "q6_k": (208,),
  "iq4_nl": (0,),
  "iq4_xs": (0,),
}


def _std(shape: tuple[int, ...]) -> float:
  return float(shape[-1] ** -0.5)


def _type(spec: Spec, name: str) -> str:
  if spec.type != K_MIX:
    return spec.type
  head = "token_embd" if spec.tied else "output.weight"
  more = (head, "blk.0.attn_v", "blk.0.ffn_down")
  return "q6_k" if name.startswith(more) else "q4_k"


def _as_stored(spec: Spec, name: str, value: np.ndarray) -> np.ndarray:
  """Arch `llama` keeps the rows of Q and K interleaved: i and i + H/2 of a head are neighbours."""
  if spec.architecture != "llama" or not name.endswith(("attn_q.weight", "attn_k.weight")):
    return value
  halves = value.reshape(-1, 2, spec.head_dim // 2, spec.d_model)
  return halves.swapaxes(1, 2).reshape(value.shape).copy()


def _add_vocabulary(writer: gguf.GGUFWriter, spec: Spec) -> None:
  """Llama's sentencepiece shape: three specials, 256 bytes, then single letters."""
  kinds = gguf.TokenType
  letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz.,!?'-"]
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
  tokens += [f"\u2581{a}{b}" for a in "aeiou" for b in "nrst"]
  types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256
  types += [kinds.NORMAL] * (spec.vocab - len(types))
  writer.add_tokenizer_model("llama")
  writer.add_token_list(tokens[: spec.vocab])
  writer.add_token_scores([float(-i) for i in range(spec.vocab)])
  writer.add_token_types(types)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_unk_token_id(0)
  writer.add_add_bos_token(True)
