"""Does OpenAI's own client, which checks the form of what it is sent, get on with a server that
listens on a port?
"""

import contextlib
import json
import threading

import pytest
import uvicorn

from tests.serving.test_http import KEY, TEXT, TOKENIZER, service

openai = pytest.importorskip('openai', reason='the client that the server is for')

MESSAGES = [{'role': 'user', 'content': 'hello'}]
SCHEMA = {
  'type': 'object',
  'properties': {'city': {'type': 'string', 'maxLength': 9}},
  'required': ['city'],
  'additionalProperties': False,
}
TOOL = {'type': 'function', 'function': {'name': 'weather', 'parameters': SCHEMA}}
CALL = '{"name": "weather", "arguments": {"city": "Ulm"}}'


@contextlib.contextmanager
def listening(keys, write=None):
  """A client of a server on a port of this machine."""
  from serving.guard import ApiKeys
  from serving.http import app
  from serving.listening import bound, config
  from serving.wire import Served

  served, opened = service(write), bound('127.0.0.1', 0)
  made = app(served, Served(name='m'), hosts=['127.0.0.1'], keys=ApiKeys(keys))
  server = uvicorn.Server(config(made, served))
  thread = threading.Thread(target=server.run, kwargs={'sockets': [opened]}, daemon=True)
  with served.by_itself():
    opened.listen()
    thread.start()
    url = f'http://127.0.0.1:{opened.getsockname()[1]}/v1'
    with openai.OpenAI(api_key=KEY, base_url=url, max_retries=0) as client:
      yield client
    server.should_exit = True
    thread.join()


@pytest.fixture
def keys(tmp_path):
  file = tmp_path / 'keys'
  file.write_text(f'me {KEY}\n')
  return file


@pytest.mark.slow
def test_the_client_reads_answers_and_errors(keys):
  with listening(keys) as client:
    assert [model.id for model in client.models.list()] == ['m']
    chat = client.chat.completions
    answer = chat.create(
      model='m', messages=MESSAGES, max_completion_tokens=60, logprobs=True, top_logprobs=2, n=2
    )
    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert len(answer.choices[0].logprobs.content) * 2 == answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0

    options = {'include_usage': True}
    stream = chat.create(model='m', messages=MESSAGES, stream=True, stream_options=options)
    *chunks, last = stream
    assert ''.join(chunk.choices[0].delta.content or '' for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == 'stop' and last.usage.completion_tokens

    vectors = client.embeddings.create(model='m', input=['a', 'bc'])  # as base64
    assert [each.index for each in vectors.data] == [0, 1] and vectors.usage.total_tokens == 5
    assert sum(x * x for x in vectors.data[1].embedding) == pytest.approx(1)

    text = client.completions.create(model='m', prompt='a', max_tokens=60, logprobs=1)
    assert text.choices[0].text == TEXT and text.choices[0].logprobs.top_logprobs

    with pytest.raises(openai.NotFoundError) as caught:
      chat.create(model='gpt', messages=MESSAGES)
    assert caught.value.code == 'model_not_found' and caught.value.param == 'model'
    with pytest.raises(openai.BadRequestError, match='user is not supported'):
      chat.create(model='m', messages=MESSAGES, user='me')
    with pytest.raises(openai.AuthenticationError):
      client.with_options(api_key='x' * 20).models.list()


@pytest.mark.slow
def test_the_client_is_given_calls_of_tools(keys):
  with listening(keys, lambda request: TOKENIZER.encode(CALL)) as client:
    asked = dict(model='m', messages=MESSAGES, tools=[TOOL], tool_choice='required', max_tokens=80)
    answer = client.chat.completions.create(**asked)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == 'tool_calls' and choice.message.content is None
    assert call.function.name == 'weather' and json.loads(call.function.arguments) == {
      'city': 'Ulm'
    }
    *_, last = client.chat.completions.create(**asked, stream=True)
    (delta,) = last.choices[0].delta.tool_calls
    assert (
      delta.function.arguments == call.function.arguments
      and last.choices[0].finish_reason == 'tool_calls'
    )

    # What is cut off is no call, and stays text.
    short = client.chat.completions.create(**asked | {'max_tokens': 20})
    assert short.choices[0].finish_reason == 'length' and short.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match='shows it no tools'):
      client.chat.completions.create(**asked | {'tool_choice': 'auto'})
