"""Models as StableHLO: written here, and run by a script that needs neither q4jax nor flax."""
