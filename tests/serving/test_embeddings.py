"""Does a text get the vector that the model has of it alone, whoever else asks, of an encoder or a
decoder, by OpenAI's own client; and is an encoder asked for nothing else?
"""

import base64
import functools

import jax
import numpy as np
import pytest
from starlette.testclient import TestClient

from data.tokenizers import ByteTokenizer
from decode.embedder import check_pooling
from serving.call import Call, JobCounts, Limits, QueueFull
from serving.fake import SIZES as SMALL, FakeService
from serving.http import app
from serving.metrics import Metrics
from serving.running import Running
from serving.wire import Served
from tests.decode.small import config_of, generator_of

SIZES = dict(rows=1, capacity=48, read_tokens=8, block=8, steps=2, alternatives=2)
TEXTS = ['é', 'a longer text', 'x' * 40]


@functools.cache
def generator(causal):
  return generator_of(config_of(48, causal=causal, position='learned'), seed=3)


@pytest.fixture(scope='module')
def encoder():
  """A client of a server of one."""
  served = Running(generator(False), pooling='mean', **SIZES)
  assert served.ready(), served.error
  with TestClient(app(served, Served(name='m'), hosts=['*'])) as client:
    client.served = served
    yield client
  served.close()
  assert served.state == 'closed', served.error


def of_alone(made, text):
  """Hidden states of a text, which is all that there is."""
  ids = [1, *ByteTokenizer().encode(text), *([] if made.model.config.causal else [2])]
  with jax.set_mesh(made.mesh):
    states = _states(made.model, made.put(np.array([ids], np.int32)))
  return np.asarray(states[0], np.float64)


@jax.jit
def _states(model, tokens):
  return model(tokens).hidden


def unit(vector):
  return vector / np.linalg.norm(vector)


def vectors(client, texts, **more):
  answer = client.post('/v1/embeddings', json={'input': texts} | more)
  assert answer.status_code == 200, answer.text
  assert [each['index'] for each in answer.json()['data']] == [*range(len(texts))]
  return np.array([each['embedding'] for each in answer.json()['data']])


def test_a_text_has_the_mean_of_its_states(encoder):
  from tests.decode.test_engine import compilations

  with compilations() as names:
    found = vectors(encoder, TEXTS * 2)
    alone = [vectors(encoder, [text])[0] for text in TEXTS]
  assert not names and np.array_equal(found, [*alone, *alone])
  expected = [unit(of_alone(generator(False), text).mean(0)) for text in TEXTS]
  np.testing.assert_allclose(alone, expected, atol=1e-5)
  cut = vectors(encoder, TEXTS, dimensions=3)
  np.testing.assert_allclose(cut, [unit(each[:3]) for each in expected], atol=1e-5)


def test_an_encoder_is_asked_for_nothing_else(encoder):
  for path, asked in (
    ('/v1/completions', {'prompt': 'a'}),
    ('/v1/completions', {'prompt': 'a', 'stream': True}),
    ('/v1/chat/completions', {'messages': [{'role': 'user', 'content': 'a'}]}),
    ('/v1/embeddings', {'input': 'x' * 60}),
    ('/v1/embeddings', {'input': 'a', 'dimensions': 99}),
    ('/v1/embeddings', {'input': 'a', 'user': 'me'}),
    ('/v1/embeddings', {'input': []}),
    ('/v1/embeddings', {'input': [[9999]]}),
  ):
    response = encoder.post(path, json=asked)
    assert response.status_code in (400, 404) and response.json()['error']['message'], path
    if path.endswith('completions'):
      assert 'ask /v1/embeddings' in response.json()['error']['message']
  ids = encoder.post('/tokenize', json={'prompt': 'a'}).json()['tokens']
  assert ids == [1, *ByteTokenizer().encode('a'), 2]
  assert np.array_equal(vectors(encoder, [ids]), vectors(encoder, ['a']))
  assert encoder.get('/health').json()['status'] == 'ready'
  with pytest.raises(ValueError, match="pooling='max' must be one of mean"):
    Running(generator(False), pooling='max', **SIZES)
  for name in ('pages', 'host_pages', 'lookup'):
    given = {'pages': 4, name: 4} if name == 'host_pages' else {name: 4}
    with pytest.raises(ValueError, match=r'(pages|lookup)=4 of an encoder, which writes nothing'):
      Running(generator(False), pooling='mean', **SIZES | given)
  with pytest.raises(ValueError, match="pooling='first' of a decoder"):
    check_pooling('first', causal=True)


@pytest.mark.slow
def test_a_decoder_embeds_beside_what_it_writes():
  """By the last token, on a mesh, while a text is written."""
  made = generator_of(config_of(48), seed=3, data=2)
  served = Running(made, pooling='last', **SIZES | {'rows': 2})
  assert served.ready(), served.error
  with TestClient(app(served, Served(name='m'), hosts=['*'])) as client:
    written = {'prompt': 'a', 'max_tokens': 8, 'temperature': 0}
    before = client.post('/v1/completions', json=written).json()['choices']
    found = vectors(client, TEXTS)
    assert client.post('/v1/completions', json=written).json()['choices'] == before
  served.close()
  one = generator_of(config_of(48), seed=3)
  expected = [unit(of_alone(one, text)[-1]) for text in TEXTS]
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_forms_of_answers():
  served = FakeService(ByteTokenizer(), embeds=True)
  with served.by_itself(), TestClient(app(served, Served(name='m'), hosts=['*'])) as client:
    answer = client.post('/v1/embeddings', json={'input': [[3, 4]]}).json()
    assert answer['data'][0]['embedding'] == pytest.approx([0.6, 0.8, 0, 0])
    assert answer['usage'] == {'prompt_tokens': 2, 'total_tokens': 2} and answer['model'] == 'm'
    coded = client.post('/v1/embeddings', json={'input': [3, 4], 'encoding_format': 'base64'})
    content = base64.b64decode(coded.json()['data'][0]['embedding'])
    assert np.frombuffer(content, '<f4') == pytest.approx([0.6, 0.8, 0, 0])
    before = served.stats().jobs['embedding'].done
    refused = client.post('/v1/embeddings', json={'input': [[3, 4]], 'dimensions': 5})
    assert refused.status_code == 400 and 'the model has 4' in refused.json()['error']['message']
    assert served.stats().jobs['embedding'].done == before == 2  # it is said before any is read
  with TestClient(app(FakeService(ByteTokenizer()), Served(name='m'), hosts=['*'])) as client:
    refused = client.post('/v1/embeddings', json={'input': 'a'})
    assert refused.status_code == 404 and '--pooling=last' in refused.json()['error']['message']


def test_jobs_are_counted_by_kind():
  """With their tokens, and the time that they took; what fails and what is refused, too."""

  served = FakeService(
    ByteTokenizer(), scores=True, embeds=True, limits=Limits(waiting=2), sizes=SMALL
  )
  first = served.embed([[5, 6, 7], [8]], '')
  served.score(Call(prompt=[5, 6, 7, 8, 9]), 0)
  with pytest.raises(QueueFull):
    served.embed([[5]], '')
  assert served.stats().jobs_waiting == 2 and served.stats().refused == 1
  served.clock.advance(2.0)
  served.run()
  assert len(first.result(0)) == 2
  served._embedder = lambda texts, front: _failing()
  lost = served.embed([[5]], '')
  served.run()
  assert lost.exception(0) is not None
  stats = served.stats()
  assert stats.jobs['embedding'] == JobCounts(done=1, failed=1, tokens=4, seconds=2.0)
  assert (stats.jobs['score'].done, stats.jobs['score'].tokens) == (1, 5)
  said = Metrics(served, 'm').text().decode()
  for line in (
    'tandem_jobs_done_total{kind="embedding",model_name="m"} 1.0',
    'tandem_job_tokens_total{kind="score",model_name="m"} 5.0',
    'tandem_job_seconds_total{kind="embedding",model_name="m"} 2.0',
    'tandem_num_jobs_waiting{model_name="m"} 0.0',
  ):
    assert line in said, said


def _failing():
  yield
  raise RuntimeError('no device')
