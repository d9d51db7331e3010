"""How many of the entries that a step trains does it move? Below f32, an update that is less than
half the distance to the next number is lost: of bf16, all that changes an entry by under 0.2%.
"""

import jax
import jax.numpy as jnp
import numpy as np

from model.params import named_leaves
from training import state as states
from training.config import Config
from training.state import TrainState

MOST = 2**22  # entries of a parameter that are looked at, about


class Moved:
  """Compares the parameters that are trained in less than f32 before and after a step, some entries
  of each. Made before the step, which may take the state over.
  """

  def __init__(self, config: Config, state: TrainState):
    trained, _ = states.rule(config).parted(state.models)
    leaves = named_leaves(trained)
    self._names = [name for name, x in leaves.items() if x.dtype != jnp.float32]
    self._types = sorted({str(leaves[name].dtype) for name in self._names})
    self._before = [_sampled(leaves[name]) for name in self._names]

  def lines(self, state: TrainState) -> list[str]:
    """For the log, of the state after the step; none where all is trained in f32."""
    if not self._names:
      return []
    leaves = named_leaves(state.models)
    after = [_sampled(leaves[name]) for name in self._names]
    moved = sum(int((x != y).sum()) for x, y in zip(self._before, after, strict=True))
    share = moved / sum(x.size for x in after)
    return [
      f'step {int(state.step)} moved {share:.1%} of the entries trained in {"/".join(self._types)} '
      '(of a sample); what the others were to move was lost to rounding. '
      '--config.model.execution.parameter_dtype=float32 keeps it'
    ]


def _sampled(x: jax.Array) -> np.ndarray:
  """Entries of what one device of this process has of a parameter, on the host."""
  part = x.addressable_shards[0].data
  if part.size > MOST:
    part = part[: max(1, MOST * part.shape[0] // part.size)]
  return np.array(part)  # a copy: the step may take the parameter's memory
