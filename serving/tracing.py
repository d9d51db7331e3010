"""How does a request show in traces, beside those of whoever asked? As a span with its phases:
queue, prefill, decode; by W3C's context, in and out.

    traces = Traces(exporter_to('http://collector:4318'), 'chat')
    app(service, served, hosts=[..], traced=traces.before(service.clock))

Spans are made of times that are there anyway, and exported by a thread of their own from a bounded
queue: a collector that is slow, or away, costs spans and no request anything. What is asked and
written is in none.
"""

import logging
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import (
  BatchSpanProcessor,
  SimpleSpanProcessor,
  SpanExporter,
  SpanExportResult,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.ticket import Ticket

log = logging.getLogger(__name__)

TIMEOUT = 5.0  # seconds that a collector has to take spans
FLUSH = 2.0  # seconds that it has to take the last ones, when the server ends
QUEUED = 2048  # spans that wait for it at most; more are dropped
CONTEXT = TraceContextTextMapPropagator()


def exporter_to(endpoint: str) -> SpanExporter:
  """Sends spans to a collector by OTLP over HTTP. Raises ValueError for what is no address."""
  parts = urllib.parse.urlsplit(endpoint)
  if parts.scheme not in ('http', 'https') or not parts.hostname or parts.query or parts.fragment:
    raise ValueError(
      f'--traces={endpoint} is no address of a collector; give one as http://localhost:4318'
    )
  url = endpoint.rstrip('/')
  url = url if url.endswith('/v1/traces') else f'{url}/v1/traces'
  # What it says of each batch that fails is said once, below.
  logging.getLogger('opentelemetry').setLevel(logging.CRITICAL)
  return Told(OTLPSpanExporter(endpoint=url, timeout=TIMEOUT), url)


class Told(SpanExporter):
  """Another exporter, of which one line says that it fails, and one that it does no longer."""

  def __init__(self, inner: SpanExporter, name: str):
    self._inner, self._name, self._fails = inner, name, False

  def export(self, spans: Sequence[Any]) -> SpanExportResult:
    error = ''
    try:
      result = self._inner.export(spans)
    except Exception as raised:
      result, error = SpanExportResult.FAILURE, f' ({type(raised).__name__})'
    fails = result is not SpanExportResult.SUCCESS
    if fails and not self._fails:
      log.warning('traces do not reach %s%s: spans are dropped until they do', self._name, error)
    elif self._fails and not fails:
      log.warning('traces reach %s again', self._name)
    self._fails = fails
    return result

  def shutdown(self) -> None:
    self._inner.shutdown()


class Traces:
  """Spans of one server; nothing of it is global."""

  def __init__(self, exporter: SpanExporter, model: str, *, at_once: bool = False):
    """at_once: spans are exported as they end, by whoever ends them, as tests have it."""
    resource = Resource({'service.name': 'tandem', 'gen_ai.request.model': model})
    self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    processor = (
      SimpleSpanProcessor(exporter)
      if at_once
      else BatchSpanProcessor(exporter, max_queue_size=QUEUED)
    )
    self._provider.add_span_processor(processor)
    self._tracer = self._provider.get_tracer('tandem.serving')
    self._failed = False

  def begun(self, scope: Scope, at: int) -> Any:
    """The span of a request that came at this time, in nanoseconds since 1970; None for none."""
    try:
      carrier = {}
      for name, value in scope['headers']:
        if name in (b'traceparent', b'tracestate'):
          carrier.setdefault(name.decode('latin-1'), value.decode('latin-1'))
      span = self._tracer.start_span(
        f'{scope["method"]} {scope["path"][:200]}',
        context=CONTEXT.extract(carrier),
        kind=trace.SpanKind.SERVER,
        start_time=at,
        attributes={
          'http.request.method': scope['method'],
          'url.path': scope['path'][:200],
          'tandem.request.id': scope['state']['id'],
        },
      )
      return span
    except Exception as error:
      self._say(error)
      return None

  def headers(self, span: Any) -> list[tuple[bytes, bytes]]:
    """By which whoever asked finds the span."""
    carrier: dict[str, str] = {}
    CONTEXT.inject(carrier, trace.set_span_in_context(span))
    return [(name.encode(), value.encode()) for name, value in carrier.items()]

  def ended(
    self, span: Any, said: dict, tickets: Sequence[Ticket], wall: Callable[[float], int], now: float
  ) -> None:
    """said: what the access log has of the request. wall: nanoseconds since 1970, of a time by the
    service's clock, which `now` is one of.
    """
    try:
      for number, ticket in enumerate(tickets):
        self._add_phases(span, number, ticket, wall, now)
      usage = {'input_tokens': 'prompt_tokens', 'output_tokens': 'completion_tokens'}
      for name, ours in usage.items():
        if ours in said:
          span.set_attribute(f'gen_ai.usage.{name}', said[ours])
      span.set_attribute('http.response.status_code', said['status'])
      if said['status'] >= 400:
        span.set_attribute('error.type', str(said['status']))
      if said['status'] >= 500:
        span.set_status(trace.StatusCode.ERROR)
      span.end(end_time=wall(now))
    except Exception as error:
      self._say(error)

  def before(self, clock: Callable[[], float]) -> Callable[[ASGIApp], ASGIApp]:
    """Puts itself before an app. clock: the service's."""
    return lambda app: Traced(app, self, clock)

  def close(self) -> None:
    """Exports what is left, for as long as a server may take for it."""
    thread = threading.Thread(target=self._provider.shutdown, daemon=True)
    thread.start()
    thread.join(FLUSH)

  def _add_phases(self, span, number, ticket, wall, now) -> None:
    times, context = ticket.times, trace.set_span_in_context(span)
    marks = {'queue': times.asked, 'prefill': times.began, 'decode': times.first}
    ends = [*list(marks.values())[1:], times.ended]
    for (name, begin), end in zip(marks.items(), ends, strict=True):
      if begin is None:
        return
      # A phase that nothing followed lasted until all was over.
      end = end if end is not None else times.ended if times.ended is not None else now
      phase = self._tracer.start_span(
        name, context=context, start_time=wall(begin), attributes={'tandem.prompt': number}
      )
      if name == 'prefill':
        phase.set_attribute('gen_ai.usage.input_tokens', ticket.usage.prompt)
        phase.set_attribute('tandem.usage.cached_tokens', ticket.usage.cached)
      elif name == 'decode':
        phase.set_attribute('gen_ai.usage.output_tokens', ticket.usage.completion)
      phase.end(end_time=wall(end))

  def _say(self, error: Exception) -> None:
    if not self._failed:
      log.error('a span could not be made, and others may be missing: %r', error)
    self._failed = True


class Traced:
  """Makes a span of every request that an app is asked for."""

  def __init__(self, app: ASGIApp, traces: Traces, clock: Callable[[], float]):
    """clock: the service's."""
    self._app, self._traces, self._clock = app, traces, clock

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http' or scope['method'] != 'POST':
      await self._app(scope, receive, send)
      return
    # Both clocks are read once: one that is set meanwhile moves no phase.
    at, began = time.time_ns(), self._clock()
    span = self._traces.begun(scope, at)
    if span is None:
      await self._app(scope, receive, send)
      return

    def wall(seconds: float) -> int:
      return at + int((seconds - began) * 1e9)

    async def answer(message):
      if message['type'] == 'http.response.start':
        headers = [*message['headers'], *self._traces.headers(span)]
        message = message | {'headers': headers}
      await send(message)

    try:
      await self._app(scope, receive, answer)
    finally:
      state = scope['state']
      now = max(self._clock(), began)
      self._traces.ended(span, state['log'], state.get('tickets', ()), wall, now)
