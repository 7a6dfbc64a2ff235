"""The kernels of q4jax: arrays in, arrays out. They know no model and no file."""
