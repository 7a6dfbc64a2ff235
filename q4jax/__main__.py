"""`python -m q4jax` is the command `q4jax`."""

import sys

from q4jax.cli.main import main

if __name__ == "__main__":
  sys.exit(main())
