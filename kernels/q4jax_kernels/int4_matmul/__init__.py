"""Matrix products with quantised weights."""

from q4jax_kernels.int4_matmul.api import IMPLEMENTATIONS, int4_matmul, take_rows

__all__ = ["IMPLEMENTATIONS", "int4_matmul", "take_rows"]
