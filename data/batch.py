"""What does one batch of training data look like?"""

import dataclasses
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Packed rows of documents; every field is [B, T] (numpy on the host, jax.Array on devices).

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs and
  placeholders.

  Attributes:
    tokens: int32 inputs; 0 where segments is 0.
    targets: int32, the token that follows in the same document; any valid id (the loader's is 0)
      where weights is 0.
    positions: int32, 0, 1, .. within each segment.
    segments: int32, 1, 2, .. for the pieces of documents in a row, in order; 0 is padding. No
      attention across segments.
    weights: f32, how much each target counts; 0 where none is predicted, as where segments is 0.
  """

  tokens: Any
  targets: Any
  positions: Any
  segments: Any
  weights: Any

  @classmethod
  def empty(cls, rows: int, length: int) -> 'Batch':
    """A batch of padding only, as numpy arrays [rows, length] to be filled in."""
    return cls(**{name: np.zeros((rows, length), dtype) for name, dtype in DTYPES.items()})

  @classmethod
  def abstract(
    cls, rows: int, length: int, sharding: jax.sharding.Sharding | None = None
  ) -> 'Batch':
    """What a batch of [rows, length] looks like, for programs that are compiled without one."""
    return cls(
      **{
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding)
        for name, dtype in DTYPES.items()
      }
    )


DTYPES = {
  field.name: np.dtype('float32' if field.name == 'weights' else 'int32')
  for field in dataclasses.fields(Batch)
}
