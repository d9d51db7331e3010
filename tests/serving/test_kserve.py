"""Does KServe's protocol say what OpenAI's says of the same request, in tensors, and refuse by name
what it does not have?
"""

import pytest
from starlette.testclient import TestClient

from serving import call as calls
from serving.guard import ApiKeys
from serving.http import app
from serving.wire import Served
from tests.serving.test_http import KEY, TEXT, service

TENSOR = {'name': 'prompt', 'datatype': 'BYTES', 'shape': [2], 'data': ['a', 'bc']}


@pytest.fixture(scope='module')
def client():
  served = service()
  with served.by_itself(), TestClient(app(served, Served(name='m'), hosts=['*'])) as made:
    made.served = served
    yield made


def infer(client, model='m', **asked):
  return client.post(f'/v2/models/{model}/infer', json={'inputs': [TENSOR]} | asked)


def test_tensors_say_what_a_completion_says(client):
  options = {'n': 2, 'seed': 7, 'max_tokens': 60}
  answer = infer(client, id='7', parameters=options).json()
  asked = options | {'prompt': TENSOR['data']}
  texts = [c['text'] for c in client.post('/v1/completions', json=asked).json()['choices']]
  assert texts == [TEXT] * 4
  outputs = {each['name']: each for each in answer['outputs']}
  assert answer['model_name'] == 'm' and answer['id'] == '7' and answer['parameters']['seed'] == 7
  for name, data in {'text': texts, 'finish_reason': ['stop'] * 4}.items():
    assert outputs[name] == {'name': name, 'datatype': 'BYTES', 'shape': [4], 'data': data}
  only = infer(client, outputs=[{'name': 'text'}]).json()['outputs']
  assert [each['name'] for each in only] == ['text']


def test_it_says_what_it_is(client):
  assert client.get('/v2').json().keys() == {'name', 'version', 'extensions'}
  about = client.get('/v2/models/m').json()
  assert about['inputs'] == [{'name': 'prompt', 'datatype': 'BYTES', 'shape': [-1]}]
  assert client.get('/v2/models/m/ready').json() == {'name': 'm', 'ready': True}
  client.served.state = calls.DRAINING
  assert client.get('/v2/models/m/ready').status_code == infer(client).status_code == 503
  client.served.state = calls.READY


@pytest.mark.parametrize(
  'asked, says',
  [
    ({'parameters': {'stream': True}}, 'parameters.stream is not known'),
    ({'parameters': {'model': 'm'}}, 'parameters.model is not known'),
    ({'parameters': {'temperature': -1}}, 'temperature=-1'),
    ({'inputs': []}, 'inputs has 0 parts'),
    ({'inputs': [TENSOR | {'shape': [3]}]}, 'there are 2 data'),
    ({'inputs': [TENSOR | {'datatype': 'FP32'}]}, 'one of BYTES'),
    ({'inputs': [TENSOR | {'name': 'x'}]}, 'one of prompt'),
    ({'inputs': [TENSOR | {'parameters': {'binary_data_size': 3}}]}, 'binary_data is not'),
    ({'outputs': [{'name': 'y'}]}, 'one of text, finish_reason'),
    ({'timeout': 3}, 'timeout is not known'),
  ],
)
def test_errors_have_its_form(client, asked, says):
  response = infer(client, **asked)
  assert response.status_code == 400 and response.json().keys() == {'error'}
  assert says in response.json()['error']


def test_other_models_paths_and_people(client, tmp_path):
  for response, status in (
    (infer(client, 'x'), 404),
    (client.get('/v2/models/x'), 404),
    (client.get('/v2/models/x/ready'), 404),
    (client.get('/v2/repository/index'), 404),
    (client.get('/v2/models/m/infer'), 405),
  ):
    assert response.status_code == status and isinstance(response.json()['error'], str)
  (tmp_path / 'keys').write_text(KEY)
  locked = app(service(), Served(name='m'), hosts=['*'], keys=ApiKeys(tmp_path / 'keys'))
  with TestClient(locked) as other:
    assert infer(other).status_code == other.get('/v2').status_code == 401
    assert other.get('/v2/health/live').status_code == 200


def test_a_name_may_have_slashes():
  served = service()
  made = app(served, Served(name='org/m'), hosts=['*'])
  with served.by_itself(), TestClient(made) as one:
    assert one.get('/v2/models/org/m').json()['name'] == 'org/m'
    assert one.get('/v2/models/org/m/ready').json() == {'name': 'org/m', 'ready': True}
    assert infer(one, 'org/m').json()['model_name'] == 'org/m'
    assert one.get('/v2/models/org').status_code == 404
