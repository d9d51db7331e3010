"""How does a model serve? A thread of its own compiles, then steps the scheduler as long as there
is something to do, until it is drained.

    service = Running(Generator.load('runs/chat'), rows=16)
    service.submit(Call(prompt='..', options=Options(max_new_tokens=64)))
    service.drain(30); service.closed()
"""

import logging
import threading
import time
from collections.abc import Callable

from decode.loaded import LoadedModel
from decode.request import FAILED
from parallel import hosts
from serving import call as calls
from serving.call import Failure, Limits
from serving.desk import Desk
from serving.encoder import EncoderRows
from serving.rows import EngineRows, sizes_for
from serving.several import LeadingRows

log = logging.getLogger(__name__)

STUCK = 3.0  # seconds after which an engine does not answer that is to end
POLL = 0.05  # seconds after which what waits for something else is looked at again


class Running(Desk):
  """A serving.service.Service of a model, from its making on."""

  def __init__(
    self,
    model: LoadedModel,
    *,
    limits: Limits = Limits(),
    clock: Callable[[], float] = time.monotonic,
    scores: bool = False,
    pooling: str = '',
    **sizes: int,
  ):
    """scores: whether prompts are scored, too. pooling: by which texts are embedded
    (decode.embedder); '': they are not. sizes: of serving.rows.sizes_for.

    Raises ValueError and NotImplementedError for what cannot be served.
    """
    writes, several = model.model.config.causal, hosts.count() > 1
    if several and not writes:
      raise NotImplementedError(
        f'{hosts.count()} processes for an encoder, whose texts are read by one; start one process'
      )
    kind = EncoderRows if not writes else LeadingRows if several else EngineRows
    rows = kind(model, sizes_for(model, **sizes), scores, pooling)
    super().__init__(
      rows,
      model.tokenizer,
      vocabulary=model.vocabulary,
      plain=model.plain,
      adapters=model.adapters,
      limits=limits,
      clock=clock,
      scorer=rows.scored if scores else None,
      embedder=rows.embedded if pooling else None,
      writes=writes,
    )
    self._wake, self._begun, self._ended = (threading.Event() for _ in range(3))
    self._closing = False
    self._gone = ''  # why nothing goes on, where another thread knows that
    if several:
      rows.watch(self._lost)
    self._thread = threading.Thread(target=self._main, name='engine', daemon=True)
    self._thread.start()

  def ready(self, timeout: float | None = None) -> bool:
    self._begun.wait(timeout)
    return self.state == calls.READY

  def closed(self, timeout: float | None = None) -> bool:
    return self._ended.wait(timeout)

  def close(self) -> None:
    self._closing = True
    self._woken()
    self._thread.join()

  def _woken(self) -> None:
    self._wake.set()

  def _lost(self, why: str) -> None:
    """A process without which nothing goes on is gone; from a thread of its own."""
    self._gone = why
    self._woken()
    if self._ended.wait(STUCK):
      return
    # The engine's thread waits for that process, and will for ever.
    self.error, self.state = why, FAILED
    self._begun.set()
    self._end_all(*self._last_words())
    self._ended.set()

  def _came(self, done: int, total: int) -> None:
    self.progress = done, total
    if self._closing or self.state != calls.STARTING:
      raise _Stopped

  def _main(self) -> None:
    try:
      self._engine.begin(self._came)
      self._turn(calls.STARTING, calls.READY)
      self._begun.set()
      self._serve()
    except _Stopped:
      self.state = calls.CLOSED
    except BaseException as error:
      log.exception('the server has failed')
      self.error = f'{type(error).__name__}: {error}'
      self.state = FAILED
    finally:
      self._begun.set()
      self._end_all(*self._last_words())
      self._constraints.close()
      self._engine.end()
      self._ended.set()

  def _serve(self) -> None:
    """Steps, until there is nothing to do and nothing will be."""
    while not self._closing:
      self._wake.clear()
      if self._gone:
        raise calls.Lost(self._gone)
      more = self._step()
      if self.state == calls.DRAINING and self.idle:
        break
      if not more:
        self._wake.wait(None if self.idle else POLL)
    self.state = calls.CLOSED

  def _last_words(self) -> tuple:
    """Why what is still there ends."""
    if self.state != FAILED:
      return (calls.DRAINED,)
    failure = Failure(kind=calls.GONE, message='the server has failed, and takes no more calls')
    return FAILED, failure


class _Stopped(Exception):
  """Whoever started it does not want it any more."""
