"""Do the parts of a program's memory add up to what the compiler reserves,
and is each what its sharding says?
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from analysis import memory
from model import params


def found(step):
  return memory.parts(
    step.compiled,
    {'parameters': step.state.models['policy'], 'optimizer state': step.state.optimizer},
    step.state.models['policy'],
  )


@pytest.mark.slow
def test_parts_add_up_to_the_compilers_peak(tpu_step):
  got, stats = found(tpu_step), tpu_step.compiled.memory_analysis()
  peak = (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
    + stats.generated_code_size_in_bytes
  )
  assert sum(got.parts.values()) == got.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
def test_arguments_are_what_their_shardings_say(tpu_step):
  got = found(tpu_step).parts
  model = tpu_step.state.models['policy']
  # Matrices split over fsdp and tensor, four ways; vectors are on every device.
  matrices = sum(
    math.prod(spec.shape) for spec in jax.tree.leaves(params.specs(model)) if spec.kind != 'vector'
  )
  vectors = params.count(model) - matrices
  assert got['parameters'] == 4 * (matrices // 4 + vectors)
  assert got['optimizer state'] == pytest.approx(2 * got['parameters'], abs=64)


@pytest.mark.slow
def test_all_arguments_are_accounted_for(tpu_step):
  stats = tpu_step.compiled.memory_analysis()
  # And the batch: four arrays of int32, rows split over fsdp
  exact = memory.shard_bytes(tpu_step.state) + 4 * 4 * 16 // 2 * 128
  assert exact <= stats.argument_size_in_bytes
  # The compiler pads small and narrow arrays to its tiles; no large one.
  assert stats.argument_size_in_bytes - exact < 0.1 * exact


def test_what_is_on_the_host_is_told_apart(topology):
  device = topology('v5e:2x2')[0]
  mesh = jax.sharding.Mesh([device], 'x', axis_types=(jax.sharding.AxisType.Explicit,))
  here, there = (NamedSharding(mesh, P(), memory_kind=kind) for kind in ('device', 'pinned_host'))
  x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=there)
  compiled = jax.jit(lambda x: jax.device_put(x, here) * 2).lower(x).compile()
  assert memory.shard_bytes(x) == 0 and memory.shard_bytes(x, 'host') == 2**22
  got = memory.parts(compiled, {'x': x})
  assert got.host >= 2**22 and got.parts['outputs in new memory'] == 2**22 and got.alive is None
