"""Who writes a policy's answers while it is trained? The engine that generates everywhere else, on
the mesh of the run, with the weights of the step as an argument.

They are in the compute dtype, a layer each, for as long as a rollout takes, and so are the caches.
"""

from collections.abc import Iterator, Sequence

import jax

from data import generation
from data.tokenizer import Tokenizer
from decode.bulk import Written, complete
from decode.engine import Engine, Request, Sizes
from decode.front import Front
from decode.sampling import make_sampling
from model.config import ModelConfig
from objectives.rollout import Question
from parallel import axes as ax

LONGEST_READ = 512  # tokens of a prompt that are read in one call


class Actor:
  """Writes answers of one run's policy.

  Args:
    config: of the policy as it generates (decode.generating.generating).
    rows: answers that are written side by side, at least; as many as fill the mesh evenly are.
    prompt: tokens of a prompt at most. new: of an answer.
    group: answers to a prompt, whose prompt is read once on each part of the mesh that has some,
      for those that begin together: all of them, where rows are for all.
    temperature: at which they are drawn; of prompts without a seed the likeliest tokens are taken.
  Raises NotImplementedError and ValueError as decode.engine.Engine.
  """

  def __init__(
    self,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    *,
    rows: int,
    prompt: int,
    new: int,
    group: int,
    temperature: float,
  ):
    with jax.set_mesh(mesh):
      parts = ax.size('batch')
    rows = -(-rows // parts) * parts
    prompts = max(1, rows // parts // group) * parts
    # A decoder behind an encoder begins with one token.
    self._front = Front(positions=config.max_length, encoder=config.encoder_layers > 0)
    source, before = (prompt, 1) if self._front.encoder else (0, prompt)
    sizes = Sizes(
      rows=rows,
      capacity=before + new,
      read_rows=min(prompts, rows),
      read_tokens=min(before, LONGEST_READ),
      bias=0,
      ends=max(1, len(generation.ends(tokenizer))),
      source=source,
    )
    # All ids that the model has, those too that are no token's: the law that is drawn from is the
    # one that is trained.
    self._engine = Engine(config, mesh, sizes, vocabulary=config.V, pad=tokenizer.pad)
    self._engine.rest()
    self._pad = tokenizer.pad
    self._ends, self._new, self._temperature = generation.ends(tokenizer), new, temperature

  def __call__(self, weights, asked: Sequence[Question]) -> Iterator[tuple[int, Written]]:
    """(index, what was written) of each, as they end; weights: as decode.generating makes them."""
    self._engine.reset()
    try:
      yield from complete(self._engine, weights, map(self._request, asked))
    finally:
      # Neither these weights nor caches take memory while the policy learns.
      self._engine.rest()

  def _request(self, asked: Question) -> Request:
    drawn = asked.seed is not None
    sampling = make_sampling(
      1, temperature=self._temperature if drawn else 0.0, seed=asked.seed or 0
    )
    prompt, source = self._front.read(asked.prompt.ids, self._pad)
    return Request(prompt, self._new, sampling, self._ends, source=source)
