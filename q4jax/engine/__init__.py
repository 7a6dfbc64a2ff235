"""Generation: prefill, decode, sampling."""

from q4jax.engine.engine import Engine
from q4jax.engine.results import Chunk, Completion, Timing, TokenLogprobs
from q4jax.engine.sampling import SamplingParams

__all__ = ["Chunk", "Completion", "Engine", "SamplingParams", "Timing", "TokenLogprobs"]
