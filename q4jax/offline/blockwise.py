"""The methods that quantise a block while text flows through it."""

from collections.abc import Callable, Mapping

import jax

from q4jax.offline.layerwise import LayerRunner
from q4jax.quant.grid import Floats, Grid, GroupArray

# (runner at the block, its parameters, grid) -> all its parameters anew: matrices on the grid,
# vectors in float32.
BlockMethod = Callable[[LayerRunner, Mapping[str, jax.Array], Grid], dict[str, GroupArray | Floats]]
BLOCK_METHODS: Mapping[str, BlockMethod] = {}
