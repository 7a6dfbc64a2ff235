"""The Flax Llama. It knows no file."""
