"""`python -m q4jax` is the command `q4jax`."""

from q4jax.cli.main import process

if __name__ == "__main__":
  process()
