"""Do tokenizers and chat templates give what transformers gives? Ids, decoded text, rendered and
encoded conversations.
"""

import json

import numpy as np
import pytest

from data import huggingface, tokenizers
from data.chat import ChatTemplate
from tests.data import tokenizer_families as families
from tests.data.templates import CONVERSATIONS, TEMPLATES, TURNS

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
