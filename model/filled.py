"""How is a parameter filled with rows of tensors? Numbers as they come, codes as weights hold them.

A weight's arrays are filled one by one: codes, scales and zero points, each where its blocks are.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.families.layout import Layout
from model.quantised_files.coded import Piece
from model.stream import Filling, Region
from model.weights import Weight, read
from model.weights.grids import GRIDS, packed
from model.weights.int8 import Int8


class Numbers:
  """A parameter of numbers.

  of_codes: whether it is filled with codes.
  """

  of_codes = False

  def __init__(self, x):
    self._filling = Filling(x)

  def step(self, layout: Layout) -> int:
    """Of what the first name of a tensor is read in multiples."""
    del layout
    return 1

  def wants(self, region: Region) -> bool:
    """Whether a device of this process holds a part of a region."""
    return self._filling.wants(region)

  def put(self, layout: Layout, rows: np.ndarray, region: Region) -> None:
    """Writes rows of a tensor, which are the region here."""
    self._filling.put(layout.bring(rows), region)

  def value(self):
    return self._filling.array()


class InCodes:
  """A parameter in codes: the same, with a Piece for rows."""

  of_codes = True

  def __init__(self, weight: Weight):
    """weight: Codes or Int8, its arrays abstract."""
    self._weight = weight
    fields = [field.name for field in dataclasses.fields(weight)]
    arrays = {name: getattr(weight, name) for name in fields if name in PARTS}
    self._fillings = {name: Filling(x) for name, x in arrays.items() if x is not None}
    rank = len(weight.shape)
    if isinstance(weight, Int8):
      self._blocks = tuple(
        size if n - rank in weight.summed else 1 for n, size in enumerate(weight.shape)
      )
      self._halved = 0
    else:
      self._blocks = (1,) * (rank - len(weight.blocks)) + weight.blocks
      self._halved = weight.packs if GRIDS[weight.grid].packed else 0

  def step(self, layout: Layout) -> int:
    name = layout.lengths[0][0]
    at = [n - len(layout.here) for n, of in enumerate(layout.here) if of == name]
    return math.lcm(*(self._blocks[n] for n in at))

  def wants(self, region: Region) -> bool:
    return any(filling.wants(self._of(name, region)) for name, filling in self._fillings.items())

  def put(self, layout: Layout, rows: Piece, region: Region) -> None:
    """Writes rows of a tensor, which are the region here, and end where blocks do."""
    blocks = self._blocks[len(self._blocks) - len(layout.here) :]
    first = tuple(slice(None, None, block) for block in blocks)  # one of each block has its scale
    codes = np.ascontiguousarray(layout.bring(rows.codes))
    if self._halved:
      codes = np.asarray(packed(jnp.asarray(codes), self._halved, blocks[self._halved]))
    scale = layout.bring(rows.scale)[first]
    zero = np.zeros_like(scale) if rows.zero is None else layout.bring(rows.zero)[first]
    values = {'codes': codes, 'values': codes, 'scale': scale, 'zero': zero}
    for name, filling in self._fillings.items():
      filling.put(values[name], self._of(name, region))

  def value(self) -> Weight:
    arrays = {name: filling.array() for name, filling in self._fillings.items()}
    return dataclasses.replace(self._weight, **arrays)

  def _of(self, name: str, region: Region) -> Region:
    """Of one of the weight's arrays, what a region of its numbers is."""
    sizes = list(self._blocks)
    if name in ('codes', 'values'):
      sizes = [1] * len(sizes)
      if self._halved:
        sizes[self._halved] = 2
    return tuple(
      (start // size, -(-stop // size)) for (start, stop), size in zip(region, sizes, strict=True)
    )


PARTS = ('codes', 'values', 'scale', 'zero')


def filling(p: nnx.Param) -> Numbers | InCodes:
  """Of a parameter, whose arrays are abstract and have shardings."""
  weight = read(p)
  return InCodes(weight) if weight.coded else Numbers(p.get_value())
