"""What does one batch of training data look like?"""

import dataclasses
from typing import Any

import jax
import numpy as np

from model.loss import IGNORE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Packed rows of documents; every field is int32 [B, T]
  (numpy on the host, jax.Array on devices).

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers,
  specs and placeholders.

  Attributes:
    tokens: inputs; 0 where segments is 0.
    targets: the token that follows in the same document, IGNORE where segments is 0.
    positions: 0, 1, .. within each segment.
    segments: 1, 2, .. for the pieces of documents in a row, in order;
      0 is padding. No attention across segments.
  """

  tokens: Any
  targets: Any
  positions: Any
  segments: Any

  @classmethod
  def empty(cls, rows: int, length: int) -> 'Batch':
    """A batch of padding only, as numpy arrays [rows, length] to be filled in."""
    shape = (rows, length)
    return cls(
      np.zeros(shape, np.int32),
      np.full(shape, IGNORE, np.int32),
      np.zeros(shape, np.int32),
      np.zeros(shape, np.int32),
    )
