"""Are a server's numbers those that its table names, and do they say what happened?"""

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from decode.request import FAILED
from serving.http import app
from serving.metrics import TABLE
from serving.wire import Served
from tests.serving.test_http import COMPLETION, service


@pytest.fixture
def client():
  served = service(rows=1, waiting=2)
  with served.by_itself(), TestClient(app(served, Served(name='m'), hosts=['testserver'])) as made:
    made.served = served
    yield made


def numbers(client):
  return {f.name: f for f in text_string_to_metric_families(client.get('/metrics').text)}


def test_metrics_are_those_of_the_table(client):
  client.post('/v1/completions', json=COMPLETION)
  found = numbers(client)
  names = {name for name in found if not name.endswith('_created')}
  short = {name: name.removesuffix('_total') for name in TABLE}  # as the parser has them
  assert set(short.values()) == names
  assert all(found[short[name]].type == kind for name, (kind, *_) in TABLE.items())
  (tokens,) = found['tandem_generation_tokens'].samples
  assert tokens.value == client.served.stats().generated_tokens > 0
  # What failed is among errors, by its kind.
  stats = {k: n for k, n in client.served.stats().finished.items() if k != FAILED}
  said = {s.labels['finished_reason']: s.value for s in found['tandem_request_success'].samples}
  assert said == stats


def test_every_answer_is_counted_by_its_status(client):
  """Whoever gives it: the guard, the queue, an endpoint, or nobody."""
  client.post('/v1/completions', json=COMPLETION)
  client.post('/v1/completions', json=COMPLETION | {'n': 99})
  client.post('/v1/completions', content='x')
  client.post('/nothing', json={})
  client.get('/v1/completions')
  client.get('/health', headers={'Host': 'a b'})
  said = {s.labels['status']: s.value for s in numbers(client)['tandem_http_requests'].samples}
  assert said == {'200': 1, '400': 2, '415': 1, '404': 1, '405': 1}


def test_a_first_token_that_took_long_is_in_a_bucket():
  """One behind a queue of minutes, too; of gaps between tokens the short ones are told apart."""
  buckets = {name: ends for name, (_, _, _, *each) in TABLE.items() for ends in each}
  first = buckets['tandem_time_to_first_token_seconds']
  assert first[0] <= 0.001 and first[-1] >= 600 and list(first) == sorted(set(first))
  assert {name for name, (kind, *_) in TABLE.items() if kind == 'histogram'} == set(buckets)
