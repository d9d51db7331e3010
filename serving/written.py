"""How does what a model writes reach who asked over HTTP? As one answer, or as server-sent events.

Requests are read on other threads, and whole answers written there, for a long one takes time; what
comes of them reaches clients from the event loop. Who goes away, or does not take what is sent, is
not written for any more.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any

from starlette.types import Receive, Scope, Send

from decode.scorer import PromptScores
from serving import call as calls
from serving.answers import HttpAnswer, failure
from serving.bodies import json_response
from serving.call import Event, NotReady, QueueFull
from serving.fields import Denied
from serving.guard import GONE, Gone, refusal
from serving.jobs import JobFailed
from serving.metrics import Metrics
from serving.reader import refusing
from serving.service import Service
from serving.ticket import Ticket
from serving.wire import AskedCall

# What a request asks for, and the answer's form, of the one that OpenAI has.
ReadRequest = tuple[AskedCall, Callable[[dict], dict]]


class WrittenEndpoint:
  """An endpoint whose answers the model writes."""

  def __init__(self, service: Service, watching: Metrics, read: Callable[[Scope], ReadRequest]):
    """read: reads a request. Raises Denied."""
    self._service, self._watching, self._read = service, watching, read

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    tickets: list[Ticket] = []
    answer = None
    scores: list[Future] = []
    state = scope['state']
    state['tickets'] = tickets
    try:
      try:
        if self._service.state != calls.READY:
          raise NotReady(self._service.state)
        asked, shaped = await asyncio.to_thread(self._read, scope)
        await self._submit(asked, tickets, scores)
        answer = HttpAnswer(asked, tickets, self._service.tokenizer)
        async with watched(receive, [*tickets, *scores], state['log']):
          answer.scores = await self._scored(scores, asked.calls[0].seconds)
          if asked.stream:
            await self._stream(asked, answer, tickets, scope, receive, send)
          else:
            await self._read_all(answer, tickets)
            if state['log'].get('gone'):
              raise Gone
            response = await json_response(lambda: shaped(answer.whole()))
            await response(scope, receive, send)
      except (NotReady, QueueFull) as error:
        raise unserved(error) from error
    except Denied as error:
      await refusal(error, scope['path'])(scope, receive, send)
    except Gone:
      state['log']['status'] = GONE
    finally:
      for each in [*tickets, *scores]:
        each.cancel()
      self._note(state['log'], tickets)
      if answer is not None and state['log_prompts']:
        state['log']['written'] = answer.written

  async def _submit(self, asked: AskedCall, tickets: list[Ticket], scores: list[Future]) -> None:
    service = self._service
    for call in asked.calls:
      with refusing():
        tickets.append(await asyncio.to_thread(service.submit, call))
        if asked.scores >= 0:
          scores.append(await asyncio.to_thread(service.score, call, asked.scores))

  async def _scored(self, scores: Sequence[Future], seconds: float | None) -> list[PromptScores]:
    """Of each prompt, within so many seconds; its text is written meanwhile."""
    try:
      async with asyncio.timeout(seconds):
        return [await came(each, self._service) for each in scores]
    except TimeoutError:
      message = f'the prompt was not scored within seconds={seconds:g}; give more'
      raise Denied(message, 'seconds', status=408, code=calls.DEADLINE) from None

  async def _read_all(self, answer: HttpAnswer, tickets: Sequence[Ticket]) -> None:
    async with contextlib.aclosing(merged(tickets)) as events:
      async for prompt, event in events:
        self._watching.heard(answer.since(prompt, event), event)
        _check(event)
        for _ in answer.add(prompt, event):
          pass
    _check_served(answer, tickets)

  async def _stream(self, asked, answer, tickets, scope, receive, send) -> None:
    """Pieces, as events of server-sent ones. What goes wrong before the first is an answer like any
    other; behind it, an event is all that can say it.
    """
    begun = False

    async def say(content: bytes, more: bool = True) -> None:
      nonlocal begun
      if not begun:
        begun = True
        headers = [(b'content-type', b'text/event-stream; charset=utf-8')]
        headers += [(b'cache-control', b'no-cache'), (b'x-accel-buffering', b'no')]
        await send({'type': 'http.response.start', 'status': 200, 'headers': headers})
      await send({'type': 'http.response.body', 'body': content, 'more_body': more})

    try:
      async with contextlib.aclosing(merged(tickets)) as events:
        async for prompt, event in events:
          self._watching.heard(answer.since(prompt, event), event)
          _check(event)
          if not begun and event.finish == calls.DRAINED:
            _check_served(answer, tickets, event)
          pieces = b''.join(map(sse, answer.add(prompt, event)))
          if pieces:
            await say(pieces)
    except Denied as error:
      if not begun:
        raise
      await say(sse(error.body()), more=False)
      return
    last = sse(answer.last()) if asked.include_usage else b''
    await say(last + b'data: [DONE]\n\n', more=False)

  def _note(self, log: dict, tickets: Sequence[Ticket]) -> None:
    """For the access log, and the metrics."""
    if not tickets:
      return
    usages = [ticket.usage for ticket in tickets]
    log['prompt_tokens'] = sum(usage.prompt for usage in usages)
    log['cached_tokens'] = sum(usage.cached for usage in usages)
    log['completion_tokens'] = sum(usage.completion for usage in usages)
    for ticket in tickets:
      self._watching.ended(ticket)


async def came(result: Future, service: Service) -> Any:
  """What comes of a job. Raises Denied, and Gone where it was cancelled."""
  try:
    # A reader that waits no longer does not cancel it by that.
    return await asyncio.shield(asyncio.wrap_future(result))
  except JobFailed as error:
    status = 500 if service.state == calls.READY else 503
    raise Denied(str(error), status=status, code=calls.DEVICE) from error
  except asyncio.CancelledError:
    if result.cancelled():
      raise Gone from None
    raise


def _check(event: Event) -> None:
  """Raises Denied for a sample that has failed."""
  if event.finish == calls.FAILED:
    raise failure(event)


def _check_served(
  answer: HttpAnswer, tickets: Sequence[Ticket], event: Event | None = None
) -> None:
  """Raises Denied where all that there is of an answer is that the server stops."""
  finishes = [event.finish] if event is not None else answer.finishes
  written = sum(ticket.usage.completion for ticket in tickets)
  if not written and all(finish == calls.DRAINED for finish in finishes):
    raise unserved(NotReady(calls.DRAINING))


def unserved(error: NotReady | QueueFull) -> Denied:
  if isinstance(error, QueueFull):
    return Denied(str(error), status=429, code='queue_full', retry_after=error.retry_after)
  return Denied(str(error), status=503, code=error.state)


def sse(said: dict) -> bytes:
  """A server-sent event. What is not ASCII is escaped: U+2028 ends a line for some clients."""
  return f'data: {json.dumps(said, separators=(",", ":"), allow_nan=False)}\n\n'.encode()


async def merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Event]]:
  """Events of several tickets, as they come, each with its ticket's number. They wait until they
  are taken.
  """
  if len(tickets) == 1:
    async with contextlib.aclosing(aiter(tickets[0])) as events:
      async for event in events:
        yield 0, event
    return
  queue: asyncio.Queue = asyncio.Queue(1)

  async def pump(number, ticket):
    async with contextlib.aclosing(aiter(ticket)) as events:
      async for event in events:
        await queue.put((number, event))
    await queue.put((number, None))

  pumps = [asyncio.create_task(pump(i, ticket)) for i, ticket in enumerate(tickets)]
  try:
    left = len(tickets)
    while left:
      number, event = await queue.get()
      if event is None:
        left -= 1
      else:
        yield number, event
  finally:
    for task in pumps:
      task.cancel()
    await asyncio.gather(*pumps, return_exceptions=True)


@contextlib.asynccontextmanager
async def watched(
  receive: Receive, asked: Sequence[Ticket | Future], log: dict
) -> AsyncIterator[None]:
  """A block in which a client that goes away cancels what it has asked for."""

  async def watch():
    while (await receive())['type'] != 'http.disconnect':
      pass
    log['gone'] = True
    for each in asked:
      each.cancel()

  watching = asyncio.create_task(watch())
  try:
    yield
  finally:
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
