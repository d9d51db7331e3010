"""How does a network run? ExecutionConfig: precision, kernels, what is kept for the backward pass,
stages.

None of it says what the network is: the same parameters under another ExecutionConfig are the same
function, up to rounding.
"""

import dataclasses

from kernels.attention import HONOURS
from kernels.blocks import Blocks
from kernels.grouped_matmul import BACKENDS
from kernels.strategies import STRATEGIES
from model.parts import check
from parallel.pipeline import PipelineConfig
from parallel.remat import POLICIES, Remat

CHOICES = {
  'dtype': ('float32', 'bfloat16', 'float16'),
  'parameter_dtype': ('float32', 'bfloat16'),
  'attention': ('auto', *HONOURS),
  'context': STRATEGIES,
  'experts': ('auto', *BACKENDS),
  'remat': tuple(POLICIES),
}
# What may change when a run goes on. The others decide what lies in its checkpoints: of which
# precision parameters are, one by one or stacked, and whether a loss scale is with them.
FREE = (
  'attention',
  'attention_blocks',
  'context',
  'experts',
  'remat',
  'remat_save',
  'remat_offload',
  'pipeline',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
  """How a network runs; what has to fit together with its sizes is checked by ModelConfig.

  Attributes:
    dtype: of activations and matrix products. parameter_dtype: of what the optimizer updates.
    attention: backend of kernels.attention. attention_blocks: what its kernels work on at a time,
      see kernels.blocks.
    context: how devices that share a row attend to all of it (kernels.context).
    experts: backend of kernels.grouped_matmul, by which experts multiply their tokens.
    remat, remat_save, remat_offload: what is kept of each block for the backward pass, see
      parallel.remat.Remat.
    stored: how matrices lie in memory and in checkpoints, PATTERN=SCHEME each
      (model/weights/scheme.py); such a model generates, and is a base for adapters. Default: as
      numbers of parameter_dtype.
    pipeline: see parallel.pipeline. scan: layers of a kind are stacked, and one program runs over
      them; False: each has its own, whose matrices decoding reads where they lie, and which takes
      the longer to compile the more layers there are.

  Raises ValueError for a name that is unknown, and where remat's names do not go together.
  """

  dtype: str = 'float32'
  parameter_dtype: str = 'float32'
  stored: tuple[str, ...] = ()
  attention: str = 'auto'
  attention_blocks: Blocks = Blocks()
  context: str = 'ring'
  experts: str = 'auto'
  remat: str = 'none'
  remat_save: tuple[str, ...] = ()
  remat_offload: tuple[str, ...] = ()
  pipeline: PipelineConfig = PipelineConfig()
  scan: bool = True

  def __post_init__(self):
    check('model.execution', self, CHOICES)
    self.kept

  @property
  def kept(self) -> Remat:
    """What is kept of each block."""
    return Remat(self.remat, self.remat_save, self.remat_offload)
