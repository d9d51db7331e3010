"""What does one batch of training data look like?"""

import dataclasses
import functools
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
    targets: int32, the token that follows in the same document; any id (the loader's is 0 where
      nothing follows), virtual ones included, where weights is 0.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceBatch(Batch):
  """A batch for an encoder-decoder: the rows are the decoder's, and each has what the encoder reads
  beside it, [B, S].

  Attributes:
    source: int32 inputs; 0 where source_segments is 0.
    source_positions, source_segments: of the source, as of the rows; the tokens of a segment see
      the source of the same number.
  """

  source: Any
  source_positions: Any
  source_segments: Any

  @classmethod
  def empty(cls, rows: int, length: int, source_length: int) -> 'SourceBatch':
    return cls(**vars(Batch.empty(rows, length)), **_sources(np.zeros, rows, source_length))

  @classmethod
  def abstract(
    cls,
    rows: int,
    length: int,
    source_length: int,
    sharding: jax.sharding.Sharding | None = None,
  ) -> 'SourceBatch':
    shape_of = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    batch = Batch.abstract(rows, length, sharding)
    return cls(**vars(batch), **_sources(shape_of, rows, source_length))


def _sources(make, rows, length):
  names = [field.name for field in dataclasses.fields(SourceBatch) if field.name not in DTYPES]
  return {name: make((rows, length), np.int32) for name in names}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelBatch(Batch):
  """A batch whose targets are words of labels; every row has them all beside it, [B, W].

  Attributes:
    choices: int32, ids of the words of all labels.
    labels: int32, the number of each one's label.
  """

  choices: Any
  labels: Any

  @classmethod
  def empty(cls, rows: int, length: int, words: int) -> 'LabelBatch':
    empty = np.zeros((2, rows, words), np.int32)
    return cls(**vars(Batch.empty(rows, length)), choices=empty[0], labels=empty[1])

  @classmethod
  def abstract(
    cls, rows: int, length: int, words: int, sharding: jax.sharding.Sharding | None = None
  ) -> 'LabelBatch':
    each = jax.ShapeDtypeStruct((rows, words), np.int32, sharding=sharding)
    return cls(**vars(Batch.abstract(rows, length, sharding)), choices=each, labels=each)
