"""q4jax: Llama models with int4 weights and a compressed KV cache, in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from q4jax.errors import (
  ChatTemplateError,
  ConfigError,
  DownloadError,
  FormatError,
  MissingDependencyError,
  PoolError,
  PoolExhaustedError,
  PromptError,
  Q4JaxError,
  TokenizerError,
)

if TYPE_CHECKING:
  from q4jax.calibrated import CalibratedModel, with_calibration
  from q4jax.config import LlamaConfig
  from q4jax.engine import Engine, SamplingParams
  from q4jax.loading import load
  from q4jax.model.model import Model

__version__ = "0.1.0"

# Imported on first use: `q4jax --help` and errors need not wait for JAX.
_LAZY = {
  "CalibratedModel": "q4jax.calibrated",
  "Engine": "q4jax.engine",
  "LlamaConfig": "q4jax.config",
  "Model": "q4jax.model.model",
  "SamplingParams": "q4jax.engine",
  "load": "q4jax.loading",
  "with_calibration": "q4jax.calibrated",
}

__all__ = [
  "CalibratedModel",
  "ChatTemplateError",
  "ConfigError",
  "DownloadError",
  "Engine",
  "FormatError",
  "LlamaConfig",
  "MissingDependencyError",
  "Model",
  "PoolError",
  "PoolExhaustedError",
  "PromptError",
  "Q4JaxError",
  "SamplingParams",
  "TokenizerError",
  "load",
  "with_calibration",
]


def __getattr__(name: str) -> Any:
  if name not in _LAZY:
    raise AttributeError(f"module 'q4jax' has no attribute '{name}'")
  return getattr(importlib.import_module(_LAZY[name]), name)
