"""Package data: the embedded model and the figures measured with it."""
