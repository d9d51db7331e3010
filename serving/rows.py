"""How does a model come to rows that a scheduler can have? An engine with its weights."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from decode.drafted import DraftingEngine
from decode.drafted_pages import DraftingPagedEngine
from decode.embedder import Embedder, check_pooling
from decode.engine import Engine
from decode.front import Front
from decode.loaded import LoadedModel
from decode.loop import Chunk
from decode.paged import PagedEngine
from decode.scorer import PromptScorer
from decode.sizes import Request, Sizes, Use, check, lengths_to
from model.config import ModelConfig
from model.weights import adapters
from parallel.gathering import everywhere
from serving.call import CLOSED, NotReady
from serving.jobs import Job

BLOCK = 128  # tokens of prompts that are shared together, about
# Tokens of a prompt that a CPU reads together: more gain nothing there; and of its last part, where
# that is so short, which costs by its tokens there.
READ_BY_CPU, LAST_BY_CPU = 64, 16
LONGEST = 4096  # tokens of a row of a model that has no end of positions
# The same of an encoder-decoder: every row has room for a source as long, too.
LONGEST_SOURCE = 1024
BEGINS = 16  # tokens that begin what its decoder writes, at most


def sizes_for(model: LoadedModel, **given: int) -> Sizes:
  """Of an engine that serves this model. given: sizes that are not to be as they are by themselves.

  Raises ValueError for sizes that make no sense.
  """
  config, count = model.model.config, adapters(model.model)
  if model.mesh.devices.flat[0].platform == 'cpu' and not given.get('read_tokens'):
    longest = given.get('capacity') or _longest(config)
    given['read_tokens'] = min(BEGINS if config.encoder_layers else READ_BY_CPU, longest)
    if LAST_BY_CPU < given['read_tokens']:
      given.setdefault('last_tokens', LAST_BY_CPU)
  return row_sizes(config, model.parts, model.vocabulary, count, **given)


def row_sizes(
  config: ModelConfig, parts: int, vocabulary: int, adapters: int = 0, **given: int
) -> Sizes:
  """The same of a model of this config, of so many ids and adapters; parts: of the mesh, that have
  rows of their own.
  """
  capacity = given.get('capacity') or _longest(config)
  read = given.get('read_tokens') or min(BEGINS if config.encoder_layers else BLOCK, capacity)
  asked = {
    'rows': 16 * parts,
    'alternatives': min(20, vocabulary),
    'ends': 32,
    'states': 2**13,
    'classes': 512,
    'block': -(-BLOCK // read) * read,
    'source': capacity if config.encoder_layers else 0,
    **given,
    'capacity': capacity,
    'read_tokens': read,
    'adapters': adapters,
  }
  return Sizes(**asked)


def _longest(config: ModelConfig) -> int:
  return config.max_length or (LONGEST_SOURCE if config.encoder_layers else LONGEST)


# By whether they draft, and whether they have pages.
ENGINES = {
  (False, False): Engine,
  (True, False): DraftingEngine,
  (False, True): PagedEngine,
  (True, True): DraftingPagedEngine,
}


class EngineRows:
  """A serving.scheduler.AnyEngine, of decode.engine.Engine. `begin` comes before all else.

  Attributes: as of AnyEngine, and model, as it was given.
  """

  def __init__(self, model: LoadedModel, sizes: Sizes, scores: bool = False, pooling: str = ''):
    """scores: whether it scores prompts, too, for which there is one more row, and a program.
    pooling: by which it embeds texts; '': it does not.

    Raises ValueError and NotImplementedError for sizes that the mesh does not take, for what an
    encoder-decoder is not for, and as decode.embedder.check_pooling.
    """
    config = model.model.config
    if config.encoder_layers and (scores or pooling):
      asked = 'prompt_logprobs' if scores else f'pooling={pooling!r}'
      raise ValueError(
        f'{asked} of an encoder-decoder (model.encoder_layers={config.encoder_layers}), whose '
        'encoder reads prompts and whose decoder answers; leave it out'
      )
    if pooling:
      check_pooling(pooling, causal=True)
    with jax.set_mesh(model.mesh):
      check(config, sizes)
    self.sizes, self.model, self.width = sizes, model, config.width
    self._engine: Engine | None = None
    self._scorer: PromptScorer | None = None
    self._embedder: Embedder | None = None
    self._scores, self._pooling = scores, pooling

  def begin(self, came: Callable[[int, int], None]) -> None:
    """Compiles all programs; came: hears how many there are so far, of how many.

    Raises as decode.engine.Engine, and whatever the device does for want of memory.
    """
    model = self.model
    virtual = sum(len(front.soft) for front in model.adapters.values()) + len(model.plain.soft)
    made = ENGINES[bool(self.sizes.lookup), bool(self.sizes.pages)]
    self._engine = made(
      model.model.config,
      model.mesh,
      self.sizes,
      vocabulary=model.vocabulary,
      pad=model.tokenizer.pad,
      virtual=virtual,
    )
    self.sizes = self._engine.sizes
    lengths = len(lengths_to(self.sizes.capacity)) if self._pooling else 0
    more, counts = self._scores + lengths, [0, 0]

    def came_one(done: int, total: int) -> None:
      counts[:] = done, total
      came(done, total)

    self._engine.compile(model.model, lambda done, total: came_one(done, total + more))
    if self._scores:
      self._scorer = PromptScorer(
        model.model.config,
        model.mesh,
        self.sizes,
        model.model,
        vocabulary=model.vocabulary,
        pad=model.tokenizer.pad,
      )
      came_one(counts[0] + 1, counts[1])
    if self._pooling:
      heard = lambda: came_one(counts[0] + 1, counts[1])  # noqa: E731
      self._embedder = Embedder(model, self._pooling, self.sizes.capacity, heard)

  def end(self) -> None:
    """Gives the memory of rows back."""
    self._engine = self._scorer = self._embedder = None

  def scored(self, ids: Sequence[int], front: Front, alternatives: int) -> Job:
    """See decode.scorer.PromptScorer."""
    scorer = self._scorer  # which may end now
    if scorer is None:
      raise NotReady(CLOSED)
    return scorer(self.model.model, ids, front, alternatives)

  def embedded(self, texts: Sequence[Sequence[int]], front: Front) -> Job:
    """See decode.embedder.Embedder."""
    embedder = self._embedder  # which may end now
    if embedder is None:
      raise NotReady(CLOSED)
    return embedder(texts, front)

  @property
  def free(self) -> list[int]:
    return self._engine.free

  @property
  def reading(self) -> list[int]:
    return self._engine.reading

  def check(self, request: Request) -> None:
    engine = self._engine  # which may end now
    if engine is None:
      raise NotReady(CLOSED)
    engine.check(request)

  def takes(self, request: Request) -> bool:
    return bool(self._engine.open(request))

  def choose(self, request: Request) -> int:
    return self._engine.choose(request)

  def join(self, row: int, request: Request) -> None:
    self._engine.join(row, request)

  def read(self) -> list[int]:
    """A part, and behind a last one that is short another: it costs little, and whose prompt ends
    with it is not to keep others' from being read for a whole step.
    """
    engine, weights, before = self._engine, self.model.model, self._engine.unread
    ended = engine.read(weights)
    if engine.reading and 0 < before - engine.unread <= self.sizes.last_tokens:
      ended = [*ended, *engine.read(weights)]
    return ended

  def cached(self, row: int) -> int:
    return self._engine.cached(row)

  def seat(self) -> list[int]:
    return self._engine.seat()

  def use(self) -> Use:
    engine = self._engine  # which is not there at first, and at the end
    return Use() if engine is None else engine.use()

  def decode(self, count: int, alternatives: bool) -> Any:
    return self._engine.decode(self.model.model, count, alternatives)

  def taken(self, chunk: Any) -> Chunk:
    return everywhere(chunk)

  def forget(self, row: int) -> None:
    self._engine.forget(row)

  def release(self, rows: Sequence[int]) -> None:
    self._engine.release(rows)

  def reset(self) -> None:
    self._engine.reset()
