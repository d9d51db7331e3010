"""Does a trace have every request with its phases, in the trace of whoever asked, and nothing that
was said; and does a collector that is away cost nobody anything?
"""

import json

import pytest
from starlette.testclient import TestClient

from serving.http import app
from serving.listening import bound
from serving.wire import Served
from tests.serving.test_http import COMPLETION, break_after, service

pytest.importorskip('opentelemetry.sdk', reason='what traces is not installed')

PARENT = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'


@pytest.fixture
def traced():
  """A client, the service, and what gives its finished spans by name."""
  from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

  from serving.tracing import Traces

  kept, served = InMemorySpanExporter(), service()
  traces = Traces(kept, 'm', at_once=True)
  made = app(served, Served(name='m'), hosts=['*'], traced=traces.before(served.clock))
  with served.by_itself(), TestClient(made) as client:

    def spans():
      found = kept.get_finished_spans()
      kept.clear()
      return found

    yield client, served, spans


def test_a_request_is_a_span_of_phases(traced):
  client, served, spans = traced
  tick = served.engine.decode

  def decode(*given):
    served.clock.advance(0.25)
    return tick(*given)

  served.engine.decode = decode
  answer = client.post('/v1/completions', json=COMPLETION, headers={'traceparent': PARENT})
  *phases, whole = spans()
  assert [span.name for span in phases] == ['queue', 'prefill', 'decode']
  trace, parent = (int(part, 16) for part in PARENT.split('-')[1:3])
  assert whole.parent.span_id == parent and whole.name == 'POST /v1/completions'
  assert {span.context.trace_id for span in (*phases, whole)} == {trace}
  assert {span.parent.span_id for span in phases} == {whole.context.span_id}
  said = answer.headers['traceparent'].split('-')
  assert (int(said[1], 16), int(said[2], 16)) == (trace, whole.context.span_id)

  usage = answer.json()['usage']
  assert whole.attributes['gen_ai.usage.output_tokens'] == usage['completion_tokens']
  assert whole.attributes['http.response.status_code'] == 200
  # One follows another, within the whole.
  times = [whole.start_time, *(t for span in phases for t in (span.start_time, span.end_time))]
  assert times == sorted(times) and times[-1] <= whole.end_time
  assert phases[2].end_time - phases[0].start_time > 1e9
  assert 'hello' not in json.dumps([span.to_json() for span in (*phases, whole)])


def test_what_fails_is_a_span_too(traced):
  client, served, spans = traced
  client.post('/v1/completions', json=COMPLETION | {'n': 0})
  (refused,) = spans()
  assert refused.attributes['error.type'] == '400' and refused.status.is_unset
  undo = break_after(served, 0)
  client.post('/v1/completions', json=COMPLETION | {'stream': True})
  undo()
  *phases, broken = spans()
  assert [span.name for span in phases] == ['queue', 'prefill', 'decode'][: len(phases)] and phases
  assert not broken.status.is_ok and broken.attributes['http.response.status_code'] == 500
  for garbage in ('x', PARENT[:-3], '00-' + '0' * 32 + '-' + '0' * 16 + '-01'):
    client.post('/v1/completions', json=COMPLETION, headers={'traceparent': garbage})
    assert spans()[-1].parent is None
  assert client.get('/v1/models').status_code == 200 and not spans()


def test_a_collector_that_is_away_costs_spans_alone(caplog, monkeypatch):
  from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

  from serving.tracing import Told, Traces, exporter_to

  class Away(SpanExporter):
    result = SpanExportResult.FAILURE

    def export(self, spans):
      if self.result is None:
        raise OSError
      return self.result

    def shutdown(self):
      pass

  away = Away()
  served = service()
  traces = Traces(Told(away, 'there'), 'm', at_once=True)
  made = app(served, Served(name='m'), hosts=['*'], traced=traces.before(served.clock))
  with served.by_itself(), TestClient(made) as client:
    for result in (SpanExportResult.FAILURE, None, None, SpanExportResult.SUCCESS):
      away.result = result
      assert client.post('/v1/completions', json=COMPLETION).status_code == 200
    traces._tracer = None  # a fault of what traces itself
    assert client.post('/v1/completions', json=COMPLETION).status_code == 200
    assert client.post('/v1/completions', json=COMPLETION).status_code == 200
  said = [record.message for record in caplog.records if record.name == 'serving.tracing']
  assert [message.split(':')[0] for message in said] == [
    'traces do not reach there',
    'traces reach there again',
    'a span could not be made, and others may be missing',
  ]

  monkeypatch.setattr('serving.tracing.FLUSH', 0.1)
  # A real one, at a port where nobody listens: the server ends all the same.
  with bound('127.0.0.1', 0) as nobody:
    traces = Traces(exporter_to(f'http://127.0.0.1:{nobody.getsockname()[1]}'), 'm')
    made = app(served, Served(name='m'), hosts=['*'], traced=traces.before(served.clock))
    with served.by_itself(), TestClient(made) as client:
      assert client.post('/v1/completions', json=COMPLETION).status_code == 200
    traces.close()
  for wrong in ('localhost:4318', 'ftp://x', 'http://', 'http://x?y=1'):
    with pytest.raises(ValueError, match='--traces=.* is no address'):
      exporter_to(wrong)


def test_prompts_are_logged_where_that_is_asked_for(caplog):
  served = service()
  made = app(served, Served(name='m'), hosts=['*'], log_prompts=True)
  with served.by_itself(), TestClient(made) as client, caplog.at_level('INFO', 'serving.access'):
    text = client.post('/v1/completions', json=COMPLETION).json()['choices'][0]['text']
    client.post('/v1/completions', json=COMPLETION | {'n': 0})
    client.get('/v1/models')
  lines = [json.loads(r.message) for r in caplog.records if r.name == 'serving.access']
  assert json.loads(lines[0]['asked']) == COMPLETION and lines[0]['written'] == [text]
  assert 'hello' in lines[1]['asked'] and 'written' not in lines[1] and 'asked' not in lines[2]
