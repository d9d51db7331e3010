"""Do clients of OpenAI's API get what it says, whole or in pieces, and is everything else refused
by its name? On a service whose engine writes what it is told to.
"""

import asyncio
import dataclasses
import json

import pytest
from starlette.testclient import TestClient

from data.tokenizers import ByteTokenizer
from serving import call as calls
from serving.call import Limits
from serving.fake import SIZES, FakeService
from serving.guard import ApiKeys
from serving.http import app
from serving.wire import Served

TEXT = 'one “two” <script>\u2028 é 🙂 end'
TOKENIZER = ByteTokenizer()
KEY = 'k' * 20


class ChatTokenizer(ByteTokenizer):
  """Whose template is as simple as one can be."""

  def __init__(self):
    super().__init__()
    self.chat_templates = {
      'default': '{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}'
    }

  def encode(self, text, *, special=False):
    return super().encode(text)


def service(write=None, rows=2, **limits):
  write = write or (lambda request: TOKENIZER.encode(TEXT))
  sizes = dataclasses.replace(SIZES, rows=rows)
  return FakeService(ChatTokenizer(), write, sizes=sizes, limits=Limits(**limits), embeds=True)


@pytest.fixture(scope='module')
def client():
  served = service()
  with served.by_itself(), TestClient(app(served, Served(name='m'), hosts=['testserver'])) as made:
    made.served = served
    yield made


def pieces(response):
  """Objects of a stream, which ends as it has to."""
  assert response.status_code == 200, response.text
  assert response.headers['content-type'].startswith('text/event-stream')
  lines = response.text.splitlines()  # which U+2028 would break
  assert all(line.startswith('data: ') for line in lines[::2]) and not any(lines[1::2])
  assert lines[-2] == 'data: [DONE]'
  return [json.loads(line[6:]) for line in lines[:-2:2]]


def joined(chunks, chat):
  """Of each choice what a stream has said of it."""
  said = {}
  for chunk in chunks:
    for choice in chunk['choices']:
      one = said.setdefault(
        choice['index'], {'text': '', 'finish': None, 'logprobs': [], 'ids': []}
      )
      assert one['finish'] is None, 'something behind the end'
      one['text'] += choice['delta'].get('content', '') if chat else choice['text']
      one['finish'] = choice['finish_reason']
      logprobs = choice['logprobs'] or {}
      one['logprobs'] += logprobs.get('content' if chat else 'token_logprobs', [])
      one['ids'] += choice.get('token_ids', [])
  return said


CHAT = {'messages': [{'role': 'user', 'content': 'hello'}], 'max_tokens': 60}
COMPLETION = {'prompt': 'hello', 'max_tokens': 60}
ASKED = [
  (True, CHAT | {'n': 3, 'seed': 5}),
  (True, CHAT | {'logprobs': True, 'top_logprobs': 2, 'return_token_ids': True}),
  (True, CHAT | {'stop': ['end', '<script>']}),
  (True, CHAT | {'max_tokens': 7}),
  (True, CHAT | {'max_tokens': 22}),  # within a character
  (False, COMPLETION | {'prompt': ['a', 'bc'], 'n': 2, 'echo': True}),
  (False, COMPLETION | {'prompt': [5, 6, 7], 'logprobs': 3, 'return_token_ids': True}),
  (False, COMPLETION | {'prompt': [[5, 6], [7]], 'logprobs': 0}),
]


@pytest.mark.parametrize('chat, asked', ASKED)
def test_pieces_say_what_the_whole_says(client, chat, asked):
  path = '/v1/chat/completions' if chat else '/v1/completions'
  whole = client.post(path, json=asked).json()
  streamed = asked | {'stream': True, 'stream_options': {'include_usage': True}}
  *chunks, last = pieces(client.post(path, json=streamed))
  assert len({chunk['id'] for chunk in chunks}) == 1 and last['choices'] == []
  assert last['usage'] == whole['usage'] and all(chunk['usage'] is None for chunk in chunks)
  said = joined(chunks, chat)
  assert sorted(said) == [choice['index'] for choice in whole['choices']]
  for choice in whole['choices']:
    one = said[choice['index']]
    assert one['text'] == (choice['message']['content'] if chat else choice['text'])
    assert one['finish'] == choice['finish_reason'] in ('stop', 'length')
    assert one['ids'] == choice.get('token_ids', [])
    logprobs = choice['logprobs']
    values = logprobs['content' if chat else 'token_logprobs'] if logprobs else []
    assert one['logprobs'] == values
  count = sum(map(len, (one['ids'] for one in said.values())))
  assert count in (0, whole['usage']['completion_tokens'])


def test_an_answer_has_the_form_of_openais(client):
  answer = client.post('/v1/chat/completions', json=ASKED[1][1] | {'seed': 9}).json()
  (choice,) = answer['choices']
  assert answer['object'] == 'chat.completion' and answer['model'] == 'm' and answer['seed'] == 9
  assert choice['message'] == {'role': 'assistant', 'content': TEXT, 'refusal': None}
  tokens = choice['logprobs']['content']
  written = b''.join(bytes(token['bytes']) for token in tokens)
  assert written.decode() == TEXT and len(tokens) == answer['usage']['completion_tokens']
  assert tokens[-1]['token'] == '</s>' and all(len(t['top_logprobs']) == 2 for t in tokens)

  answer = client.post('/v1/completions', json=ASKED[6][1]).json()
  logprobs = answer['choices'][0]['logprobs']
  assert logprobs['text_offset'][:6] == [0, 1, 2, 3, 4, 4]  # the quote has three bytes
  assert logprobs['tokens'][4] == 'bytes:\\xe2' and len(logprobs['top_logprobs'][0]) == 4
  assert answer['choices'][0]['prompt_token_ids'] == [5, 6, 7]


def test_prompts_are_scored_where_that_is_asked_for():
  """In vLLM's form, and echoed in OpenAI's, whole and streamed."""
  served = FakeService(ChatTokenizer(), lambda request: [70, 2], scores=True)
  with served.by_itself(), TestClient(app(served, Served(name='m'), hosts=['*'])) as one:
    asked = {'prompt': [[1, 5, 9], [7]], 'logprobs': 2, 'echo': True}
    whole = one.post('/v1/completions', json=asked).json()['choices']
    assert whole[0]['logprobs']['token_logprobs'] == [None, -5 / 8, -9 / 8, -0.5, -0.5]
    assert whole[0]['logprobs']['top_logprobs'][0] is None
    assert [*whole[0]['logprobs']['top_logprobs'][1].values()] == [0.0, -1 / 8, -5 / 8]
    assert whole[1]['logprobs']['token_logprobs'] == [None, -0.5, -0.5]
    offsets, text = whole[0]['logprobs']['text_offset'], whole[0]['text']
    assert text == TOKENIZER.decode([1, 5, 9, 70]) and offsets[-1] == len(text)
    streamed = pieces(one.post('/v1/completions', json=asked | {'stream': True}))
    for index, said in joined(streamed, False).items():
      assert said['logprobs'] == whole[index]['logprobs']['token_logprobs']

    answer = one.post('/v1/completions', json={'prompt': [1, 9], 'prompt_logprobs': 1}).json()
    first, second = answer['choices'][0]['prompt_logprobs']
    token = TOKENIZER.decode([9])
    assert first is None
    assert second['9'] == {'logprob': -9 / 8, 'rank': 9, 'decoded_token': token}
    assert second['0']['rank'] == 1 and len(second) == 2
    chat = one.post('/v1/chat/completions', json=CHAT | {'prompt_logprobs': 0}).json()
    assert len(chat['prompt_logprobs']) == chat['usage']['prompt_tokens']
    for more, says in (({'stream': True}, 'stream'), ({'prompt_logprobs': 21}, 'at most 20')):
      refused = one.post('/v1/completions', json=COMPLETION | {'prompt_logprobs': 1} | more)
      assert refused.status_code == 400 and says in refused.json()['error']['message']


def test_a_sample_can_be_asked_for_alone(client):
  served = service(lambda request: TOKENIZER.encode(str(request.sampling.seed[0])))
  with served.by_itself(), TestClient(app(served, Served(name='m'), hosts=['*'])) as one:
    asked = COMPLETION | {'n': 3, 'seed': 11}
    all_of_them = one.post('/v1/completions', json=asked).json()['choices']
    alone = one.post('/v1/completions', json=asked | {'sample_index': 2}).json()['choices']
    assert alone == [all_of_them[2]]
    seeds = [one.post('/v1/completions', json=COMPLETION).json()['seed'] for _ in range(2)]
    assert seeds[0] != seeds[1]


REFUSED = [
  (COMPLETION | {'best_of': 2}, 'best_of', 'ask for n'),
  (COMPLETION | {'suffix': 'x'}, 'suffix', ''),
  (COMPLETION | {'beams': 4}, 'beams', 'use generate.py'),
  (COMPLETION | {'use_beam_search': True}, 'use_beam_search', 'use generate.py'),
  (COMPLETION | {'frequency': 1}, 'frequency', 'known: model'),
  (COMPLETION | {'temperature': -1}, 'temperature', '0 \\(greedy\\)'),
  (COMPLETION | {'temperature': 'hot'}, 'temperature', ''),
  (COMPLETION | {'top_p': 0}, 'top_p', 'above 0'),
  (COMPLETION | {'max_tokens': 0}, 'max_tokens', 'in \\[1'),
  (COMPLETION | {'max_tokens': 999}, None, 'at most 250 new ones'),
  (COMPLETION | {'n': 17}, 'n', 'at most 16'),
  (COMPLETION | {'n': True}, 'n', 'integer'),
  (COMPLETION | {'prompt': ['a'] * 9, 'n': 2}, 'prompt', '18 texts, of at most 16'),
  (COMPLETION | {'prompt': []}, 'prompt', '0 parts'),
  (COMPLETION | {'prompt': [99999]}, None, 'ids are in'),
  (COMPLETION | {'prompt': ['a', 3]}, 'prompt[1]', 'array'),
  (COMPLETION | {'stop': ['x'] * 17}, 'stop', 'at most 16'),
  (COMPLETION | {'stop': ''}, 'stop', 'empty'),
  (COMPLETION | {'logprobs': 21}, 'logprobs', 'at most 20'),
  (COMPLETION | {'logprobs': 1, 'echo': True}, 'logprobs', 'echo.*--prompt_logprobs'),
  (COMPLETION | {'prompt_logprobs': 1}, 'prompt_logprobs', '--prompt_logprobs'),
  (COMPLETION | {'logit_bias': {'x': 1}}, 'logit_bias', 'no id'),
  (COMPLETION | {'logit_bias': {'3': 101}}, 'logit_bias.3', '100'),
  (COMPLETION | {'logit_bias': {'1': 5, '01': -5}}, 'logit_bias', '"01", which is no id'),
  (COMPLETION | {'ignore_eos': True, 'regex': 'a'}, 'ignore_eos', 'leave out one'),
  (COMPLETION | {'ignore_eos': True, 'response_format': {'type': 'json_object'}}, 'ignore_eos',
   'leave out one'),
  (COMPLETION | {'seed': -1}, 'seed', 'integer'),
  (COMPLETION | {'stream_options': {'include_usage': True}}, 'stream_options', 'stream=true'),
  (COMPLETION | {'regex': '('}, None, "can't be used"),
  (COMPLETION | {'regex': 'a', 'response_format': {'type': 'json_object'}}, 'regex', 'both'),
  (COMPLETION | {'response_format': {'type': 'xml'}}, 'response_format.type', 'one of text'),
  (COMPLETION | {'sample_index': 1}, 'sample_index', 'num_samples|n=1'),
  (COMPLETION | {'messages': []}, 'messages', 'not known'),
  ({'max_tokens': 3}, 'prompt', 'missing'),
  (CHAT | {'functions': []}, 'functions', 'tools'),
  (CHAT | {'top_logprobs': 2}, 'top_logprobs', 'logprobs=true'),
  (CHAT | {'max_completion_tokens': 3}, 'max_tokens', 'differ'),
  (CHAT | {'messages': [{'role': 'me', 'content': ''}]}, 'messages[0].role', 'one of system'),
  (CHAT | {'messages': [{'role': 'user'}]}, 'messages[0].content', 'missing'),
  (CHAT | {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]},
   'messages[0].content[0]', 'text alone'),
  (CHAT | {'messages': [{'role': 'user', 'content': 'x', 'mood': 1}]}, 'messages[0].mood', ''),
  (CHAT | {'store': True}, 'store', 'not supported'),
]  # fmt: skip


@pytest.mark.parametrize('asked, param, says', REFUSED)
@pytest.mark.parametrize('stream', [False, True])
def test_what_is_not_supported_is_refused_by_its_name(client, asked, param, says, stream):
  if stream and 'stream_options' in asked:
    return
  path = '/v1/chat/completions' if 'functions' in asked or asked.get('messages') else None
  response = client.post(
    path or '/v1/completions', json=asked | ({'stream': True} if stream else {})
  )
  assert response.status_code == 400, response.text
  error = response.json()['error']
  assert set(error) == {'message', 'type', 'param', 'code'}
  assert error['type'] == 'invalid_request_error' and error['param'] == param
  pytest.raises(ValueError, _raise, error['message']).match(says)


def _raise(message):
  raise ValueError(message)


@pytest.mark.parametrize(
  'content, says',
  [
    (b'{', 'no JSON'),
    (b'[]', 'an array'),
    (b'{"prompt": "\xff"}', 'not UTF-8, from byte 12'),
    (b'{"prompt": "\\ud800"}', 'half of a character'),
    (b'{"prompt": "a", "prompt": "b"}', 'there twice'),
    (b'{"prompt": "a", "temperature": NaN}', 'NaN is no number'),
    (b'{"prompt": "a", "temperature": 1e999}', 'temperature'),
    (b'{"prompt": "a", "temperature": ' + b'9' * 400 + b'}', 'temperature'),
    (b'{"prompt": ' + b'[' * 100_000, 'JSON|deep'),
    (b'', 'no JSON'),
  ],
)
def test_what_is_no_json_is_refused(client, content, says):
  headers = {'Content-Type': 'application/json'}
  response = client.post('/v1/completions', content=content, headers=headers)
  assert response.status_code == 400
  pytest.raises(ValueError, _raise, response.json()['error']['message']).match(says)


def test_other_paths_models_and_methods(client):
  assert client.get('/v1/models').json()['data'][0]['id'] == 'm'
  assert client.get('/v1/models/m').json()['max_model_len'] == 256
  for response, status in (
    (client.get('/v1/models/x'), 404),
    (client.post('/v1/completions', json=COMPLETION | {'model': 'x'}), 404),
    (client.post('/v1/responses', json={}), 404),
    (client.get('/v1/completions'), 405),
  ):
    assert response.status_code == status and response.json()['error']['message']


def test_tokens_there_and_back(client):
  ids = client.post('/tokenize', json={'prompt': 'hé'}).json()
  assert ids == {'tokens': [1, *TOKENIZER.encode('hé')], 'count': 4, 'max_model_len': 256}
  assert client.post('/detokenize', json={'tokens': ids['tokens']}).json() == {'prompt': 'hé'}
  chat = client.post('/tokenize', json={'messages': CHAT['messages']}).json()['tokens']
  assert TOKENIZER.decode(chat) == 'user:hello;'
  for path, values in (('/tokenize', {}), ('/detokenize', {'tokens': [99999]})):
    assert client.post(path, json=values).status_code == 400


def test_sagemaker_asks_by_what_the_body_has(client):
  assert client.get('/ping').status_code == 200
  assert client.post('/invocations', json=CHAT).json()['object'] == 'chat.completion'
  assert client.post('/invocations', json=COMPLETION).json()['object'] == 'text_completion'
  assert client.post('/invocations', json=COMPLETION | CHAT).status_code == 400


def test_who_may_not_ask_is_told_why(tmp_path):
  file = tmp_path / 'keys'
  file.write_text(f'# of the team\nann {KEY}\n')
  served = service()
  made = app(served, Served(name='m'), hosts=['testserver'], keys=ApiKeys(file))
  with served.by_itself(), TestClient(made) as one:
    bearer = {'Authorization': f'Bearer {KEY}'}

    def status(**changed):
      headers = bearer | changed
      headers = {name.replace('_', '-'): each for name, each in headers.items() if each is not None}
      return one.post(
        '/v1/completions', content=json.dumps(COMPLETION), headers=headers
      ).status_code

    json_type = {'Content_Type': 'application/json'}
    assert status(**json_type) == 200
    assert status(**json_type, Origin='http://testserver') == 200
    assert status(**json_type, Authorization=None) == 401
    assert status(**json_type, Authorization='Bearer ' + KEY[:-1] + 'x') == 401
    assert status(**json_type, Host='evil.example') == 421
    assert status(**json_type, Origin='http://evil.example') == 403
    assert status(**json_type, Origin='null') == 403
    assert status(Content_Type='text/plain') == 415
    assert status() == 415
    long = one.post('/v1/completions', json={'prompt': 'x' * 2**21}, headers=bearer)
    assert long.status_code == 413 and long.headers['connection'] == 'close'
    for path in ('/metrics', '/v1/models', '/tokenize'):
      assert one.get(path).status_code == 401
    assert one.get('/health').status_code == one.get('/').status_code == 200
    assert "default-src 'none'" in one.get('/').headers['content-security-policy']

    file.write_text(f'{KEY[::-1]}2\n')
    assert status(**json_type) == 401
    file.write_text('short\n')  # is no key: those from before stay
    assert status(**json_type, Authorization=f'Bearer {KEY}2') == 200
  with pytest.raises(ValueError, match='line 1: a line is'):
    ApiKeys(file)


def broken_embedder(texts, front):
  raise TypeError('an engine that is not there')


def test_a_full_queue_and_a_server_that_starts_or_stops_say_when_to_come_again():
  served = service(rows=1, waiting=2)
  with TestClient(app(served, Served(name='m'), hosts=['*'])) as one:
    served._embedder = broken_embedder  # of an engine that is not there
    for asked in ({'n': 3}, {'prompt': ['a', 'b', 'c']}):  # for which there is never a place
      refused = one.post('/v1/completions', json=COMPLETION | asked)
      assert refused.status_code == 400 and 'of at most 2' in refused.text, refused.text
    assert served.idle
    served.submit(calls.Call(prompt='a'))
    full = one.post('/v1/completions', json=COMPLETION | {'n': 2})
    assert full.status_code == 429 and int(full.headers['retry-after']) >= 1
    assert full.json()['error']['type'] == 'rate_limit_error'
    for state in (calls.STARTING, calls.DRAINING, calls.FAILED):
      served.state = state
      for path, asked in (('completions', COMPLETION), ('embeddings', {'input': 'x'})):
        response = one.post(f'/v1/{path}', json=asked)
        assert response.status_code == 503 and 'retry-after' in response.headers, response.text
      assert one.get('/health').status_code == one.get('/ping').status_code == 503


def test_a_drained_call_is_handed_back():
  async def run():
    served = service()
    sent = asyncio.create_task(ask(served, COMPLETION | {'stream': True}, asyncio.Event()))
    while not served._scheduler._arrived:
      await asyncio.sleep(0.001)
    served.drain(0)
    served.clock.advance(1)
    served.run()
    return await sent

  sent = asyncio.run(run())
  assert sent[0]['status'] == 503


async def ask(served, asked, gone, hear=None, path='/v1/completions'):
  """Messages that the app sends to a client, which goes away when `gone` is set. hear:
  takes each.
  """
  body, sent = json.dumps(asked).encode(), []
  came = [{'type': 'http.request', 'body': body, 'more_body': False}]

  async def receive():
    if came:
      return came.pop()
    await gone.wait()
    return {'type': 'http.disconnect'}

  async def send(message):
    sent.append(message)
    if hear is not None:
      await hear(message)

  headers = [(b'host', b'x'), (b'content-type', b'application/json')]
  scope = {'type': 'http', 'method': 'POST', 'path': path, 'raw_path': path.encode()}
  scope |= {'query_string': b'', 'headers': headers, 'root_path': '', 'scheme': 'http'}
  await app(served, Served(name='m'), hosts=['*'])(scope, receive, send)
  return sent


@pytest.mark.parametrize('stream', [False, True])
def test_who_goes_away_is_not_written_for(stream):
  """Of 250 tokens it would be; and nothing is left."""

  def write(request):
    while True:
      yield 100

  async def run():
    served, gone = service(write), asyncio.Event()
    asked = COMPLETION | {'max_tokens': 250, 'n': 2, 'stream': stream}
    task = asyncio.create_task(ask(served, asked, gone))
    while not served.stats().generated_tokens > 20:
      await asyncio.sleep(0)
      served.step()
    gone.set()
    while not task.done():
      await asyncio.sleep(0)
      served.step()
    served.run()
    return served.stats()

  stats = asyncio.run(run())
  assert stats.finished == {'cancelled': 2} and stats.free == stats.rows
  assert stats.generated_tokens < 120


def test_what_breaks_is_an_error_before_and_behind_the_first_piece(client):
  served = service()
  with TestClient(app(served, Served(name='m'), hosts=['*'])) as one:
    for tokens, stream in ((0, False), (0, True), (1, True)):
      ended = break_after(served, tokens)
      with served.by_itself():
        response = one.post('/v1/completions', json=COMPLETION | {'stream': stream})
      ended()
      if tokens:
        last = response.text.strip().split('\n\n')[-1]
        assert '"code":"device"' in last and 'DONE' not in response.text
      else:
        assert response.status_code == 500 and response.json()['error']['code'] == 'device'
        assert 'secret' not in response.text


def break_after(served, tokens):
  """Its device breaks at a chunk; what undoes that."""
  before, engine, count = served.engine.decode, served.engine, []

  def decode(*given):
    count.append(1)
    if len(count) == tokens * 2 + 1:
      raise RuntimeError('secret of the device')
    return before(*given)

  engine.decode = decode
  return lambda: setattr(engine, 'decode', before)


def test_prompts_are_in_no_log(client, caplog):
  with caplog.at_level('INFO'):
    client.post('/v1/completions', json=COMPLETION | {'prompt': 'a secret'})
    client.post('/v1/completions', json=COMPLETION | {'prompt': 'a secret', 'n': 'secret'})
  lines = [json.loads(r.message) for r in caplog.records if r.name == 'serving.access']
  assert [line['status'] for line in lines] == [200, 400]
  assert lines[0]['completion_tokens'] and lines[0]['path'] == '/v1/completions'
  assert 'secret' not in caplog.text


SAID = {'role': 'assistant', 'content': None, 'refusal': None}


@pytest.mark.parametrize(
  'said, read',
  [
    (SAID | {'reasoning_content': 'so', 'annotations': None, 'audio': None}, 'assistant:;'),
    (SAID | {'content': 'a', 'tool_calls': [], 'function_call': None}, 'assistant:a;'),
  ],
)
def test_an_answer_is_history(client, said, read):
  """As OpenAI's client writes it down again, with what it had none of."""
  messages = [*CHAT['messages'], said, *CHAT['messages']]
  response = client.post('/tokenize', json={'messages': messages})
  assert response.status_code == 200, response.text
  assert TOKENIZER.decode(response.json()['tokens']) == f'user:hello;{read}user:hello;'


def test_what_a_user_leaves_out_is_missing(client):
  for said in ({'role': 'user', 'reasoning_content': 'so'}, SAID, SAID | {'tool_calls': []}):
    refused = client.post('/tokenize', json={'messages': [said]})
    assert refused.status_code == 400 and 'content is missing' in refused.text


def test_a_stop_that_names_a_control_token_is_one(client):
  """Which no text has in it."""
  served = service(lambda request: [*TOKENIZER.encode('ab'), 1, *TOKENIZER.encode('c<s>d')])
  with served.by_itself(), TestClient(app(served, Served(name='m'), hosts=['*'])) as one:
    for stops, text in ((['<s>'], 'ab'), ([], 'abc<s>d'), (['c<s>'], 'ab')):
      said = one.post('/v1/completions', json=COMPLETION | {'stop': stops}).json()['choices'][0]
      assert said['text'] == text and said['finish_reason'] == 'stop'
