"""How is a program compiled for hardware that isn't here?
Topologies by name, and the programs that generation runs on them.

TPU programs need libtpu (the extra `plan`), GPU programs jax's CUDA plugin;
neither needs the hardware.
"""

import math
import os
import re

import jax
import jax.numpy as jnp
import jaxlib
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

import names
from decode import loop
from decode.generating import generating_model
from decode.options import CHUNK
from decode.sampling import History, make_sampling
from model import params, transformer
from model.cache import init_cache
from model.config import ModelConfig
from parallel import axes as ax

# Kinds of TPUs, with the sides of a slice at most: libtpu ends the process where there are more.
TPUS = {'v4': 3, 'v5e': 2, 'v5p': 3, 'v6e': 2, 'tpu7x': 3}
MOST_CHIPS = 100_000
HOST_CHIPS = 4  # of a host, where nothing else is said
# libtpu without a TPU: don't ask for a machine's metadata,
# and don't keep other processes from doing the same.
LIBTPU = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5p-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
GPUS = {
  'h100': """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}


def topology(name: str, slices: int = 1) -> list[jax.Device]:
  """Devices, to be compiled for only, of 'v5p:4x4x4', 'v5e:1x1', '2*v5e:8x8' (two slices) or
  'h100:1x4x8' (four nodes of eight).

  Raises ValueError for a name that is none or a shape that doesn't exist,
  ImportError where the compiler is not installed.
  """
  parts = re.fullmatch(r'(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)', name)
  if not parts:
    raise ValueError(
      f'topology={name!r} is none; write KIND:SHAPE, as in v5p:4x4x4, 2*v5e:8x8 or h100:1x1x8'
    )
  kind = names.check('topology', parts[2], (*TPUS, *GPUS))
  slices *= int(parts[1] or 1)
  sizes = [int(n) for n in parts[3].split('x')]
  if slices < 1 or min(sizes) < 1:
    raise ValueError(f'topology={name!r} has no chips; slices and sides are at least 1')
  if slices * math.prod(sizes) > MOST_CHIPS:
    raise ValueError(
      f'topology={name!r} has {slices * math.prod(sizes):,} chips, of at most {MOST_CHIPS:,}; '
      'give a smaller one'
    )
  if kind in GPUS:
    asked = _gpus(name, kind, parts[3], slices)
  else:
    asked = _tpus(name, kind, parts[3], slices)
  try:
    return list(topologies.get_topology_desc(**asked).devices)
  except Exception as error:  # plugins raise whatever they like
    first = str(error).splitlines()[0]
    # These are without libtpu, and without a plugin.
    if 'support not installed' in first or 'topology not implemented' in first:
      raise ImportError(
        f'no compiler for {asked["platform"]} is installed ({first}); pip install -e .[plan] for '
        'TPUs; for GPUs, two wheels that compile without one: pip install --no-deps '
        f'jax-cuda13-plugin=={jaxlib.__version__} jax-cuda13-pjrt=={jaxlib.__version__}'
      ) from error
    raise ValueError(f'topology={name!r}: {first}') from error


def _gpus(name: str, kind: str, shape: str, slices: int) -> dict:
  """What jax is asked for GPUs; `name`: of the topology, for errors."""
  nodes = [int(n) for n in shape.split('x')]
  if len(nodes) != 3:
    raise ValueError(f'topology={name!r}: the shape of GPUs is SLICESxNODESxGPUS, as in h100:1x4x8')
  return {
    'platform': 'cuda',
    'topology_name': '',
    'topology': f'{nodes[0] * slices}x{nodes[1]}x{nodes[2]}',
    'target_config': GPUS[kind],
  }


def _tpus(name: str, kind: str, shape: str, slices: int) -> dict:
  """What jax is asked for TPUs; sets what libtpu reads of the environment.

  name: of the topology, for errors.
  """
  sides = shape.count('x') + 1
  if not 2 <= sides <= TPUS[kind]:
    raise ValueError(
      f'topology={name!r}: a slice of {kind} has {"2 or 3" if TPUS[kind] == 3 else "2"} sides, not '
      f'{sides}; write it as in {kind}:{"x".join("4" * TPUS[kind])}'
    )
  for variable, value in LIBTPU.items():
    os.environ.setdefault(variable, value)
  if sides < TPUS[kind]:
    shape += 'x1'
  asked = {'platform': 'tpu', 'topology_name': f'{kind}:{shape}'}
  if slices > 1:
    asked['num_slices'] = slices
  if kind == 'v4':
    asked['chip_config_name'] = 'megacore'
  sizes = [int(n) for n in shape.split('x')]
  if math.prod(sizes) < HOST_CHIPS:  # a part of a host, which is all of what is there
    asked['chips_per_host_bounds'] = (*sizes, 1, 1)[:3]
  return asked


def _abstract(
  config: ModelConfig, mesh: Mesh, rows: int, context: int, weights: str, whole: bool = False
):
  """What generation holds as shapes and shardings, the matrices in the compute dtype;
  and a maker of arrays split along the rows.

  The maker is for use with the mesh in context.
  """

  def rows_of(shape):
    return NamedSharding(mesh, ax.spec('batch', *(None,) * (len(shape) - 1)))

  def row(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_of(shape))

  with jax.set_mesh(mesh):
    model = params.abstract(
      lambda: generating_model(transformer.init(config, 0), weights, whole), mesh
    )
    cache = params.abstract(lambda: init_cache(model.config, rows, context), mesh)
  return {'parameters': model, 'cache': cache}, row


def prefill(
  config: ModelConfig, mesh: Mesh, rows: int, context: int, weights: str = ''
) -> tuple[jax.stages.Lowered, dict]:
  """The program that reads `rows` prompts of `context` tokens into a cache of that size,
  and what it holds.

  Raises ValueError for a context beyond the model's longest sequence.
  """
  arrays, row = _abstract(config, mesh, rows, context, weights)
  with jax.set_mesh(mesh):
    lowered = loop.prefill.lower(
      arrays['parameters'],
      row(jnp.int32, rows, context),
      row(jnp.int32, rows),
      arrays['cache'],
      row(jnp.int32, rows),
    )
  return lowered, arrays


def decode(
  config: ModelConfig,
  mesh: Mesh,
  rows: int,
  context: int,
  weights: str = '',
  steps: int = CHUNK,
  whole: bool = False,
) -> tuple[jax.stages.Lowered, dict]:
  """The program that generates `steps` tokens of each of `rows` rows
  with a cache of `context` tokens, and what it holds.

  whole: whether matrices that fsdp splits are gathered beforehand (decode.generating).
  Raises ValueError as prefill does.
  """
  arrays, row = _abstract(config, mesh, rows, context, weights, whole)
  with jax.set_mesh(mesh):
    history = History(
      row(jnp.int32, rows, config.table_rows), row(jnp.bool_, rows, config.table_rows)
    )
    state = loop.DecodeState(
      arrays['cache'],
      row(jnp.float32, rows, config.table_rows),
      row(jnp.bool_, rows),
      row(jnp.int32, rows),
      history,
    )
    rules = loop.Rules(
      jax.tree.map(lambda x: row(x.dtype, *x.shape), make_sampling(rows)), row(jnp.int32, rows, 4)
    )
    lowered = loop.decode_chunk.lower(arrays['parameters'], state, rules, steps=steps, pad=0)
  return lowered, arrays
