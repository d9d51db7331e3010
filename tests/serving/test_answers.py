"""Do answers say of a text what clients of OpenAI's, and of vLLM's, read there: which tokens were
likely, what ended it, whose it is?
"""

import pytest
from starlette.testclient import TestClient

from decode.front import Front
from serving import call as calls
from serving.call import Call
from serving.fake import FakeService
from serving.http import app
from serving.wire import Served
from tests.serving.test_http import CHAT, COMPLETION, TOKENIZER, ChatTokenizer, pieces, service


def choices(served, asked, path='/v1/completions'):
  """Of an answer, whole, and the last piece of each of a stream's."""
  with served.by_itself(), TestClient(app(served, Served(name='m'), hosts=['*'])) as one:
    whole = one.post(path, json=asked)
    assert whole.status_code == 200, whole.text
    ends = {}
    for piece in pieces(one.post(path, json=asked | {'stream': True})):
      ends |= {each['index']: each for each in piece['choices'] if each['finish_reason']}
  return whole.json()['choices'], [ends[index] for index in sorted(ends)]


@pytest.mark.parametrize(
  'asked, reason',
  [
    ({}, None),
    ({'stop': ['wor']}, 'wor'),
    ({'stop_token_ids': [TOKENIZER.encode('w')[0]]}, TOKENIZER.encode('w')[0]),
    ({'stop_token_ids': [TOKENIZER.eos], 'ignore_eos': True}, TOKENIZER.eos),
    ({'stop': ['<s>']}, None),
  ],
)
def test_what_ended_a_text_is_told_apart_from_its_own_end(asked, reason):
  def write(request):
    return TOKENIZER.encode('hello world') + ([TOKENIZER.eos] if asked.get('ignore_eos') else [])

  for each in choices(service(write), COMPLETION | asked):
    (choice,) = each
    assert (choice['finish_reason'], choice['stop_reason']) == ('stop', reason)


def test_the_token_itself_is_among_its_likeliest():
  """Of a completion, as one more where it was not; of a chat it stands beside them."""
  (choice,), _ = choices(service(lambda request: [70, 1, 2]), COMPLETION | {'logprobs': 2})
  first, second, _ = choice['logprobs']['top_logprobs']
  assert first[TOKENIZER.decode([70])] == -0.5 and len(first) == 3
  assert second['<s>'] == -1.5 and len(second) == 2  # by the likeliest, which it is among
  asked = CHAT | {'logprobs': True, 'top_logprobs': 2}
  (choice,), _ = choices(service(lambda request: [70, 1, 2]), asked, '/v1/chat/completions')
  assert [len(each['top_logprobs']) for each in choice['logprobs']['content']] == [2, 2, 2]
  (choice,), _ = choices(service(), COMPLETION | {'logprobs': 0})
  assert choice['logprobs']['top_logprobs'] is None


def test_adapters_are_models_of_their_own():
  """By their names: listed, asked for, answered by, and no others."""
  seen = []

  def write(request):
    seen.append(request.adapter)
    return TOKENIZER.encode(f'adapter {request.adapter}')

  adapters = {'orders': Front(adapter='orders', index=1), 'org/tables': Front('org/tables', 2)}
  served = FakeService(ChatTokenizer(), write, adapters=adapters)
  with served.by_itself(), TestClient(app(served, Served(name='m'), hosts=['*'])) as one:
    cards = one.get('/v1/models').json()['data']
    assert [(card['id'], card.get('parent')) for card in cards] == [
      ('m', None),
      ('orders', 'm'),
      ('org/tables', 'm'),
    ]
    assert one.get('/v1/models/org/tables').json()['parent'] == 'm'
    for name, index in (('m', 0), ('orders', 1), ('org/tables', 2)):
      for path, asked in (('completions', COMPLETION), ('chat/completions', CHAT)):
        answer = one.post(f'/v1/{path}', json=asked | {'model': name}).json()
        (choice,) = answer['choices']
        text = choice['text'] if path == 'completions' else choice['message']['content']
        assert (answer['model'], text) == (name, f'adapter {index}')
      assert one.get(f'/v2/models/{name}/ready').json() == {'name': name, 'ready': True}
    refused = one.post('/v1/completions', json=COMPLETION | {'model': 'order'})
    assert refused.status_code == 404 and 'm, orders, org/tables' in refused.text
    assert one.get('/v1/models/order').status_code == 404
  assert seen == [0, 0, 1, 1, 2, 2]


def test_who_does_not_say_how_many_tokens_gets_as_many_as_the_server_says():
  """And no more than fit."""

  def endless(request):
    while True:
      yield 70

  for usual, expected in ((5, (5, 5)), (None, (16, 256)), (10_000, (256, 256))):
    served = service(endless)
    defaults = {'max_new_tokens': usual} if usual else {}
    made = app(served, Served(name='m', defaults=defaults), hosts=['*'])
    with served.by_itself(), TestClient(made) as one:
      for asked, most in zip((COMPLETION, CHAT), expected, strict=True):
        asked = {name: value for name, value in asked.items() if name != 'max_tokens'}
        path = '/v1/completions' if 'prompt' in asked else '/v1/chat/completions'
        usage = one.post(path, json=asked).json()['usage']
        assert usage['completion_tokens'] == min(most, 256 - usage['prompt_tokens'])


def test_who_asks_for_no_alternatives_keeps_none():
  """Whatever his neighbours ask for; and who does keeps no more than he has asked for."""
  served, rows = service(lambda request: [70] * 9), []
  for logprobs in (-1, 3):
    options = calls.Options(max_new_tokens=5, logprobs=logprobs)
    served.submit(Call(prompt='a', options=options))
  served.step()
  rows = [sample.text for sample in served._scheduler._rows.values()]
  served.run()
  assert [[len(each) for each in row._alternatives] for row in rows] == [[], [3] * 5]


def test_what_lies_unread_is_bounded_with_its_alternatives():
  """Each of which takes as much memory as a token."""
  counts = []
  for logprobs in (-1, 3):
    served = service(lambda request: [70] * 300, unread=64)
    ticket = served.submit(
      Call(prompt='a', options=calls.Options(max_new_tokens=200, logprobs=logprobs))
    )
    served.run()
    *_, last = ticket
    assert last.error.kind == calls.SLOW and ticket.unread == 0
    counts.append(served.stats().generated_tokens)
  assert counts[1] < counts[0] / 2
