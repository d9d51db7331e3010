"""How long does a token of a model take on a chip that isn't here? By its compiler's schedule, and
without planning a run.
"""

from analysis import aot, hardware, roofline
from analysis.hlo import Module
from decode.generating import generating
from decode.options import CHUNK
from model.config import ModelConfig
from parallel.mesh import MeshConfig, make_mesh


def ms_per_token(
  config: ModelConfig, topology: str, weights: str = '', rows: int = 1, context: int = 2048
) -> float:
  """Milliseconds of a step of `rows` rows with full caches of `context` tokens, in bfloat16, every
  matrix split over all devices of the topology ('v6e:1x1'; see analysis.aot.topology).

  weights: a scheme of all matrices (model.weights.scheme.everywhere); default: as config stores
    them.
  Raises ImportError where no compiler for it is installed, ValueError for what is no topology or
  does not split, jax.errors.JaxRuntimeError (RESOURCE_EXHAUSTED) for what does not fit.
  """
  devices = aot.topology(topology)
  config = generating(config.with_execution(dtype='bfloat16', parameter_dtype='bfloat16'))
  mesh = make_mesh(MeshConfig(data=1, tensor=len(devices)), devices)
  config.check_parameters(dict(mesh.shape))
  lowered, _ = aot.decode(config, mesh, rows, context, weights)
  chip = hardware.of_device(devices[0])
  module = Module(lowered.compile().as_text())
  return roofline.predict(module, mesh, chip, config.execution.dtype).seconds / CHUNK * 1e3
