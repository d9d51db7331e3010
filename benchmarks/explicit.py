"""What do explicit axes cost? The train step compiled for TPUs that aren't here,
against the same code under automatic axes.

    python -m benchmarks.explicit [--topology v5p:2x2x4] [--layers 8] [--json FILE]

Llama 3 8B with fewer layers, one sequence of 8,192 tokens a chip, remat `full`. Under explicit axes
every array's layout is part of its type; under automatic ones XLA's partitioner (Shardy) completes
the few that are stated. Needs libtpu (the extra `plan`), no TPU.
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import dataclasses

from jax.sharding import AxisType

import commands
import plan
from analysis import aot
from configs.models import llama3_8b
from parallel.mesh import MeshConfig

MESHES = {'fsdp': {}, 'fsdp x tensor': {'tensor': 4}}
TWINS = {'explicit': AxisType.Explicit, 'automatic': AxisType.Auto}


def compiled(
  topology: str, layers: int, mesh: dict[str, int], axis_type: AxisType
) -> dict[str, float]:
  """What the compiler shows of a step: peak memory and collectives in GB, seconds of XLA's
  operations and of the whole as predicted.
  """
  config, devices = llama3_8b.get_config(), aot.topology(topology)
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, layers=layers),
    mesh=MeshConfig(data=1, fsdp=-1, **mesh),
    data=dataclasses.replace(config.data, batch_size=len(devices)),
    # As it comes: a table of options is of meshes, and would be of one of the two.
    train=dataclasses.replace(config.train, compiler=('none',)),
  )
  made = plan.make_plan(config, devices, axis_type=axis_type)
  return {
    'peak GB': made.memory.peak / 1e9,
    'collectives GB': sum(c.total for c in made.collectives) / 1e9,
    'operations s': made.prediction.operations,
    'step s': made.prediction.seconds,
  }


def main():
  parser = commands.parser(__doc__)
  parser.add_argument('--topology', default='v5p:2x2x4')
  parser.add_argument('--layers', type=int, default=8)
  options = parser.parse_args()
  results = {
    name: {
      twin: compiled(options.topology, options.layers, mesh, kind) for twin, kind in TWINS.items()
    }
    for name, mesh in MESHES.items()
  }

  rows = []
  for name, twins in results.items():
    rows += [[f'{name}, {twin}', *costs.values()] for twin, costs in twins.items()]
    ratios = [cost / twins['automatic'][kind] for kind, cost in twins['explicit'].items()]
    rows.append(['  explicit over automatic', *ratios])
  commands.table(
    f'Llama 3 8B, {options.layers} layers, {options.topology}',
    ['mesh', *next(iter(results['fsdp'].values()))],
    rows,
  )
  commands.write_json(
    options.json, 'explicit', {'topology': options.topology, 'layers': options.layers, **results}
  )


if __name__ == '__main__':
  main()
