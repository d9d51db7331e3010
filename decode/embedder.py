"""What is a text to a model, as one vector? What the model's last layer has of its tokens, pooled:
their mean, or that of the first token, or of the last, which in a decoder has seen all others.

Texts are read by programs of few lengths and of one number of rows: a text's vector depends on its
own length, never on who else is read.

R rows · T length · D width
"""

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode.front import Front
from decode.loaded import LoadedModel
from decode.sizes import lengths_to
from model.vocabulary import TOKENS
from model.weights import of_rows
from parallel import axes as ax
from parallel.gathering import everywhere

POOLINGS = ('mean', 'first', 'last')
ROWS = 4  # of each part of the mesh


def check_pooling(pooling: str, causal: bool) -> None:
  """Raises ValueError for one that makes no sense of such a model."""
  if pooling not in POOLINGS:
    raise ValueError(f'pooling={pooling!r} must be one of {", ".join(POOLINGS)}')
  if causal and pooling == 'first':
    raise ValueError(
      "pooling='first' of a decoder, whose first token sees no other; give last, or mean"
    )


class Embedder:
  """Embeds texts by a model's weights."""

  def __init__(
    self, model: LoadedModel, pooling: str, capacity: int, came: Callable[[], None] = lambda: None
  ):
    """Compiles its programs. pooling: one of POOLINGS. capacity: tokens of a text at most, soft
    ones of adapters too. came: hears of each program.
    """
    check_pooling(pooling, model.model.config.causal)
    self._model, self._pooling = model, pooling
    self._rows = ROWS * model.parts
    self._adapted = any(front.index for front in model.adapters.values())
    self._programs = {}
    for length in lengths_to(capacity):
      arguments = self._arguments([[0]], model.plain, length)
      with jax.set_mesh(model.mesh):
        self._programs[length] = _pooled.lower(model.model, *arguments, pooling=pooling).compile()
      came()

  def __call__(
    self, texts: Sequence[Sequence[int]], front: Front
  ) -> Generator[None, None, np.ndarray]:
    """Their vectors [texts, D] f32; it stops behind each call of a program."""
    rows = [front.whole(ids) for ids in texts]
    of_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
      length = next(length for length in self._programs if length >= len(row))
      of_length.setdefault(length, []).append(i)
    found: dict[int, Any] = {}
    for length, places in of_length.items():
      for first in range(0, len(places), self._rows):
        here = places[first : first + self._rows]
        arguments = self._arguments([rows[i] for i in here], front, length)
        with jax.set_mesh(self._model.mesh):
          vectors = everywhere(self._programs[length](self._model.model, *arguments))
        found |= zip(here, vectors)
        yield
    return np.stack([found[i] for i in range(len(rows))])

  def _arguments(self, rows: Sequence[Sequence[int]], front: Front, length: int) -> tuple[Any, ...]:
    """Rows, and behind them such of one token each that fill the call up."""
    model, R = self._model, self._rows
    tokens = np.full((R, length), model.tokenizer.pad, np.int32)
    lengths = np.ones(R, np.int32)
    for i, row in enumerate(rows):
      tokens[i, : len(row)], lengths[i] = row, len(row)
    # Soft tokens are read, and are no part of the text.
    begins = np.minimum(len(front.soft), lengths - 1).astype(np.int32)
    index = model.put(np.full(R, front.index, np.int32)) if self._adapted else None
    return *map(model.put, (tokens, begins, lengths)), index


@functools.partial(jax.jit, static_argnames='pooling')
def _pooled(model, tokens, begins, lengths, adapters, *, pooling):
  """[R, D] f32 of tokens [R, T], of which those from begins [R] to lengths [R] are the text's."""
  model = of_rows(model, adapters)
  at = jnp.arange(tokens.shape[1])[None]
  real = at < lengths[:, None]
  with ax.whole_rows(tokens.shape[1] % ax.size('length') > 0):
    tokens = ax.place(tokens, *TOKENS)
    segments = ax.place(real.astype(jnp.int32), *TOKENS)
    x = ax.place(model(tokens, segments=segments).hidden, 'batch', None, None)
  chosen = real & (at >= begins[:, None])
  if pooling == 'first':
    chosen = at == begins[:, None]
  elif pooling == 'last':
    chosen = at == lengths[:, None] - 1
  # A state of padding may be anything.
  total = jnp.where(chosen[..., None], x.astype(jnp.float32), 0).sum(1)
  return total / chosen.sum(1)[:, None]
