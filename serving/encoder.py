"""What stands in an engine's place where a model is an encoder, which writes nothing?"""

from collections.abc import Callable, Sequence

from decode.embedder import Embedder, check_pooling
from decode.front import Front
from decode.loaded import LoadedModel
from decode.sizes import Request, Sizes, Use, lengths_to
from serving.call import CLOSED, NotReady
from serving.jobs import Job

NONE_OF = 'pages', 'host_pages', 'lookup', 'cache_dtype'  # of Sizes, for what is written
WRITES_NOTHING = 'this model is an encoder, which writes nothing; ask /v1/embeddings'


class EncoderRows:
  """A serving.scheduler.AnyEngine that no request gets a row of.

  Attributes: as of AnyEngine.
  """

  def __init__(self, model: LoadedModel, sizes: Sizes, scores: bool, pooling: str):
    """Raises ValueError for what an encoder does not do."""
    if scores:
      raise ValueError('prompt_logprobs of an encoder, which writes nothing; leave it out')
    for name in NONE_OF:
      if value := getattr(sizes, name):
        raise ValueError(f'{name}={value!r} of an encoder, which writes nothing; leave it out')
    check_pooling(pooling, causal=False)
    self.sizes, self._model, self._pooling = sizes, model, pooling
    self.width = model.model.config.width
    self.free: list[int] = []
    self.reading: list[int] = []
    self._embedder: Embedder | None = None

  def begin(self, came: Callable[[int, int], None]) -> None:
    """Compiles all programs; came: hears how many there are so far, of how many."""
    done, total = 0, len(lengths_to(self.sizes.capacity))

    def heard() -> None:
      nonlocal done
      done += 1
      came(done, total)

    came(0, total)
    self._embedder = Embedder(self._model, self._pooling, self.sizes.capacity, heard)

  def end(self) -> None:
    self._embedder = None

  def embedded(self, texts: Sequence[Sequence[int]], front: Front) -> Job:
    """See decode.embedder.Embedder."""
    embedder = self._embedder  # which may end now
    if embedder is None:
      raise NotReady(CLOSED)
    return embedder(texts, front)

  def check(self, request: Request) -> None:
    raise ValueError(WRITES_NOTHING)

  def seat(self) -> list[int]:
    return []

  def use(self) -> Use:
    return Use()

  def release(self, rows: Sequence[int]) -> None:
    """There are none."""

  def reset(self) -> None:
    """There is nothing that could be lost."""
