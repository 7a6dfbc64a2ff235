"""Models that round activations by a calibration which can change while they run."""

from q4jax.calibrated.model import CalibratedModel, Injection, with_calibration
from q4jax.calibrated.sources import Affine, Range, Source

__all__ = ["Affine", "CalibratedModel", "Injection", "Range", "Source", "with_calibration"]
