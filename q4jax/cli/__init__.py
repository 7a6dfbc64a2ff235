"""The command line `q4jax`: one module a command, found by its name."""
