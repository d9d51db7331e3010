"""Which tokens of a conversation are learned: the assistant's, and the one that ends its turn."""

import json

import numpy as np
import pytest
from templates import CHATML, HEADERS, INSTRUCT
from tokenizer_families import contents

from data import generation
from data.chat import ChatTemplate, quoted
from data.conversations import ExampleWriter
from data.huggingface import HuggingFaceTokenizer
from data.records import ChatRecord, TextRecord
from data.tokenizers import ByteTokenizer

USER, ANSWER = {'role': 'user'}, {'role': 'assistant'}
MANY = [
  {'role': 'system', 'content': 'Answer in one word.'},
  {'role': 'user', 'content': ' Café or <tea> & "milk"?\n'},
  {'role': 'assistant', 'content': 'Tea, größte  tea!'},
  {'role': 'user', 'content': 'Why?'},
  {'role': 'assistant', 'content': 'Dogs.'},
]
NO_BLOCKS = CHATML.replace('{%- generation %}', '').replace('{%- endgeneration %}', '')
# The marked part leaves its end token out, as many published templates do.
OUTSIDE = CHATML.replace(
  "{{- message.content + '<|im_end|>' }}\n        {%- endgeneration %}",
  "{{- message.content }}\n        {%- endgeneration %}\n        {{- '<|im_end|>' }}",
)
# Thoughts of earlier turns are left out when more follow.
FORGETS = NO_BLOCKS.replace(
  "{{- message.content + '<|im_end|>' }}",
  "{{- (message.content if loop.last else message.content[:3]) + '<|im_end|>' }}",
)


def tokenizer(family, template=''):
  extra = {'chat_template.jinja': template.encode()} if template else {}
  return HuggingFaceTokenizer(contents(family) | extra)


def learned(made, example):
  """Texts of the runs of tokens that are learned, control tokens by name."""
  names = {i: name for name, i in made.control_ids().items()}
  runs, before = [], False
  for token, scored in zip(example.ids.tolist(), example.scored.tolist()):
    if scored:
      piece = names.get(token, '').encode() or made.token_bytes[token]
      runs[-1:] = [runs[-1] + piece] if before else [*runs[-1:], piece]
    before = scored
  return [run.decode() for run in runs]


@pytest.mark.parametrize(
  'template', [CHATML, NO_BLOCKS, OUTSIDE], ids=['blocks', 'prefixes', 'end outside of its block']
)
def test_the_assistant_s_turns_and_their_ends_are_learned(template):
  made = tokenizer('qwen', template)
  example = ExampleWriter(made).example('here', ChatRecord(MANY))
  assert learned(made, example) == ['Tea, größte  tea!<|im_end|>', 'Dogs.<|im_end|>']
  last = ExampleWriter(made, turns='last').example('here', ChatRecord(MANY))
  assert learned(made, last) == ['Dogs.<|im_end|>']
  np.testing.assert_array_equal(last.ids, example.ids)


@pytest.mark.parametrize(
  'family, template, turns',
  [
    ('llama3', HEADERS, ['Tea, größte  tea!<|eot|>', 'Dogs.<|eot|>']),
    ('mistral', INSTRUCT, [' Tea, größte  tea!</s>', ' Dogs.</s>']),
  ],
)
def test_other_families_learn_the_same(family, template, turns):
  made = tokenizer(family, template)
  assert learned(made, ExampleWriter(made).example('here', ChatRecord(MANY))) == turns


@pytest.mark.parametrize('template', [CHATML, HEADERS], ids=['chatml', 'headers'])
def test_what_is_not_learned_is_the_prompt_that_generation_reads(template):
  """The ids before the last turn are those of Generator.chat_ids: it is asked as it learned."""
  made = tokenizer('qwen' if template is CHATML else 'llama3', template)
  example = ExampleWriter(made, turns='last').example('here', ChatRecord(MANY))
  rendered = ChatTemplate.of(made).render(quoted(MANY[:-1], made), add_generation_prompt=True)
  prompt = made.encode(rendered, special=True)
  first = int(example.scored.argmax())
  assert example.ids[:first].tolist() == prompt
  assert example.ids[-1] in generation.ends(made) or not example.scored[-1]


def test_names_of_control_tokens_in_a_message_are_text_and_end_no_turn():
  made = tokenizer('qwen', NO_BLOCKS)
  messages = [USER | {'content': 'say <|im_end|>'}, ANSWER | {'content': 'a<|im_end|>b'}]
  example = ExampleWriter(made).example('here', ChatRecord(messages))
  assert learned(made, example) == ['a<|im_end|>b<|im_end|>']
  assert (example.ids == made.eos).sum() == 3  # of the system's, the user's and the last turn


def test_a_prompt_of_messages_is_not_learned():
  made = tokenizer('qwen', CHATML)
  example = ExampleWriter(made).example('here', ChatRecord(MANY, given=4))
  assert learned(made, example) == ['Dogs.<|im_end|>']


def test_a_completion_is_encoded_as_generation_meets_it():
  made = ByteTokenizer()
  example = ExampleWriter(made).example('here', TextRecord('2 + 2 =', ' 4'))
  assert example.ids.tolist() == [made.bos, *made.encode('2 + 2 ='), *made.encode(' 4'), made.eos]
  assert example.scored.tolist() == [False] * 8 + [True] * 3


def test_a_completion_has_no_space_that_its_prompt_does_not_end_with():
  """As whoever scores it has it (evaluation.examples.Asked.pairs), and generation goes on."""
  made = tokenizer('llama2')
  for prompt, completion in (('2+3=', '5'), ('the quick', ' brown fox'), ('', 'brown')):
    example = ExampleWriter(made).example('here', TextRecord(prompt, completion))
    assert example.ids.tolist() == [made.bos, *made.encode(prompt + completion), made.eos]
    assert example.scored.sum() == len(example.ids) - 1 - len(made.encode(prompt))


@pytest.mark.parametrize(
  'template, messages, said',
  [
    ('', MANY, "messages need a chat template, and this 'huggingface' tokenizer has none"),
    (CHATML, MANY[:2], "no message of role 'assistant' .* its roles are system, user"),
    (NO_BLOCKS, [ANSWER | {'content': 'a'}], 'begins with the assistant'),
    (FORGETS, MANY, r"writes messages\[2\] otherwise when more follow.*objective.turns='last'"),
    (NO_BLOCKS.replace("+ '<|im_end|>' }}", '}}'), MANY, 'closed by no token that ends a text'),
    (INSTRUCT, MANY[1:2] * 2 + MANY[2:3], 'user and assistant must alternate'),
  ],
)
def test_what_would_teach_something_else_is_refused(template, messages, said):
  with pytest.raises(ValueError, match=f'^row 7: .*{said}'):
    ExampleWriter(tokenizer('qwen', template)).example('row 7', ChatRecord(messages))


def test_the_last_turn_of_a_template_that_forgets_can_be_learned():
  made = tokenizer('qwen', FORGETS)
  example = ExampleWriter(made, turns='last').example('here', ChatRecord(MANY))
  assert learned(made, example) == ['Dogs.<|im_end|>']


def test_another_template_than_the_tokenizer_s_own_is_refused():
  with pytest.raises(ValueError, match='differs from the one of the tokenizer'):
    ExampleWriter(tokenizer('qwen', CHATML), template=NO_BLOCKS)
  ExampleWriter(tokenizer('qwen', CHATML), template=CHATML + '\n')
  ExampleWriter(tokenizer('qwen'), template=NO_BLOCKS)


def test_an_end_that_only_the_generation_config_names_is_one():
  made = tokenizer('llama3', HEADERS.replace('{{ eos_token }}', '<|end|>'))
  with pytest.raises(ValueError, match='closed by no token'):
    ExampleWriter(made).example('here', ChatRecord(MANY))
  made.generation = {'eos_token_id': [made.eos, made.control_ids()['<|end|>']]}
  example = ExampleWriter(made).example('here', ChatRecord(MANY))
  assert learned(made, example)[-1] == 'Dogs.<|end|>'


@pytest.mark.parametrize('family', ['gpt2', 'llama3', 'qwen', 'llama2', 'mistral', 'gemma', 't5'])
@pytest.mark.parametrize('text', ['', 'a', ' naïve  café\n\n', '日本 x', 'über größte fox'])
def test_places_cover_a_text(family, text):
  made = tokenizer(family)
  names = [*made.control_ids()]
  whole = f'{text}{names[0]}{text}'
  encoded = made.encode_with_places(whole)
  assert encoded.ids == made.encode(whole, special=True)
  at = encoded.ids.index(made.control_ids()[names[0]])
  assert (encoded.begins[at], encoded.ends[at]) == (len(text), len(text) + len(names[0]))
  assert (encoded.ends[:at] <= len(text)).all() and (
    encoded.begins[at + 1 :] >= encoded.ends[at]
  ).all()
  assert (encoded.begins <= encoded.ends).all() and (np.diff(encoded.begins) >= 0).all()


@pytest.mark.oracle
@pytest.mark.parametrize('template', [CHATML, INSTRUCT], ids=['chatml', 'instruct'])
def test_transformers_marks_the_same_tokens(template, tmp_path):
  transformers = pytest.importorskip('transformers')
  family = 'qwen' if template is CHATML else 'mistral'
  made = tokenizer(family, template)
  made.save(tmp_path)
  settings = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(tmp_path / 'tokenizer.json'),
    **{k: v for k, v in settings.items() if k.endswith('_token') and isinstance(v, str)},
  )
  theirs.chat_template = template
  marked = theirs.apply_chat_template(
    MANY, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
  )
  example = ExampleWriter(made).example('here', ChatRecord(MANY))
  assert example.ids.tolist() == marked['input_ids']
  assert example.scored.astype(int).tolist() == marked['assistant_masks']
