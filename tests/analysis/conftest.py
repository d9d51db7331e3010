"""Steps of a tiny model, compiled for hardware that isn't here;
skipped, and said so, where its compiler is not installed.
"""

import dataclasses
from typing import Any

import jax
import pytest

from analysis import hardware
from data.config import DataConfig, TokenizerConfig
from model.config import ModelConfig
from model.execution import ExecutionConfig
from parallel.mesh import MeshConfig, make_mesh
from training.config import Config
from training.program import lower_step

TINY = Config(
  model=ModelConfig(
    vocabulary=512,
    width=256,
    layers=3,
    heads=2,
    kv_heads=2,
    feed_forward=512,
    execution=ExecutionConfig(dtype='bfloat16', attention='reference'),
  ),
  data=DataConfig(sequence_length=128, batch_size=16, tokenizer=TokenizerConfig(kind='byte')),
  mesh=MeshConfig(data=1, fsdp=2, tensor=2),
)


@dataclasses.dataclass(frozen=True)
class Step:
  config: Config
  mesh: jax.sharding.Mesh
  chip: hardware.Chip
  state: Any
  compiled: jax.stages.Compiled
  text: str


@pytest.fixture(scope='session')
def compile_step(topology):
  def compile_step(name, config=TINY):
    devices = topology(name)
    mesh = make_mesh(config.mesh, devices)
    lowered, state = lower_step(config, mesh)
    compiled = lowered.compile()
    chip = hardware.of_device(devices[0])
    return Step(config, mesh, chip, state, compiled, compiled.as_text())

  return compile_step


@pytest.fixture(scope='session')
def tpu_step(compile_step):
  """On four TPU v5e, fsdp 2 x tensor 2, without remat."""
  return compile_step('v5e:2x2')
