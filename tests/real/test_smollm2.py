"""Is a real assistant the same here as in transformers? SmolLM2-135M-Instruct, from its package.

Opt-in, `make test-real`: the package is 93 MB. tests/real/make.py wrote what transformers computed.
"""

import json

import jax
import numpy as np
import pytest

import convert
from data.chat import ChatTemplate
from decode.generator import Generator
from model import packages
from tests.data.tokenizer_families import CORPUS
from tests.real import make

pytestmark = pytest.mark.real
GOLDEN = json.loads(make.GOLDEN.read_text())
# Logits go to 40, and 30 layers of sums of 576 and 1,536 terms in another order round each by some
# 1e-7 of its size: 1.1e-4 was seen.
CLOSE = 5e-4


@pytest.fixture(scope='module')
def generator(tmp_path_factory):
  """Of a run that was imported."""
  try:
    packages.path('smollm2')
  except FileNotFoundError as error:
    pytest.skip(str(error))
  run = tmp_path_factory.mktemp('real') / 'run'
  convert.main(['import', '--from', 'smollm2', '--workdir', str(run)])
  return Generator.load(run)


@pytest.fixture(scope='module')
def theirs(generator):
  for name in ('torch', 'transformers'):
    pytest.importorskip(name, reason=f'{name} is not installed')
  return make.theirs()


def logits(generator, ids):
  with jax.set_mesh(generator.mesh):
    model = generator.model
    return np.asarray(
      jax.jit(lambda tokens: model.logits(model(tokens).hidden))(
        jax.device_put(np.array([ids], np.int32))
      )
    )[0]


def test_the_text_and_its_ids(generator):
  template = ChatTemplate.of(generator.tokenizer)
  text = template.render(make.MESSAGES, add_generation_prompt=True)
  assert text == GOLDEN['text']
  assert generator.tokenizer.encode(text, special=True) == GOLDEN['ids']


def test_the_answer(generator):
  found = logits(generator, GOLDEN['ids'])
  for i, expected in GOLDEN['logits'].items():
    assert abs(found[-1, int(i)] - expected) < CLOSE
  assert abs(found.mean() - GOLDEN['mean']) < CLOSE
  options = {'max_new_tokens': make.NEW, 'temperature': 0.0}
  assert generator(GOLDEN['ids'], **options)[0].ids == GOLDEN['greedy']
  said = ''.join(generator.chat(make.MESSAGES, **options))
  assert said == generator.tokenizer.decode(GOLDEN['greedy'])


def test_logits_are_those_of_transformers(generator, theirs):
  model, tokenizer = theirs
  for text in (GOLDEN['text'], 'def main(argv):\n  print("1234", argv)\n', CORPUS[0]):
    ids = tokenizer.encode(text, add_special_tokens=False)
    np.testing.assert_allclose(logits(generator, ids), make.scores(model, ids), rtol=0, atol=CLOSE)


def test_ids_are_those_of_transformers(generator, theirs):
  _, tokenizer = theirs
  for text in [*CORPUS, 'x\n\n\ny  z', '\u4f60\u597d \U0001f600 re\u0301sume\u0301', '12345 1.5']:
    ids = generator.tokenizer.encode(text)
    assert ids == tokenizer.encode(text, add_special_tokens=False), text
    assert generator.tokenizer.decode(ids) == text


def test_conversations_are_those_of_transformers(generator, theirs):
  _, tokenizer = theirs
  turns = [('system', 'Be brief.'), ('user', 'Hi'), ('assistant', 'Hello!'), ('user', 'Bye')]
  turns = [{'role': role, 'content': content} for role, content in turns]
  for messages in (turns, turns[1:]):
    for prompt in (True, False):
      text = ChatTemplate.of(generator.tokenizer).render(messages, add_generation_prompt=prompt)
      assert text == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
      )
      assert generator.tokenizer.encode(text, special=True) == tokenizer.encode(
        text, add_special_tokens=False
      )
