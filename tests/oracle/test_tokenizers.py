"""Do tokenizers and chat templates give what transformers gives? Ids, decoded text, rendered and
encoded conversations.
"""

import json

import numpy as np
import pytest

from data import huggingface, tokenizers
from data.chat import ChatTemplate
from model.config import ModelConfig
from tests.data import test_tokenizer, tokenizer_families as families
from tests.data.templates import CONVERSATIONS, TEMPLATES, TURNS
from workdir import carried

pytestmark = pytest.mark.oracle
TEXTS = families.CORPUS + [
  '',
  ' lead',
  'a\u2581b \U0001f600',
  're\u0301sume\u0301',
  '<think>ok</think>',
  'x\n\n\ny',
  '\t\r\n',
  '\u4f60\u597d',
]


def both(family, directory, **settings):
  """A family's tokenizer here, and as transformers loads what this one saved."""
  import transformers

  contents = families.contents(family)
  contents['tokenizer_config.json'] = json.dumps(
    json.loads(contents['tokenizer_config.json']) | settings
  ).encode()
  huggingface.HuggingFaceTokenizer(contents).save(directory)
  return tokenizers.load(directory), transformers.PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize('family', families.FAMILIES)
def test_ids_and_text(family, tmp_path):
  ours, theirs = both(family, tmp_path)
  control = theirs.all_special_tokens
  for text in TEXTS:
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
  for text in [f'a {name}b' for name in control] + [''.join(control)]:
    assert (
      ours.encode(text, special=True)
      == theirs.encode(text, add_special_tokens=False)
      != ours.encode(text)
    )
    if family != 't5':  # there Unigram finds them as pieces
      assert ours.encode(text) == theirs.encode(
        text, add_special_tokens=False, split_special_tokens=True
      )
  assert (
    theirs.eos_token_id in (ours.eos, None)
    and theirs.bos_token_id in (ours.bos, None)
    and theirs.pad_token_id in (ours.pad, None)
  )
  assert len(theirs) == ours.vocabulary


@pytest.mark.parametrize('conversation', CONVERSATIONS)
@pytest.mark.parametrize(
  'family, template', [('qwen', 'chatml'), ('llama3', 'headers'), ('mistral', 'instruct')]
)
@pytest.mark.parametrize('prompt', [False, True])
def test_conversations(family, template, conversation, prompt, tmp_path):
  ours, theirs = both(family, tmp_path, chat_template=TEMPLATES[template])
  messages = CONVERSATIONS[conversation]
  text = ChatTemplate.of(ours).render(messages, add_generation_prompt=prompt)
  assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
  assert (
    ours.encode(text, special=True)
    == theirs.apply_chat_template(messages, add_generation_prompt=prompt)['input_ids']
  )


def test_variables_and_named_templates(tmp_path):
  named = [{'name': name, 'template': template} for name, template in TEMPLATES.items()]
  ours, theirs = both('llama3', tmp_path, chat_template=named)
  assert ours.chat_templates == theirs.chat_template == TEMPLATES
  tools = [
    {'type': 'function', 'function': {'name': 'f', 'description': '<caf\u00e9>', 'parameters': {}}}
  ]
  for name, variables in (
    ('chatml', {'thinking': False}),
    ('headers', {'tools': tools}),
    ('headers', {'bos_token': 'B'}),
  ):
    assert ChatTemplate.of(ours, name).render(
      TURNS, add_generation_prompt=True, **variables
    ) == theirs.apply_chat_template(
      TURNS, chat_template=name, tokenize=False, add_generation_prompt=True, **variables
    )


@pytest.mark.parametrize('template', ['chatml', 'instruct'])
def test_spans_are_the_assistants_tokens(template, tmp_path):
  ours, theirs = both('llama3', tmp_path, chat_template=TEMPLATES[template])
  messages = TURNS + [{'role': 'assistant', 'content': 'Because of the dogs.'}]
  text, spans = ChatTemplate.of(ours).render_with_spans(messages)
  encoded = theirs.apply_chat_template(
    messages, return_dict=True, return_assistant_tokens_mask=True
  )
  offsets = np.array(
    theirs(text, add_special_tokens=False, return_offsets_mapping=True)['offset_mapping']
  )
  # A token at a span's edge counts for transformers as soon as one of its characters is inside.
  inside = np.zeros(len(offsets), bool)
  for begin, end in spans:
    inside |= (offsets[:, 1] > begin) & (offsets[:, 0] < end)
  assert inside.astype(int).tolist() == encoded['assistant_masks'] and 0 < inside.sum() < len(
    inside
  )


def exported(tokenizer, directory, model_type):
  """The directory of an export, as convert.py writes it beside a config.json of this type."""
  config = ModelConfig(encoder_layers=1 if model_type == 't5' else 0)
  carried.write_tokenizer(directory, tokenizer, config, model_type, print)
  (directory / 'config.json').write_text(json.dumps({'model_type': model_type}))
  return directory


@pytest.mark.parametrize(
  'model_type', ['llama', 'gpt2', 'gemma2', 'bert', 't5', 'mistral', 'qwen3']
)
@pytest.mark.parametrize('family', families.FAMILIES)
def test_autotokenizer_of_an_export_of_any_family(family, model_type, tmp_path):
  import transformers

  ours = huggingface.HuggingFaceTokenizer(families.contents(family))
  theirs = transformers.AutoTokenizer.from_pretrained(exported(ours, tmp_path, model_type))
  for text in TEXTS:
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


PREFIXED = {
  'prefix': {'remove_extra_whitespaces': False},
  'removes': {'remove_extra_whitespaces': True},
  'symbols': {
    'remove_extra_whitespaces': False,
    'add_dummy_prefix': False,
    'user_defined_symbols': ['<t>'],
  },
}


@pytest.mark.parametrize('model_type', ['llama', 'gemma2', 't5'])
@pytest.mark.parametrize('kind', ['byte', 'char', 'bpe', 'phrases', 'unigram', *PREFIXED])
def test_autotokenizer_of_an_export_of_our_kinds(kind, model_type, tmp_path):
  import transformers

  ours = (
    test_tokenizer.prefixed(**PREFIXED[kind]) if kind in PREFIXED else test_tokenizer.made(kind)
  )
  theirs = transformers.AutoTokenizer.from_pretrained(exported(ours, tmp_path, model_type))
  names = ('<s>', '</s>', '<unk>', '<0x0A>') if kind == 'unigram' else ()
  texts = [*test_tokenizer.HARD, '<t>', ' a <t>  b', *([] if kind == 'char' else TEXTS)]
  for text in texts:
    if kind == 'removes' and '\u2581' in text or text in names:
      continue  # as the note says
    ids = ours.encode(text)
    around = [*ids, ours.eos] if model_type == 't5' else [ours.bos, *ids]
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.encode(text) == around
    assert theirs.decode(around, skip_special_tokens=True) == ours.decode(ids)
  assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
  assert theirs.pad_token_id == ours.pad and len(theirs) == ours.vocabulary
  again = tokenizers.load(tmp_path)
  for text in ('a b', 'x = 1\n', ''):
    assert again.encode(text) == ours.encode(text)


def test_a_tokenizer_that_transformers_cannot_have_is_not_misread(tmp_path, capsys):
  import transformers

  ours = test_tokenizer.prefixed(user_defined_symbols=['<t>'])
  exported(ours, tmp_path, 'llama')
  assert "NOTE: no tokenizer for transformers: ids of '<t>' would be" in capsys.readouterr().out
  assert {path.name for path in tmp_path.iterdir()} == {'config.json', 'sentencepiece.model'}
  with pytest.raises((OSError, ValueError, TypeError)):
    transformers.AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.skipif(not test_tokenizer.T5.exists(), reason='no t5.model beside the checkout')
def test_autotokenizer_of_an_export_of_t5s_tokenizer(tmp_path):
  import transformers

  ours = tokenizers.load(test_tokenizer.T5)
  theirs = transformers.AutoTokenizer.from_pretrained(exported(ours, tmp_path, 't5'))
  for text in [*TEXTS, 'Hello,  world!\n', '\ufb01 \uff21']:
    assert theirs.encode(text) == [*ours.encode(text), ours.eos]
