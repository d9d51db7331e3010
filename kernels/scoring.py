"""What does a call ask of attention beyond q, k and v? One value, which every backend honours whole
or refuses.

B batch · T query length · S key length · N query heads · H head width
"""

import dataclasses
from typing import Any

import jax

from kernels.mask import Mask


@dataclasses.dataclass(frozen=True)
class Scoring:
  """From products of queries and keys to the weights of values: softmax(cap(scale q k + relative),
  masked, beside the sinks).

  It says what is computed. How (backend, blocks and whether gradients are deterministic, what
  devices do that share a row) stays beside it, in arguments of their own: that changes speed,
  memory and rounding but never the meaning, it has no arrays, and a backend sees only the part that
  it was chosen by, so that in one value it would be unpacked at every step.

  Attributes:
    mask: who sees whom (kernels.mask.Mask).
    softcap: cap * tanh(score / cap), 0 for none; a number when attention is traced.
    sinks: [N], a logit per query head that takes part in the softmax and carries no value
      (gpt-oss); None: none.
    relative: scores by distance (kernels.mask.Relative), added to the scaled products before the
      cap; None: none.
    dropout: what is left out of the weights (kernels.draws.Dropout); None: nothing.
    scale: of q k; None: H ** -0.5. Our kernels and cuDNN's want a number, the other backends
      take what is traced, too.

  The numbers are static: they are part of the tree's structure, so that what is compiled or
  differentiated knows them. Arrays are leaves. The fields are annotated Any because JAX rebuilds
  registered dataclasses with tracers, specs and placeholders.
  """

  mask: Any = Mask()
  _: dataclasses.KW_ONLY
  softcap: Any = 0.0
  sinks: Any = None
  relative: Any = None
  scale: Any = None
  dropout: Any = None

  def fields(self) -> set[str]:
    """The parts that are set, in the words of kernels.attention.HONOURS: what a backend must
    honour.
    """
    named = {
      'softcap': self.softcap,
      'sinks': self.sinks is not None,
      'relative': self.relative is not None,
      'dropout': self.dropout is not None,
      # Distances, too, are of where tokens are.
      'zigzag': self.relative is not None
      and self.mask.zigzag != 1
      and self.mask.query_positions is None,
    }
    return self.mask.fields() | {name for name, is_set in named.items() if is_set}

  def scaled(self, width: int) -> 'Scoring':
    """With a scale, for heads this wide."""
    return self if self.scale is not None else dataclasses.replace(self, scale=width**-0.5)

  def check(self, B: int, T: int, S: int, N: int) -> None:
    """Raises ValueError where a part does not fit B rows of T queries of N heads and S keys, or is
    no number that must be one.
    """
    mask, softcap, sinks = self.mask, self.softcap, self.sinks
    if isinstance(softcap, jax.core.Tracer):
      raise ValueError(
        f'softcap={softcap} must be a number when attention is traced: '
        'make it static, or close over it'
      )
    if softcap < 0:
      raise ValueError(f'softcap={softcap} must be positive, or 0 for none')
    if sinks is not None and sinks.shape != (N,):
      raise ValueError(f'sinks{list(sinks.shape)} must be [{N}], one for each query head')
    for side, length in (('query', T), ('key', S)):
      for part in ('segments', 'positions'):
        x = getattr(mask, f'{side}_{part}')
        if x is not None and x.shape not in ((B, length), (1, length)):
          raise ValueError(
            f'mask.{side}_{part}{list(x.shape)} must be [{B}, {length}], '
            f'an entry for each {side} of each row'
          )
    if mask.prefix is not None and mask.prefix.shape != (B,):
      raise ValueError(f'mask.prefix{list(mask.prefix.shape)} must be [{B}], one for each row')


jax.tree_util.register_dataclass(
  Scoring, data_fields=['mask', 'sinks', 'relative', 'dropout'], meta_fields=['softcap', 'scale']
)
