"""A model behind converters: amplifiers whose gains drift, and ranges that can be injected."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from q4jax.calibrated import Range, with_calibration
from q4jax.engine.programs import Programs
from q4jax.model.caches import Span
from q4jax.model.calib import Calib, Rows, Slots
from q4jax.model.llama import Llama
from q4jax.model.model import Model
from q4jax.records import Record

if TYPE_CHECKING:
  from experiments.drift_injection import Config


class Gain(nnx.Variable):
  """float32[R, 1], one for each row of the calibration."""


@dataclasses.dataclass(eq=False)
class Taps:
  """What passes the converters while a program is traced; None where nobody asks."""

  seen: dict[int, jax.Array] | None = None


class Converters(Slots):
  """Slots with an amplifier before them."""

  def __init__(self, calib: Calib, rows: Rows, gain: Gain, taps: Taps):
    super().__init__(calib, rows)
    self.gain, self.taps = gain, taps

  def input(self, name: str, x: jax.Array) -> jax.Array:
    [row] = [row for found, row, _ in self.rows if found == name]
    gain = self.gain.get_value()[row].reshape((1,) * x.ndim)
    analog = gain * x
    if self.taps.seen is not None:
      self.taps.seen[row] = jnp.abs(analog).max()
    return super().input(name, analog) / gain


class Machine:
  """A model behind converters: its gains can be set, its ranges injected."""

  def __init__(self, model: Model, calibration: list[Record], config: "Config"):
    self.config, self.taps, self.calibration = config, Taps(), calibration
    rows = len(with_calibration(model).calibration)
    gain = Gain(jax.device_put(np.ones((rows, 1), np.float32), model.leaves[0].sharding))
    self.model = with_calibration(
      model, calibration, lambda calib, rows: Converters(calib, rows, gain, self.taps)
    )
    [self._at] = [i for i, leaf in enumerate(self.model.leaves) if leaf is gain.get_value()]
    # One matrix of each input: its row, and the range that the calibration gave it.
    self.inputs: dict[str, tuple[int, float]] = {}
    taken: set[int] = set()
    for record in calibration:
      row = self.model.layout.find(record)[0] if record.target == "input" else None
      if row is not None and row not in taken:
        top = 2 ** (config.bits - 1) - 1
        self.inputs[record.layer_name] = row, float(record.scale[0]) * top
        taken.add(row)
    layers = model.config.num_layers + 1
    ends = config.end ** np.random.default_rng(config.seed).uniform(0.5, 1, layers)
    layer = {name: int(name.split(".")[1]) if name[:4] == "blk." else -1 for name in self.inputs}
    self.ends = {name: ends[index] for name, index in layer.items()}
    self.step = self.model.jit(self._step, donate_argnums=2)
    self.reset()

  def reset(self) -> None:
    """Cold, with the calibration's ranges."""
    self.set_gains(0)
    self.model.inject(self.calibration)
    self.peak = {name: limit for name, (_, limit) in self.inputs.items()}

  @property
  def _compiled(self) -> list[int]:
    """How often each program was compiled."""
    engine = Programs.of(self.model, logprobs=False)
    programs: list[Any] = [self.step, engine.prefill, engine.first, engine.decode]
    return [program._cache_size() for program in programs]

  @property
  def compiled_again(self) -> int:
    return sum(max(count - 1, 0) for count in self._compiled)

  def gains(self, warmth: float) -> dict[str, float]:
    """Of each input, warmth going from 0 to 1."""
    return {name: float(1 + warmth * (end - 1)) for name, end in self.ends.items()}

  def set_gains(self, warmth: float) -> None:
    gain = np.ones(self.model.leaves[self._at].shape, np.float32)
    for name, value in self.gains(warmth).items():
      gain[self.inputs[name][0]] = value
    leaves = list(self.model.leaves)
    leaves[self._at] = jax.device_put(gain, leaves[self._at].sharding)
    self.model.leaves = leaves

  def observe(self, seen: np.ndarray) -> None:
    """The converters' largest inputs at one token, float32[inputs]."""
    for name, value in zip(self.inputs, seen, strict=True):
      self.peak[name] = max(self.peak[name], float(value))

  def inject_known(self, warmth: float) -> None:
    gains = self.gains(warmth)
    self._inject({name: gains[name] * limit for name, (_, limit) in self.inputs.items()})

  def inject_observed(self) -> None:
    self._inject({name: self.config.margin * peak for name, peak in self.peak.items()})
    self.peak = {name: self.config.decay * peak for name, peak in self.peak.items()}

  def _inject(self, limits: dict[str, float]) -> None:
    dtype = f"int{self.config.bits}"
    self.model.inject({name: Range(-limit, limit, dtype) for name, limit in limits.items()})

  def _step(
    self, module: Llama, tokens: jax.Array, cache: Any, position: jax.Array
  ) -> tuple[Any, jax.Array, jax.Array]:
    """tokens int32[B] at `position` int32[B]: (cache, log probabilities [B, V], what was seen)."""
    self.taps.seen = {}
    x, cache = module.hidden(tokens[:, None], cache, Span(position, jnp.ones_like(position)))
    out = jax.nn.log_softmax(module.unembed(x[:, 0]))
    seen = jnp.stack([self.taps.seen[row] for row, _ in self.inputs.values()])
    self.taps.seen = None
    return cache, out, seen
