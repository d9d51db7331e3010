"""Does a tokenizer lose what a model has no rows for, and nothing else?"""

import json

import pytest

from data.huggingface import HuggingFaceTokenizer
from data.tokenizers import ByteTokenizer
from data.trimmed import trimmed
from tests.data import tokenizer_families as families

TEXT = 'a quick café 12 <image> '


def with_images(family, **settings):
  """A tokenizer of this family with a control token behind all others, named in the settings."""
  contents = families.contents(family)
  made = HuggingFaceTokenizer(contents).extended(['<image>'])
  settings = families.SETTINGS[family] | settings
  contents = made._files() | {'tokenizer_config.json': json.dumps(settings).encode()}
  return HuggingFaceTokenizer(contents)


@pytest.mark.parametrize('family', ['gemma', 'bert', 'qwen', 'llama3'])
@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'image_token': '<image>', 'extra_special_tokens': {'image_token': '<image>'}},
    {'image_token': {'content': '<image>'}, 'additional_special_tokens': ['<image>']},
    {'added_tokens_decoder': {}, 'extra_special_tokens': [{'content': '<image>'}]},
  ],
  ids=range(4),
)
def test_a_control_token_behind_the_last_row_goes(family, settings):
  plain, made = HuggingFaceTokenizer(families.contents(family)), with_images(family, **settings)
  index = made.control_ids()['<image>']
  assert index == plain.vocabulary == made.vocabulary - 1
  found, gone = trimmed(made, index)
  assert gone == ['<image>'] and found.token_bytes == plain.token_bytes
  assert (found.bos, found.eos, found.pad) == (plain.bos, plain.eos, plain.pad)
  assert '<image>' not in found.control_ids() and '<image>' not in found.special_tokens.values()
  assert found.encode(TEXT) == plain.encode(TEXT)
  assert trimmed(made, index + 1) == (made, [])


def test_a_piece_of_the_model_that_is_a_control_token_goes_too():
  """Where pieces are a list, and where they are named by ids."""
  made = HuggingFaceTokenizer(families.contents('t5'))
  definition = json.loads(made._files()['tokenizer.json'])
  definition['model']['vocab'].append(['<image>', 0.0])
  definition['added_tokens'].append(
    dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    | {'id': made.vocabulary, 'content': '<image>', 'special': True}
  )
  contents = made._files() | {'tokenizer.json': json.dumps(definition).encode()}
  found, gone = trimmed(HuggingFaceTokenizer(contents), made.vocabulary)
  assert gone == ['<image>'] and found.encode(TEXT) == made.encode(TEXT)


def test_a_padding_token_that_goes_is_the_end_as_without_one():
  made = with_images('llama2', pad_token='<image>')
  found, gone = trimmed(made, made.pad)
  assert gone == ['<image>'] and found.pad == found.eos


@pytest.mark.parametrize(
  'made, rows',
  [
    (lambda: HuggingFaceTokenizer(families.contents('gemma')), 100),
    (lambda: with_images('gemma', eos_token='<image>'), None),
    (ByteTokenizer, 258),
  ],
  ids=['text', 'end', 'bytes'],
)
def test_an_id_that_texts_have_is_not_lost(made, rows):
  made = made()
  rows = rows or made.vocabulary - 1
  with pytest.raises(ValueError, match=f'and the model {rows} rows .*--tokenizer=PATH, or'):
    trimmed(made, rows)
