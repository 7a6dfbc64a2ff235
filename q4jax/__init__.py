"""q4jax: Llama models with int4 weights and a compressed KV cache, in JAX."""
