"""Layouts made when loading hold the very values of the file's blocks."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from q4jax_kernels.block_array import BlockArray
from q4jax_kernels.int4_matmul.prepare import layout_for, prepared
from q4jax_kernels.planar_array import PlanarArray
from q4jax_kernels.row_planar_array import RowPlanarArray
from random_blocks import dequantize, random_rows

TAKEN = ("q4_0", "q4_1", "q4_k", "q5_k", "q6_k", "q8_0")


@pytest.mark.parametrize(
  ("platform", "capability", "layout"),
  [
    ("tpu", None, "planes"),
    ("gpu", "9.0", "row_planes"),
    ("gpu", "8.0", "rows"),
    ("gpu", "7.5", "rows"),
    ("cpu", None, "rows"),
  ],
)
def test_the_device_decides(platform, capability, layout):
  device = SimpleNamespace(platform=platform, compute_capability=capability)
  assert layout_for(device) == layout


@pytest.mark.parametrize("layout", ["planes", "row_planes", "rows"])
@pytest.mark.parametrize("format", [*TAKEN, "iq4_nl", "q3_k"])
def test_values_are_those_of_gguf(format, layout):
  blocks = random_rows(np.random.default_rng(0), format, 64, 512)
  made = prepared(blocks, format, jax.devices()[0], layout)
  kinds = {"planes": PlanarArray, "row_planes": RowPlanarArray, "rows": BlockArray}
  assert type(made) is (kinds[layout] if format in TAKEN else BlockArray)
  np.testing.assert_array_equal(made.dequantize(), dequantize(blocks, format))


def test_a_shape_that_the_kernel_refuses_stays_in_blocks():
  blocks = random_rows(np.random.default_rng(0), "q4_k", 40, 256)  # Not 64 rows.
  made = prepared(blocks, "q4_k", jax.devices()[0], "row_planes")
  assert isinstance(made, BlockArray)
