"""Which blocks of a GGUF file are codes of ours? Those of 32 with one scale of 16 bits.

Q8_0 is int8 and Q4_0 int4 by a scale; Q4_1 has a least number m beside it, d q + m, which with a
zero point is (q + m / d) d: the same but for the last digits. Low bits are the first 16 codes.
"""

from collections.abc import Callable

import numpy as np

from data.gguf import TYPES
from model.quantised_files.coded import Coded
from model.tensorfiles import Tensor

ENTRIES = {name: entries for name, entries, _ in TYPES.values()}  # of a block
GRIDS = {'Q8_0': 'int8', 'Q4_0': 'int4', 'Q4_1': 'int4'}


def coded(kind: str, tensor: Tensor, blocks: Callable[[int, int], np.ndarray]) -> Coded:
  """A matrix in blocks of a kind. blocks: rows -> bytes [rows, blocks, bytes]."""
  if kind not in GRIDS:
    why = f'blocks of {kind} are codes of no scheme'
    return Coded(tensor, tensor.shape, '', (1, ENTRIES[kind]), blocks, blocks, why=why)

  def halves(start, stop, at):
    return np.ascontiguousarray(blocks(start, stop)[..., at : at + 2]).view('<f2')[..., 0]

  def scales(start, stop):
    scale = halves(start, stop, 0).astype(np.float32)
    if kind != 'Q4_1':
      return scale
    # A block of one number has d = 0: its codes are 0, which stand for m as (0 + 1) m does.
    return np.where(scale == 0, halves(start, stop, 2).astype(np.float32), scale)

  def zeros(start, stop):
    d, m = (halves(start, stop, at).astype(np.float32) for at in (0, 2))
    return np.where(d == 0, -1, -m / np.where(d == 0, 1, d) - 8).astype(np.float32)

  def codes(start, stop):
    each = blocks(start, stop)
    if kind == 'Q8_0':
      return each[..., 2:].view(np.int8).reshape(stop - start, -1)
    nibbles = each[..., 2 if kind == 'Q4_0' else 4 :]
    made = np.concatenate([nibbles & 15, nibbles >> 4], -1).astype(np.int8) - 8
    if kind == 'Q4_1':
      made = np.where(halves(start, stop, 0)[..., None] == 0, np.int8(0), made)
    return made.reshape(stop - start, -1)

  return Coded(
    tensor,
    tensor.shape,
    GRIDS[kind],
    (1, ENTRIES[kind]),
    codes,
    scales,
    zeros if kind == 'Q4_1' else None,
    close=kind == 'Q4_1',
  )
