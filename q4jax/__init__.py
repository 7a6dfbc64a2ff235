"""q4jax: Llama models with int4 weights and a compressed KV cache, in JAX."""

import importlib
from typing import Any

from q4jax.errors import (
  ChatTemplateError,
  ConfigError,
  DownloadError,
  FormatError,
  MissingDependencyError,
  PromptError,
  Q4JaxError,
  TokenizerError,
)

__version__ = "0.1.0"

# Imported on first use: `q4jax --help` and errors need not wait for JAX.
_LAZY = {
  "Engine": "q4jax.engine",
  "LlamaConfig": "q4jax.config",
  "Model": "q4jax.model.model",
  "SamplingParams": "q4jax.engine",
  "load": "q4jax.load",
}

__all__ = [
  "ChatTemplateError",
  "ConfigError",
  "DownloadError",
  "FormatError",
  "MissingDependencyError",
  "PromptError",
  "Q4JaxError",
  "TokenizerError",
  *_LAZY,
]


def __getattr__(name: str) -> Any:
  if name not in _LAZY:
    raise AttributeError(f"module 'q4jax' has no attribute '{name}'")
  value = getattr(importlib.import_module(_LAZY[name]), name)
  globals()[name] = value  # Also replaces the submodule `q4jax.load` by its function.
  return value
