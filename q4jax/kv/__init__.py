"""The compressed KV cache: what is kept, how it is stored, where it lies."""
