"""The methods that find a group's parameters from its own weights, by name."""

from collections.abc import Mapping

from q4jax.quant import hqq, rtn, search
from q4jax.quant.grid import Fit

FITS: Mapping[str, Fit] = {"rtn": rtn.fit, "mse": search.fit, "hqq": hqq.fit}
