"""What is drawn while a network trains? What it leaves out (model/dropout.py), what an adapter's A
does not see, and noise on embeddings; by keys of (row, layer, site), so that microbatches, devices,
stages and the backward pass draw the same.

A `Drawn` is put on a model for a call in a step; a model without is as it generates and is judged.

B batch · T length · D width · R layers that a scan repeats
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt32

from kernels import draws
from model.attention import View
from model.dropout import Rates
from model.params import is_param
from model.weights import read
from model.weights.low_rank import LowRank
from parallel import axes as ax

# What is drawn apart in a layer, by whose rate. The order is part of every key.
SITES = {
  'neftune': '',
  'embedding': 'embedding',
  'attention': 'residual',
  'cross': 'residual',
  'feed_forward': 'residual',
  'hidden': 'feed_forward',
  'weights': 'attention',
  'cross_weights': 'attention',
}
NUMBERS = {name: i for i, name in enumerate(SITES, 1)}
MATRICES = 32  # the first number of those with an adapter: no site has it
ENCODER = 2**16  # what an encoder's layers are counted from


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
  """Attributes:
  keys: [B, 2] uint32, of the rows in this step (Any: see kernels.mask.Mask).
  rates: of what the network leaves out. adapter: of A's inputs that it does not see.
  neftune: alpha, see `embedded`.
  layer: the number of the one that is drawn in; None outside of layers. first: of the stack.
  parts: n, where tokens lie as kernels.mask.zigzag(T, n) says.
  """

  keys: Any
  layer: Any = None
  rates: Rates = dataclasses.field(default=Rates(), metadata={'static': True})
  adapter: float = dataclasses.field(default=0.0, metadata={'static': True})
  neftune: float = dataclasses.field(default=0.0, metadata={'static': True})
  first: int = dataclasses.field(default=0, metadata={'static': True})
  parts: int = dataclasses.field(default=1, metadata={'static': True})

  # 1. At a site.

  def at(self, number: int) -> UInt32[Array, 'B 2']:
    """Keys of a site of this layer."""
    layer = self.first if self.layer is None else self.layer
    return draws.folded(self.keys, number, layer)

  def dropout(self, site: str) -> draws.Dropout | None:
    """What a site leaves out; None for nothing."""
    rate = getattr(self.rates, SITES[site])
    if not rate:
      return None
    return draws.Dropout(keys=self.at(NUMBERS[site]), rate=rate, parts=self.parts)

  def dropped(self, x: Float[Array, 'B T *S'], site: str) -> Float[Array, 'B T *S']:
    """What a site lets through."""
    dropout = self.dropout(site)
    return x if dropout is None else dropout.of_tokens(x)

  # 2. Before the first layer.

  def entered(
    self, x: Float[Array, 'B T D'], view: View, encoder: bool
  ) -> tuple[Float[Array, 'B T D'], View]:
    """What enters a stack of embeddings, and what its layers share, these draws included.

    Raises ValueError for other rows than those of the keys.
    """
    if len(x) != len(self.keys):
      raise ValueError(
        f'{len(x)} rows enter a model that draws for {len(self.keys)}: train.dropout, '
        'adapter.dropout and objective.neftune_alpha are of objectives that call a model with the '
        'rows of a batch'
      )
    first, parts = ENCODER if encoder else 0, view.mask.zigzag
    drawn = dataclasses.replace(self, first=first, parts=parts)
    x = drawn.dropped(drawn.embedded(x, view.mask.query_segments), 'embedding')
    return x, dataclasses.replace(view, drawn=drawn)

  def embedded(self, x: Float[Array, 'B T D'], segments: Array | None) -> Float[Array, 'B T D']:
    """Embeddings with noise of U(-1, 1) alpha / sqrt(T D) on them, T the tokens of an example: a
    segment, or a row without (NEFTune, Jain et al., arXiv:2310.05914, algorithm 1).
    """
    if not self.neftune:
      return x
    noise = draws.uniform(draws.by_token(self.at(NUMBERS['neftune']), x, self.parts))
    if segments is None:
      lengths = jnp.full((1, 1, 1), x.shape[1], jnp.float32)
    else:
      # Compared and summed at once: T x T numbers are never in memory.
      everyone = ax.place(segments, 'batch', None)
      same = segments[:, :, None] == everyone[:, None, :]
      lengths = ax.place(same.sum(-1, dtype=jnp.float32), *ax.residual(x.shape[1])[:2])[..., None]
    return x + (noise * self.neftune * jax.lax.rsqrt(lengths * x.shape[2])).astype(x.dtype)

  # 3. In layers.

  def numbered(
    self, blocks: Sequence, periods, scan: int, axis: str | None, shared: int = 1
  ) -> tuple:
    """Blocks of the scan of this number, stacked by layers, each with what its layer is counted as.

    periods: of the stack, ((kinds, repeats), ..). axis: that the layers are split over. shared: how
      many layers each of the stacked is, of which this is the number of the first.
    """
    before = sum(len(kinds) * repeats for kinds, repeats in periods[:scan])
    kinds, repeats = periods[scan]
    counted = []
    for place, block in enumerate(blocks):
      each = jnp.arange(0, repeats, shared, dtype=jnp.uint32)
      numbers = each * len(kinds) + (self.first + before + place)
      counted.append(NumberedBlock(block, nnx.Variable(ax.place(numbers, axis), kind='number')))
    return tuple(counted)

  def used(self, blocks: tuple, i: Array) -> tuple:
    """Numbered blocks, not stacked, when they are used the i-th time."""
    return tuple(
      NumberedBlock(block.block, nnx.Variable(block.number[...] + i, kind='number'))
      for block in blocks
    )

  def of_layer(self, number: Array) -> 'Drawn':
    """The same in a layer."""
    return dataclasses.replace(self, layer=number)

  def on_adapter(self, block):
    """A layer whose matrices with an adapter on them leave out some of what A sees."""
    if not self.adapter:
      return block
    leaves, structure = jax.tree.flatten(block, is_leaf=is_param)

    def put(i, p):
      weight = read(p)
      if not isinstance(weight, LowRank):
        return p
      keys = self.at(MATRICES + i)
      dropout = draws.Dropout(keys=keys, rate=self.adapter, parts=self.parts)
      return p.replace(dataclasses.replace(weight, dropout=dropout))

    return jax.tree.unflatten(structure, [put(i, p) for i, p in enumerate(leaves)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NumberedBlock:
  """A block, or a stack of them, that knows which layer it is; called as one."""

  block: Any
  number: Any

  def __call__(self, x, view: View, slots):
    drawn = view.drawn.of_layer(self.number[...])
    return drawn.on_adapter(self.block)(x, dataclasses.replace(view, drawn=drawn), slots)


def put(model, drawn: Drawn):
  """A model that draws when it is called; its parameters are those of `model`."""
  model = jax.tree.map(lambda x: x, model)  # a copy
  model.drawn = nnx.data(drawn)
  return model
