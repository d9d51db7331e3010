"""How likely was each token of a prompt, where a server has to say so? By one program of fixed
shape, C tokens at a time behind those before, in a cache of its own: it takes nothing from rows
that are written meanwhile, and compiles nothing later.

P rows, one of each part of the mesh, of which the first is used · C tokens · V vocabulary ·
k likeliest
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode.front import Front
from decode.loop import scores
from decode.sizes import Sizes
from model.cache import init_cache
from model.config import ModelConfig
from model.transformer import Decoder
from model.weights import of_rows
from parallel import axes as ax
from parallel.gathering import everywhere


@dataclasses.dataclass
class PromptScores:
  """Of each id of a prompt, but the first: nothing is before that.

  Attributes:
    logprobs: by the model. ranks: its place among all ids, 1 for the likeliest.
    alternatives: the likeliest ids there, as (id, log-probability).
  """

  logprobs: list[float] = dataclasses.field(default_factory=list)
  ranks: list[int] = dataclasses.field(default_factory=list)
  alternatives: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)


class PromptScorer:
  """Scores prompts, one after another, for weights of the shapes that it was compiled for."""

  def __init__(
    self,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    sizes: Sizes,
    weights: Decoder,
    *,
    vocabulary: int,
    pad: int = 0,
  ):
    """sizes: of the engine beside it, whose capacity, read_tokens and alternatives are also its."""
    self._mesh, self._sizes, self._pad = mesh, sizes, pad
    with jax.set_mesh(mesh):
      self._parts = ax.size('batch')

      def begin():
        size = self._parts, sizes.capacity, sizes.cache_dtype, sizes.read_tokens
        return init_cache(config, *size)

      self._begun = jax.jit(begin).lower().compile()
      self._cache: Any = self._begun()
      self._program = _score.lower(
        weights,
        self._cache,
        *self._arguments((), (), 0),
        vocabulary=vocabulary,
        alternatives=sizes.alternatives,
      ).compile()

  def __call__(
    self, weights: Decoder, ids: Sequence[int], front: Front, alternatives: int
  ) -> Iterator[PromptScores]:
    """What is known so far, after each call of the program; the last is all. Not for two prompts at
    a time, nor for more tokens than a row holds.

    front: what stands before the ids. alternatives: of each id, at most sizes.alternatives.
    """
    row, soft = front.row(ids), front.behind(0)
    found = PromptScores()
    with jax.set_mesh(self._mesh):
      # It is lost where a call has failed, or has been left half-way.
      cache, self._cache = self._cache or self._begun(), None
      lengths = self._put(np.zeros(self._parts, np.int32))
      cache = dataclasses.replace(cache, lengths=lengths)
    for first in range(0, len(row) - 1, self._sizes.read_tokens):
      part = slice(first, first + self._sizes.read_tokens)
      read, targets = row[:-1][part], row[1:][part]
      # The first id has no score, also where soft tokens are before it.
      skipped = min(max(soft - first, 0), len(read))
      with jax.set_mesh(self._mesh):
        arguments = self._arguments(read, [0] * skipped + targets[skipped:], front.index)
        cache, scored = self._program(weights, cache, *arguments)
      logprobs, ranks, likeliest, values = (
        x[0, skipped : len(read)].tolist() for x in everywhere(scored)
      )
      found.logprobs += logprobs
      found.ranks += ranks
      found.alternatives += [
        [*zip(*pair)][:alternatives] for pair in zip(likeliest, values, strict=True)
      ]
      if first + self._sizes.read_tokens >= len(row) - 1:
        self._cache = cache
      yield found

  def _arguments(
    self, read: Sequence[int], targets: Sequence[int], adapter: int
  ) -> tuple[Any, ...]:
    shape = self._parts, self._sizes.read_tokens
    tokens, behind = np.full(shape, self._pad, np.int32), np.zeros(shape, np.int32)
    tokens[0, : len(read)], behind[0, : len(read)] = read, targets
    counts, index = np.zeros(self._parts, np.int32), np.zeros(self._parts, np.int32)
    counts[0], index[0] = len(read), adapter
    index = self._put(index) if self._sizes.adapters else None
    return (*map(self._put, (tokens, behind, counts)), index)

  def _put(self, x: np.ndarray) -> jax.Array:
    spec = ax.spec('batch', *(None,) * (x.ndim - 1))
    return jax.device_put(x, jax.NamedSharding(self._mesh, spec))


@functools.partial(jax.jit, static_argnames=('vocabulary', 'alternatives'), donate_argnums=1)
def _score(model, cache, tokens, targets, counts, adapters, *, vocabulary, alternatives):
  """The cache behind the tokens, and of their targets [P, C]: log-probabilities and ranks; the
  likeliest ids [P, C, k] in their places, and theirs.
  """
  model = of_rows(model, adapters)
  x, cache, _ = model(tokens, cache=cache, counts=counts)

  def of(logits, targets):
    law = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    value = jnp.take_along_axis(law, targets[..., None], -1)
    values, ids = jax.lax.top_k(law, alternatives)
    return value[..., 0], (law > value).sum(-1) + 1, ids, values

  run = ax.local(of, (('batch',),) * 2, ('batch',))
  return cache, run(scores(model, x, vocabulary), targets)
