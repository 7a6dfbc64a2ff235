"""Calibration: what flows through each block of a model, watched, and written block by block.

A calibration is a folder:

  blk.000.json ... output.json   records (q4jax/records.py) of inputs, keys, values and weights
  *.safetensors                  beside each: sums of |x| and x^2 of each input channel
  imatrix.gguf                   the latter for all matrices, as llama.cpp's tools read them

Each file appears whole. A run that was killed goes on with the block it had not finished, if it is
given the same model, tokens and options; the hidden states between blocks are kept until the end.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from numpy.typing import NDArray

import q4jax
from q4jax import records as records_lib
from q4jax.errors import ConfigError
from q4jax.formats import imatrix
from q4jax.formats.atomic import replacing, write_bytes
from q4jax.formats.checkpoint import Checkpoint
from q4jax.offline.calibration import HIDDEN, IMATRIX, Sums, read_sums, save_sums, stem
from q4jax.offline.layerwise import SHARED, Flow, LayerRunner, input_of, takes_input
from q4jax.quant.convert import to_record
from q4jax.quant.fits import FITS
from q4jax.quant.grid import Grid
from q4jax.quant.histogram import Histogram
from q4jax.quant.observers import MinMax, Moments, MovingAverage
from q4jax.records import Record

RangeMethod = Literal["minmax", "average", "percentile", "mse", "kl"]
RANGES: tuple[RangeMethod, ...] = ("minmax", "average", "percentile", "mse", "kl")
Report = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Options:
  """What to calibrate.

  Attributes:
    bits: of the inputs' records, one scale a tensor.
    kv_bits: of the keys' and values' records, one scale a head.
    range: how an input's range is chosen from what was seen: all of it, the mean over sequences,
      the middle `percentile`, or that of least squared error or KL divergence.
    symmetric: ranges around 0.
    grid: of the weights' records, with `method`; none are written if None.
  """

  bits: int = 8
  kv_bits: int = 8
  range: RangeMethod = "minmax"
  percentile: float = 99.99
  symmetric: bool = True
  grid: Grid | None = None
  method: str = "mse"

  def __post_init__(self) -> None:
    for name, bits in (("bits", self.bits), ("kv_bits", self.kv_bits)):
      if bits not in range(2, 9):
        raise ConfigError(f"{name} is {bits}; choose 2 to 8.")
    if self.range not in RANGES:
      raise ConfigError(f"range is '{self.range}'; choose one of {', '.join(RANGES)}.")
    if self.method not in FITS:
      raise ConfigError(f"method is '{self.method}'; choose one of {', '.join(FITS)}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watch:
  """All observers of one stream of vectors [..., K]; 24 K bytes and 16 KiB."""

  extremes: MinMax
  average: MovingAverage
  moments: Moments
  histogram: Histogram

  @classmethod
  def init(cls, k: int) -> "Watch":
    return cls(MinMax.init(k), MovingAverage.init(k), Moments.init(k), Histogram.init())

  def update(self, x: jax.Array) -> "Watch":
    return Watch(
      self.extremes.update(x),
      self.average.update(x),
      self.moments.update(x),
      self.histogram.update(x),
    )


def calibrate(
  checkpoint: Checkpoint,
  tokens: NDArray[np.int32],
  folder: Path,
  options: Options,
  progress: Report | None = None,
) -> None:
  """Writes (or completes) a calibration of the model on tokens int32[B, T].

  Args:
    progress: called with the blocks done and the blocks in all.

  Raises:
    ConfigError: the folder holds a calibration of another run, or cannot be written; the model's
      activations are not finite.
    PromptError: see `LayerRunner`.
  """
  folder.mkdir(parents=True, exist_ok=True)
  about = _about(checkpoint, tokens, options)
  layers = checkpoint.config.num_layers
  runner = LayerRunner(checkpoint, tokens)
  runner.index = _resume(folder, about, runner)
  while runner.index < layers:
    if progress is not None:
      progress(runner.index, layers)
    _block(runner, folder, about, options)
  _head(runner, folder, about, options)
  _write_imatrix(checkpoint, folder, tokens.shape[1])
  for path in folder.glob(f"{HIDDEN}.*.npy"):
    path.unlink()
  if progress is not None:
    progress(layers, layers)


def _about(checkpoint: Checkpoint, tokens: NDArray[np.int32], options: Options) -> dict[str, Any]:
  """What a calibration is of; two runs that agree in it can be one."""
  return {
    "q4jax": q4jax.__version__,
    "model": str(checkpoint.metadata.get("general.name", Path(checkpoint.path).name)),
    "config": dataclasses.asdict(checkpoint.config),
    "sequences": len(tokens),
    "ctx": tokens.shape[1],
    "tokens_sha256": hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest(),
    "options": dataclasses.asdict(options),
  }


def _resume(folder: Path, about: Mapping[str, Any], runner: LayerRunner) -> int:
  """The first block that is still to do; the runner's hidden states are then those before it."""
  index = 0
  while (path := folder / f"{stem(index)}.json").exists():
    _, found = records_lib.loads(path.read_bytes(), str(path))
    if found != about:
      different = [key for key in about if found.get(key) != about[key]]
      raise ConfigError(
        f"{path} is of another calibration: {', '.join(different)} differ. Give another folder, or "
        "delete this one to begin anew."
      )
    index += 1
  while index and not (folder / f"{HIDDEN}.{index}.npy").exists():
    index -= 1
  if index:
    saved = np.load(folder / f"{HIDDEN}.{index}.npy", allow_pickle=False)
    if saved.shape != runner.hidden.shape or saved.dtype != np.float32:
      raise ConfigError(
        f"{folder}/{HIDDEN}.{index}.npy has shape {list(saved.shape)}; expected "
        f"{list(runner.hidden.shape)}. Delete the folder to begin anew."
      )
    runner.hidden[:] = saved
  return index


def _block(runner: LayerRunner, folder: Path, about: Mapping[str, Any], options: Options) -> None:
  """Watches and advances one block, and writes its files."""
  index, prefix, weights = runner.index, runner.prefix, runner.read_block()
  watches: dict[str, Watch] = {}

  def visit(flow: Flow) -> None:
    for name, x in _streams(flow).items():
      watches[name] = _update(watches.get(name) or Watch.init(x.shape[-1]), x)

  runner.advance(weights, visit)
  records: list[Record] = []
  for shared in SHARED:
    for matrix in shared:
      records.append(_input_record(f"{prefix}{matrix}.weight", watches[shared[0]], options))
      if options.grid is not None:
        importance = watches[shared[0]].moments.mean_square()
        w = np.asarray(weights[f"{matrix}.weight"])
        p = FITS[options.method](w, options.grid, importance)
        group = w.shape[1] // p.scale.shape[1]
        name = f"{prefix}{matrix}.weight"
        records.append(to_record(name, options.grid, p, group_size=group, method=options.method))
  heads = runner.config.num_kv_heads
  for target in ("key", "value"):
    records.append(_kv_record(prefix.rstrip("."), target, watches[target], heads, options))
  # The document is the last to be written: with it the block is done.
  save_sums(folder / f"{stem(index)}.safetensors", _sums(prefix, watches))
  with replacing(folder / f"{HIDDEN}.{index + 1}.npy") as path, path.open("wb") as file:
    np.save(file, runner.hidden)
  write_bytes(folder / f"{stem(index)}.json", records_lib.dumps(records, about).encode())
  (folder / f"{HIDDEN}.{index}.npy").unlink(missing_ok=True)


def _head(runner: LayerRunner, folder: Path, about: Mapping[str, Any], options: Options) -> None:
  watch = None
  for x in runner.head_inputs():
    watch = _update(watch or Watch.init(x.shape[-1]), x)
  assert watch is not None
  save_sums(folder / "output.safetensors", _sums("", {"output": watch}))
  name = "token_embd.weight" if runner.config.tied else "output.weight"
  record = _input_record(name, watch, options)
  write_bytes(folder / "output.json", records_lib.dumps([record], about).encode())


def _streams(flow: Flow) -> dict[str, jax.Array]:
  """Vectors [B, T, K] by name: inputs, and the keys and values of all heads side by side."""

  def side_by_side(x: jax.Array) -> jax.Array:
    b, k, t, h = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b, t, k * h)

  return flow.inputs | {"key": side_by_side(flow.keys), "value": side_by_side(flow.values)}


@jax.jit
def _update(watch: Watch, x: jax.Array) -> Watch:
  return watch.update(x)


def _input_record(name: str, watch: Watch, options: Options) -> Record:
  low, high = _range(watch, options)
  grid = Grid(options.bits, "tensor", "absmax" if options.symmetric else "zero_point", "float32")
  scale, zero = _affine(np.array([low]), np.array([high]), grid)
  return Record(
    layer_name=name,
    target="input",
    dtype=f"{'int' if options.symmetric else 'uint'}{options.bits}",
    axis=None,
    group_size=0,
    method=options.range,
    scale=scale,
    zero_point=zero,
    statistics=_statistics(watch),
  )


def _kv_record(layer: str, target: str, watch: Watch, heads: int, options: Options) -> Record:
  """One symmetric scale a head, from the largest size it has had."""
  low, high = watch.extremes.range()
  largest = np.maximum(-low, high).reshape(heads, -1)
  grid = Grid(options.kv_bits, "tensor", "absmax", "float32")
  scale, zero = _affine(-largest.max(axis=1), largest.max(axis=1), grid)
  return Record(
    layer_name=layer,
    target=target,
    dtype=f"int{options.kv_bits}",
    axis=-1,
    group_size=largest.shape[1],
    method="minmax",
    scale=scale,
    zero_point=zero,
    statistics=_statistics(watch) | {"channel_absmax": largest.reshape(-1).astype(float).tolist()},
  )


def _range(watch: Watch, options: Options) -> tuple[float, float]:
  h = watch.histogram
  if options.range == "minmax":
    return h.range()
  if options.range == "average":
    low, high = watch.average.range()
    return float(low.min()), float(high.max())
  if options.range == "percentile":
    return h.percentile(options.percentile)
  if options.range == "mse":
    return h.mse(options.bits, symmetric=options.symmetric)
  return h.kl(options.bits)


def _affine(
  low: NDArray[np.floating], high: NDArray[np.floating], grid: Grid
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
  """Scales and zero points of ranges [n]; a range that is 0 has the scale 1."""
  if grid.symmetric:
    scale = np.maximum(-low, high) / (grid.half - 1)
    zero = np.zeros(len(scale))
  else:
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / grid.top
    zero = np.rint(-low / np.where(scale == 0, np.inf, scale))
  return np.where(scale == 0, 1, scale).astype(np.float32), zero.astype(np.int32)


def _statistics(watch: Watch) -> dict[str, Any]:
  low, high = watch.histogram.range()
  square, absolute = watch.moments.mean_square(), watch.moments.mean_abs()
  p_low, p_high = watch.histogram.percentile(99.9)
  return {
    "min": low,
    "max": high,
    "mean_abs": float(absolute.mean()),
    "rms": float(np.sqrt(square.mean())),
    "p99.9_low": p_low,
    "p99.9_high": p_high,
    "rows": int(watch.moments.count),
  }


def _sums(prefix: str, watches: Mapping[str, Watch]) -> dict[str, Sums]:
  """Of the inputs: not of keys and values."""
  return {
    prefix + name: Sums(
      np.asarray(watch.moments.absolute), np.asarray(watch.moments.square), int(watch.moments.count)
    )
    for name, watch in watches.items()
    if name not in ("key", "value")
  }


def _write_imatrix(checkpoint: Checkpoint, folder: Path, ctx: int) -> None:
  sums = read_sums(folder)
  moments = {}
  for name, tensor in checkpoint.tensors.items():
    found = sums.get(input_of(name))
    if len(tensor.shape) == 2 and found and takes_input(name, checkpoint.config):
      moments[name] = imatrix.Moments(found.square, found.count)
  imatrix.write(folder / IMATRIX, moments, "q4jax calibrate", ctx)
