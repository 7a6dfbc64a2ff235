"""Eviction policies, one a file, found by `q4jax.kv.policy.get_policy` without a list."""
