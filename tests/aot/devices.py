"""Devices that are not here, for which XLA compiles all the same: ahead of time.

A package of the vendor's holds the compiler; no driver and no device is needed. `make aot` installs
what the targets below need into an environment of its own.
"""

import functools
import importlib.util
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# libtpu asks a cloud for its machine unless told not to, and locks out other processes.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# The plugin for GPUs would look for CUDA's libraries.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


@dataclass(frozen=True)
class Target:
  """What `jax.experimental.topologies.get_topology_desc` is asked for, and the module behind it."""

  platform: str
  module: str
  options: dict[str, Any] = field(default_factory=dict)


def _tpu(name: str) -> Target:
  chip = {"topology_name": f"{name}:1x1", "chips_per_host_bounds": (1, 1, 1)}
  return Target("tpu", "libtpu", chip)


def _gpu(name: str) -> Target:
  config = (Path(__file__).parent / f"{name}.textproto").read_text()
  options = {"target_config": config, "topology": "1x1x1"}
  return Target("cuda", "jax_cuda13_plugin", options)


TARGETS = {name: _tpu(name) for name in ("v5e", "v6e")} | {
  name: _gpu(name) for name in ("h200", "a100", "t4")
}


@functools.cache
def device(name: str) -> SingleDeviceSharding:
  """One device of the target, as the sharding of arguments to compile for. Skips without it."""
  target = TARGETS[name]
  if importlib.util.find_spec(target.module) is None:
    pytest.skip(f"{name} needs {target.module}, which is not installed; `make aot` does that")
  topology = topologies.get_topology_desc(platform=target.platform, **target.options)
  return SingleDeviceSharding(topology.devices[0])


def on(tree: Any, name: str) -> Any:
  """The tree's arrays, or their shapes, as shapes on that device."""
  sharding = device(name)
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def figures(compiled: jax.stages.Compiled) -> dict[str, int]:
  """What the compiler says of a program, in bytes and operations; kernels by their own estimates.

  `vmem` is the most scratch memory of a core that one kernel takes, `temp` what the program
  allocates in the device's memory besides arguments and results.
  """
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  scoped = re.findall(r'"used_scoped_memory_configs":\[\{[^]]*?"size":"(\d+)"', compiled.as_text())
  return {
    "vmem": max(map(int, scoped), default=0),
    "temp": memory.temp_size_in_bytes,
    "arguments": memory.argument_size_in_bytes,
    "result": memory.output_size_in_bytes,
    "code": memory.generated_code_size_in_bytes,
    "flops": int(cost.get("flops", 0)),
    "bytes": int(cost.get("bytes accessed", 0)),
  }


def float_sizes(compiled: jax.stages.Compiled) -> set[int]:
  """The numbers of elements of all float arrays anywhere in the compiled program."""
  shapes = re.findall(r"\b(?:bf16|f16|f32|f64)\[([\d,]+)\]", compiled.as_text())
  return {math.prod(map(int, shape.split(","))) for shape in shapes}
