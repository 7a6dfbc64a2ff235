"""A model with a rotation folded into its weights: it computes the same from smoother weights.

With an orthogonal Q, a norm's weights g, and R for each head's values:

  norms               1, for RMSNorm(x Q) = RMSNorm(x) Q only where no weight is in between
  embedding           E Q               q, k, gate, up     W diag(g) Q
  v                   R^T W diag(g) Q   attention output   Q^T W R
  down                Q^T W             head               W diag(g) Q

so what flows between blocks is x Q, and between v and the attention output v R: attention mixes the
values of different tokens, each head's alone, and commutes with R. These are QuaRot's rotations
(arXiv:2404.00456, section 4, stage 1) without those that a model would have to compute as it runs,
R1 and R2 of SpinQuant (arXiv:2405.16406) with Hadamard matrices: the model is a plain one, for any
program. The input of down, queries and keys stay as they are. A head that was the embedding table
becomes a matrix of its own, for g is in it.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from q4jax.errors import ConfigError, FormatError
from q4jax.formats.checkpoint import Bytes, Checkpoint, Tensor, floats
from q4jax.formats.llama_tensors import tensor_shapes
from q4jax.offline.scheme import check_source
from q4jax.quant.grid import Floats
from q4jax.quant.rotate import Rotation

_ONES = ("attn_norm.weight", "ffn_norm.weight", "output_norm.weight")
# The norm whose weights are folded into a matrix.
_NORM = {
  "attn_q.weight": "attn_norm.weight",
  "attn_k.weight": "attn_norm.weight",
  "attn_v.weight": "attn_norm.weight",
  "ffn_gate.weight": "ffn_norm.weight",
  "ffn_up.weight": "ffn_norm.weight",
  "output.weight": "output_norm.weight",
}
_VALUES = ("attn_v.weight", "attn_v.bias")
# Each of their new rows is made of many old ones.
_MIXED = ("attn_v.weight", "attn_output.weight", "ffn_down.weight")
_CHANGED = (*_ONES, *_NORM, *_VALUES, *_MIXED, "token_embd.weight")
_UNUSED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")  # Some converters add it.


class RotatedCheckpoint:
  """See `Checkpoint`: the source, rotated as it is read; what changes is float32.

  Memory: of a matrix a few forms in float32, while its rows are read. Any row of v, of the
  attention output or of down costs the whole matrix: write the model before running it (`convert`).

  Args:
    source: a Llama or Qwen, best in float; it is closed with this.
    seed: of the signs of Q and R; the same one gives the same weights.
    again: whether a source that is quantised may be rounded anew (`check_source`).

  Raises:
    ConfigError: the source is quantised, or the seed negative.
    FormatError: a tensor is missing, of another shape, or unknown: leaving it as it is might change
      what the model computes.
  """

  def __init__(self, source: Checkpoint, seed: int = 0, again: bool = False):
    if seed < 0:
      raise ConfigError(f"the seed of a rotation is {seed}; give 0 or more.")
    _check(source, again)
    self._source, self.path = source, source.path
    self.config = dataclasses.replace(source.config, tied=False)
    self.metadata: Mapping[str, Any] = dict(source.metadata)
    if "general.file_type" in self.metadata:
      self.metadata["general.file_type"] = 0  # llama.h: LLAMA_FTYPE_ALL_F32
    self.value_types = getattr(source, "value_types", None)
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    if source.config.tied:
      shapes["output.weight"] = shapes["token_embd.weight"]
    self.tensors: Mapping[str, Tensor] = {
      name: Tensor(name, shape, "f32") if _kind(name) in _CHANGED else source.tensors[name]
      for name, shape in shapes.items()
    }
    rng = np.random.default_rng(seed)
    self._residual = Rotation.random(source.config.d_model, rng)
    self._head = Rotation.random(source.config.head_dim, rng)

  def rows(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
    """See `Checkpoint.rows`."""
    kind = _kind(name)
    if kind not in _CHANGED:
      return self._source.rows(self._stored(name), start, stop)
    if kind in _MIXED:
      values = self._rotated(name, 0, None)[start:stop]
    else:
      values = self._rotated(name, start, stop)
    flat = values.reshape(1, -1) if values.ndim == 1 else values
    return np.ascontiguousarray(flat).view(np.uint8)

  def release(self, name: str) -> None:
    """See `Checkpoint.release`."""
    self._source.release(self._stored(name))

  def close(self) -> None:
    """See `Checkpoint.close`."""
    self._source.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _stored(self, name: str) -> str:
    """Of the source's tensor that this one is made of."""
    tied = self._source.config.tied and name == "output.weight"
    return "token_embd.weight" if tied else name

  def _rotated(self, name: str, start: int, stop: int | None) -> Floats:
    """float32 rows of a matrix, or a vector."""
    kind = _kind(name)
    w = floats(self._source, self._stored(name), start, stop)
    if kind in _ONES:
      return np.ones_like(w)
    if kind in _NORM:
      w = w * floats(self._source, name.replace(kind, _NORM[kind]))
    if kind in _VALUES:
      w = self._of_heads(w.T).T
    if kind == "attn_output.weight":
      w = self._of_heads(w)
    if kind in ("attn_output.weight", "ffn_down.weight"):
      return self._residual.outputs(w)
    return w if kind == "attn_v.bias" else self._residual.inputs(w)

  def _of_heads(self, w: Floats) -> Floats:
    """w diag(R, R, ...) for float32[..., heads * head_dim]."""
    return self._head.inputs(w.reshape(*w.shape[:-1], -1, self.config.head_dim)).reshape(w.shape)


def _kind(name: str) -> str:
  """A tensor's name without its block: "blk.0.attn_q.weight" is an "attn_q.weight"."""
  return name.split(".", 2)[2] if name.startswith("blk.") else name


def _check(source: Checkpoint, again: bool) -> None:
  wanted = tensor_shapes(source.config)
  names = [name for name in source.tensors if not _UNUSED.fullmatch(name)]
  for name in {**wanted, **dict.fromkeys(names)}:
    tensor = source.tensors.get(name)
    found, shape = tensor and list(tensor.shape), wanted.get(name)
    if tensor is None or shape is None or tensor.shape != shape:
      raise FormatError(
        f"{source.path} cannot be rotated: '{name}' has shape {found}, and a "
        f"{source.config.architecture} model of its metadata {shape and list(shape)} (None: it has "
        "no such tensor). A rotation must know every tensor that the model computes with."
      )
    if not again:
      check_source(tensor)
