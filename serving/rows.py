"""How does a model come to rows that a scheduler can have? An engine with its weights."""

from collections.abc import Callable, Sequence
from typing import Any

from decode.drafted import DraftingEngine
from decode.engine import Engine
from decode.loaded import LoadedModel
from decode.loop import Chunk
from decode.paged import PagedEngine
from decode.sizes import Request, Sizes, Use
from model.config import ModelConfig
from model.weights import adapters
from parallel import hosts
from parallel.gathering import everywhere
from serving.call import CLOSED, NotReady

BLOCK = 128  # tokens of prompts that are shared together, about
READ_BY_CPU = 64  # tokens of a prompt that a CPU reads together: more gain nothing there, and the
# last part of a prompt costs as much as a whole one
LONGEST = 4096  # tokens of a row of a model that has no end of positions


def sizes_for(model: LoadedModel, **given: int) -> Sizes:
  """Of an engine that serves this model. given: sizes that are not to be as they are by themselves.

  Raises ValueError for sizes that make no sense.
  """
  config, count = model.model.config, adapters(model.model)
  if model.mesh.devices.flat[0].platform == 'cpu' and not given.get('read_tokens'):
    longest = given.get('capacity') or config.max_length or LONGEST
    given['read_tokens'] = min(READ_BY_CPU, longest)
  return row_sizes(config, model.parts, model.vocabulary, count, **given)


def row_sizes(
  config: ModelConfig, parts: int, vocabulary: int, adapters: int = 0, **given: int
) -> Sizes:
  """The same of a model of this config, of so many ids and adapters; parts: of the mesh, that have
  rows of their own.
  """
  capacity = given.get('capacity') or config.max_length or LONGEST
  read = given.get('read_tokens') or min(BLOCK, capacity)
  asked = {
    'rows': 16 * parts,
    'alternatives': min(20, vocabulary),
    'ends': 32,
    'states': 2**13,
    'classes': 512,
    'block': -(-BLOCK // read) * read,
    **given,
    'capacity': capacity,
    'read_tokens': read,
    'adapters': adapters,
  }
  return Sizes(**asked)


class EngineRows:
  """A serving.scheduler.AnyEngine, of decode.engine.Engine. `begin` comes before all else.

  Attributes: as of AnyEngine.
  """

  def __init__(self, model: LoadedModel, sizes: Sizes):
    """Raises NotImplementedError for a model without a decoder."""
    config = model.model.config
    if config.encoder_layers or not config.causal:
      raise NotImplementedError(
        'the model has an encoder: what a server writes with is a decoder alone so far; use '
        'generate.py for an encoder-decoder'
      )
    if hosts.count() > 1:
      raise NotImplementedError(
        f'{hosts.count()} processes: a server is one process so far; run one on each host, with a '
        'mesh of its own devices'
      )
    self.sizes, self._model = sizes, model
    self._engine: Engine | None = None

  def begin(self, came: Callable[[int, int], None]) -> None:
    """Compiles all programs; came: hears how many there are so far, of how many.

    Raises as decode.engine.Engine, and whatever the device does for want of memory.
    """
    model = self._model
    virtual = sum(len(front.soft) for front in model.adapters.values()) + len(model.plain.soft)
    engine = PagedEngine if self.sizes.pages else Engine
    engine = DraftingEngine if self.sizes.lookup else engine
    self._engine = engine(
      model.model.config,
      model.mesh,
      self.sizes,
      vocabulary=model.vocabulary,
      pad=model.tokenizer.pad,
      virtual=virtual,
    )
    self.sizes = self._engine.sizes
    self._engine.compile(model.model, came)

  def end(self) -> None:
    """Gives the memory of rows back."""
    self._engine = None

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
    return self._engine.takes(request)

  def choose(self, request: Request) -> int:
    return self._engine.choose(request)

  def join(self, row: int, request: Request) -> None:
    self._engine.join(row, request)

  def read(self) -> list[int]:
    return self._engine.read(self._model.model)

  def cached(self, row: int) -> int:
    return self._engine.cached(row)

  def seat(self) -> list[int]:
    return self._engine.seat()

  def use(self) -> Use:
    engine = self._engine  # which is not there at first, and at the end
    return Use() if engine is None else engine.use()

  def decode(self, count: int, alternatives: bool) -> Any:
    return self._engine.decode(self._model.model, count, alternatives)

  def taken(self, chunk: Any) -> Chunk:
    return everywhere(chunk)

  def forget(self, row: int) -> None:
    self._engine.forget(row)

  def release(self, rows: Sequence[int]) -> None:
    self._engine.release(rows)

  def reset(self) -> None:
    self._engine.reset()
