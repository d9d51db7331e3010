"""What can be chosen of how our flash attention works? Blocks of queries and keys, by the width of
heads, and sums in a certain order.

What is chosen is taken exactly or refused. Where nothing is, the kernels' tables say:
kernels.tuning for TPUs, kernels.flash_gpu.
"""

import dataclasses

# Of TPUs: queries are those of all heads of a step, stacked, in blocks of 128, 256, 512 or 1024 a
# head.
LARGEST = 1024
TPU = {
  f'{direction}_{what}': sizes
  for direction in ('forward', 'backward')
  for what, sizes in (
    ('queries', tuple(range(128, LARGEST + 1, 128))),
    ('keys', (128, 256, 512, 1024)),
  )
}
# Of Hopper GPUs, by the widest head: what fits shared memory and compiles without a spill under
# every mask. Products have 64 rows a warpgroup, and two of these share a tile. Backward, 32 queries
# do not compile in the fused kernel of heads of up to 128, and more spill.
GPU = {
  64: {
    'forward_queries': (128,),
    'forward_keys': (64, 128, 256),
    'backward_queries': (64,),
    'backward_keys': (128,),
  },
  128: {
    'forward_queries': (128,),
    'forward_keys': (64, 128),
    'backward_queries': (64,),
    'backward_keys': (128,),
  },
  256: {
    'forward_queries': (128,),
    'forward_keys': (64,),
    'backward_queries': (32,),
    'backward_keys': (128,),
  },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """Sizes of what our kernels work on at a time; 0: as the kernel's own table says.

  Attributes:
    forward_queries, forward_keys: of a step; on a TPU queries of all heads of a step together, on a
      GPU of one head.
    backward_queries, backward_keys: the same of the gradients. On a GPU, where queries' gradients
      have a kernel of their own (see kernels.flash_gpu.backward), that one's blocks are not chosen
      by these.
    deterministic: gradients are the same bits every time. On a GPU ours of queries are added up in
      main memory otherwise, in no certain order; for two products of seven more they have a kernel
      of their own. All other backends but cuDNN's are deterministic anyway.
  """

  forward_queries: int = 0
  forward_keys: int = 0
  backward_queries: int = 0
  backward_keys: int = 0
  deterministic: bool = False

  def of(self, direction: str) -> tuple[int, int]:
    """Queries and keys of the 'forward' or the 'backward' kernel."""
    return getattr(self, f'{direction}_queries'), getattr(self, f'{direction}_keys')


def check(blocks: Blocks, backend: str, width: int) -> None:
  """Raises where a backend does not take the blocks for heads so wide: NotImplementedError if it
  has none to choose, else ValueError.
  """
  if blocks.deterministic and backend in ('auto', 'xla'):
    raise NotImplementedError(
      'model.execution.attention_blocks.deterministic=True: '
      f'model.execution.attention={backend!r} may be cuDNN, which adds gradients up in no certain '
      'order; '
      f'set it to one of {[*SIZES, "blocked", "reference"]}'
    )
  chosen = {
    name: size
    for name, size in dataclasses.asdict(blocks).items()
    if size and name != 'deterministic'
  }
  if not chosen:
    return
  if backend not in SIZES:
    raise NotImplementedError(
      f'model.execution.attention_blocks chooses {chosen}, and '
      f'model.execution.attention={backend!r} is no backend whose blocks can be chosen; set it to '
      f'one of {list(SIZES)}, or leave the blocks 0'
    )
  sizes = SIZES[backend](width)
  for name, size in chosen.items():
    if size not in sizes.get(name, ()):
      raise ValueError(
        f'model.execution.attention_blocks.{name}={size}: backend {backend} has '
        f'{list(sizes.get(name, ()))} for heads {width} wide; '
        'choose one of them, or 0 for what its table says'
      )


SIZES = {
  'pallas_tpu': lambda width: TPU,
  'pallas_gpu': lambda width: next((sizes for widest, sizes in GPU.items() if width <= widest), {}),
}
