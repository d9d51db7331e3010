"""Does a server of an encoder-decoder give everybody what a Generator writes, with and without
adapters, alone and in any company? And what does it say where it cannot?
"""

import types

import pytest
from starlette.testclient import TestClient

from decode.sizes import Sizes
from serving.http import app
from serving.rows import EngineRows, row_sizes
from serving.running import Running
from serving.wire import Served
from tests.decode.small import config_of
from tests.decode.test_soft_beside import CONTEXT, models_of
from tests.serving.test_serving import call, check_company, check_written, result

SIZES = dict(rows=3, steps=4, bias=8, ends=6, states=80, classes=64, alternatives=3)
PROMPT = 'one text'  # 8 tokens, and an end
ASKED = [
  call(PROMPT, 9, temperature=0.0, logprobs=2),
  call('another, text', 12, seed=3, logprobs=1),
  call(PROMPT, 8, seed=5, num_samples=4),
  call('ab', 20, regex='[ab]{3,9}c', seed=1, temperature=2.0),
  call(PROMPT, 8, temperature=0.0, adapter='spell'),
  call(PROMPT, 8, temperature=0.0, adapter='orders'),
  call('x' * (CONTEXT - 4), 8, seed=2, adapter='spell'),  # as long as can be
]


@pytest.fixture(scope='module')
def served():
  service = Running(models_of('encoder').together(), **SIZES)
  assert service.ready(), service.error
  yield service
  service.close()


@pytest.mark.slow
def test_bytes_are_the_same_in_any_company(served):
  check_company(served, ASKED, call('and this', 14))
  many = served.submit(ASKED[2])
  assert len(result(many)) == 4 and many.usage.prompt == len(PROMPT) + 1
  assert many.usage.cached == 0 and served.stats().prefix_hits % (len(PROMPT) + 1) == 0
  assert served.stats().prefix_hits, 'samples share what was read'


@pytest.mark.slow
def test_it_writes_what_a_generator_writes(served):
  models = models_of('encoder')
  for asked, name in ((ASKED[0], ''), (ASKED[4], 'spell'), (ASKED[5], 'orders')):
    expected = models.alone(name)(
      PROMPT, max_new_tokens=asked.options.max_new_tokens, temperature=0
    )
    check_written(served, asked, expected)
  generator = models.together()
  check_written(served, ASKED[1], generator('another, text', max_new_tokens=12, seed=3))
  check_written(
    served, ASKED[6], generator(ASKED[6].prompt, max_new_tokens=8, seed=2, adapter='spell')
  )


@pytest.mark.slow
def test_requests_and_their_limits(served):
  """A text is as long as an encoder reads; what is written has all of its row but one token."""
  with TestClient(app(served, Served(name='m'), hosts=['*'])) as client:

    def post(**asked):
      return client.post('/v1/completions', json={'model': 'm', 'temperature': 0} | asked)

    answer = post(prompt=PROMPT, max_tokens=9, return_token_ids=True).json()
    said = result(served.submit(ASKED[0]))[0]
    assert answer['choices'][0]['text'] == said[1]
    read = models_of('encoder').together().encoded(PROMPT)
    assert answer['choices'][0]['prompt_token_ids'] == read and read[-1] == served.tokenizer.eos
    asked = {'model': 'm', 'prompt': PROMPT}
    tokens = client.post('/tokenize', json=asked).json()
    assert tokens['tokens'] == read and tokens['max_model_len'] == CONTEXT
    assert client.get('/v1/models').json()['data'][0]['max_model_len'] == CONTEXT
    assert answer['usage']['prompt_tokens'] == len(PROMPT) + 1
    assert post(prompt='x' * 29).json()['usage']['completion_tokens'] <= 29, 'all that there is'
    for asked, words in (
      (dict(prompt='x' * 30), 'a prompt of 31 tokens, of at most 30 that the encoder reads'),
      (dict(prompt='x' * 27, model='spell'), 'of 28 tokens, of at most 27 that the encoder reads'),
      (dict(prompt=PROMPT, max_tokens=30), 'max_tokens=30, of at most 29 that a row holds'),
      (dict(prompt=PROMPT, prompt_logprobs=1), 'scores no prompts'),
    ):
      refused = post(**asked)
      assert refused.status_code == 400 and words in refused.json()['error']['message'], asked


@pytest.mark.parametrize('asked', [dict(scores=True), dict(pooling='mean')], ids=str)
def test_what_an_encoder_decoder_is_not_for_is_said(asked):
  config = config_of(CONTEXT, encoder_layers=2, position='relative')
  model = types.SimpleNamespace(model=types.SimpleNamespace(config=config))
  with pytest.raises(ValueError, match='of an encoder-decoder .model.encoder_layers=2., whose'):
    EngineRows(model, Sizes(), **asked)


def test_rows_have_room_for_sources_that_are_as_long():
  kind = dict(encoder_layers=1, position='relative')
  for longest, most in ((CONTEXT, CONTEXT), (0, 1024)):
    sizes = row_sizes(config_of(longest, **kind), 1, 259)
    assert (sizes.source, sizes.capacity, sizes.read_tokens) == (most, most, 16)
  assert row_sizes(config_of(0), 1, 259).source == 0
