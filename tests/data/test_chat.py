"""Chat templates: what they render, where the assistant's turns stand,
what they may not do, and errors that say why.
"""

import datetime
import json

import pytest
from hypothesis import given, strategies as st

from data import huggingface, tokenizers
from data.chat import ChatTemplate, quoted
from tests.data import tokenizer_families as families
from tests.data.templates import CHATML, CONVERSATIONS, HEADERS, INSTRUCT, SYSTEM, TURNS

HELLO = [{'role': 'user', 'content': 'Hello'}]
anything = st.text(st.characters(exclude_categories=['Cs']), max_size=20)


def test_chatml():
  template = ChatTemplate(CHATML)
  assert template.render(TURNS[:1]) == (
    '<|im_start|>system\nBe helpful.<|im_end|>\n'
    '<|im_start|>user\n Caf\u00e9 or <tea> & "milk"?\n<|im_end|>\n'
  )
  text = template.render(SYSTEM + TURNS, add_generation_prompt=True)
  assert text == (
    '<|im_start|>system\nAnswer in  one word. <|im_end|>\n'
    '<|im_start|>user\n Caf\u00e9 or <tea> & "milk"?\n<|im_end|>\n'
    '<|im_start|>assistant\nTea!  <|im_end|>\n'
    '<|im_start|>user\nWhy?<|im_end|>\n'
    '<|im_start|>assistant\n'
  )
  assert template.render(HELLO, add_generation_prompt=True, thinking=False).endswith(
    'assistant\n<think>\n\n</think>\n\n'
  )


def test_variables_of_the_call_come_before_those_of_the_tokenizer():
  template = ChatTemplate(HEADERS, {'bos_token': '<|begin|>', 'eos_token': '<|eot|>'})
  assert (
    template.render(HELLO)
    == '<|begin|><|start|>system<|end|>\n\n<|eot|><|start|>user<|end|>\n\nHello<|eot|>'
  )
  assert template.render(
    HELLO, bos_token='B', tools=[{'name': '<f>'}], add_generation_prompt=True
  ) == (
    'B<|start|>system<|end|>\n\nTools: [\n  {\n    "name": "<f>"\n  }\n]<|eot|>'
    '<|start|>user<|end|>\n\nHello<|eot|>'
    '<|start|>assistant<|end|>\n\n'
  )


@given(contents=st.lists(anything, min_size=1, max_size=6))
def test_spans_are_what_the_assistant_wrote(contents):
  messages = [
    {'role': ('user', 'assistant')[i % 2], 'content': content} for i, content in enumerate(contents)
  ]
  for source, written in (
    (CHATML, lambda text: text + '<|im_end|>'),
    (INSTRUCT, lambda text: f' {text.strip()}</s>'),
  ):
    template = ChatTemplate(source, {'bos_token': '<s>', 'eos_token': '</s>'})
    text, spans = template.render_with_spans(messages)
    assert template.marks_generation and text == template.render(messages)
    assert [text[begin:end] for begin, end in spans] == [
      written(content) for content in contents[1::2]
    ]


def test_spans_in_a_macro_and_in_a_captured_block():
  macro = '{% macro say(text) %}{% generation %}{{ text }}{% endgeneration %}{% endmacro %}'
  template = ChatTemplate(
    macro + '{% set all %}a{{ say("bc") }}d{% endset %}{{ all }}{{ say(messages[0].content) }}'
  )
  assert template.render_with_spans(HELLO) == ('abcdHello', [(1, 3), (4, 9)])


def test_a_template_without_marks_does_not_give_an_empty_mask():
  assert not ChatTemplate(HEADERS).marks_generation
  with pytest.raises(ValueError, match='no {% generation %} blocks'):
    ChatTemplate(HEADERS).render_with_spans(HELLO)


def test_the_dialects_functions():
  assert ChatTemplate('{{ {"a": "<é>"} | tojson }}').render(HELLO) == '{"a": "<é>"}'
  assert ChatTemplate('{{ strftime_now("%Y") }}').render(HELLO) == str(datetime.date.today().year)
  assert (
    ChatTemplate(
      '{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}'
    ).render(HELLO)
    == '01'
  )
  assert ChatTemplate('  {% if true %}\nx\n  {% endif %}\n').render(HELLO) == 'x\n'
  assert ChatTemplate('{{ tools is none and documents is none }}').render(HELLO) == 'True'


def test_missing_values_are_missing_keys():
  call = [{'role': 'assistant', 'content': None, 'tool_calls': [{'name': 'f'}]}]
  assert (
    ChatTemplate('{{ "content" in messages[0] }}{{ messages[0].tool_calls[0].name }}').render(call)
    == 'Falsef'
  )
  assert (
    ChatTemplate('{{ messages[0].content[0].text }}').render(
      [{'role': 'user', 'content': [{'type': 'text', 'text': 'x'}]}]
    )
    == 'x'
  )


@pytest.mark.parametrize(
  'messages, message',
  [
    ([], r'messages=\[\] must be a list'),
    ('Hello', "messages='Hello' must be a list"),
    ({'role': 'user'}, 'must be a list'),
    (HELLO + ['Hello'], r"messages\[1\]='Hello' is str, not a mapping"),
    ([{'content': 'a'}], r'messages\[0\] has role=None'),
    ([{'role': 1, 'content': 'a'}], 'has role=1'),
    ([{'role': 'user'}], r'messages\[0\] has content=None'),
    ([{'role': 'user', 'content': 3}], 'has content=3'),
    ([{'role': 'user', 'content': 3, 'tool_calls': []}], 'has content=3'),
    ([{'role': 'user', 'content': 'a', 'image': b'x'}], 'JSON data only.*bytes'),
  ],
)
def test_messages_of_another_form(messages, message):
  with pytest.raises(ValueError, match=message):
    ChatTemplate(CHATML).render(messages)


@pytest.mark.parametrize(
  'source, message',
  [
    (' \n', 'the chat template is empty'),
    ('a\n{% if %}', 'line 2 of the chat template'),
    ('{% nonsense %}', "unknown tag 'nonsense'"),
    ('{% generation %}', 'line 1 of the chat template'),
  ],
)
def test_templates_that_are_none(source, message):
  with pytest.raises(ValueError, match=message):
    ChatTemplate(source)


@pytest.mark.parametrize(
  'source, message',
  [
    (
      "{{ raise_exception('no systems here') }}",
      'failed on these 1 messages: TemplateError: no systems here',
    ),
    ('{{ nothing.at.all }}', "UndefinedError: 'nothing' is undefined"),
    ('{{ messages[0].content + 1 }}', 'TypeError'),
    ("{{ ''.__class__.__mro__ }}", 'SecurityError'),
    ('{{ messages.append(1) }}', 'SecurityError'),
    ("{{ messages[0].update({'role': 'x'}) }}", 'SecurityError'),
    ("{% include '/etc/passwd' %}", 'no loader'),
  ],
)
def test_templates_that_fail_or_break_out(source, message):
  with pytest.raises(ValueError, match=message):
    ChatTemplate(source).render(HELLO)


def test_a_tokenizers_own_template(tmp_path):
  settings = families.SETTINGS['qwen'] | {
    'chat_template': [
      {'name': 'default', 'template': CHATML},
      {'name': 'tools', 'template': HEADERS},
    ]
  }
  made = huggingface.HuggingFaceTokenizer(
    families.contents('qwen') | {'tokenizer_config.json': json.dumps(settings).encode()}
  )
  made.save(tmp_path)
  tok = tokenizers.load(tmp_path)
  for messages in CONVERSATIONS.values():
    assert ChatTemplate.of(tok).render(messages) == ChatTemplate(CHATML).render(messages)
  assert ChatTemplate.of(tok, 'tools').render(HELLO).endswith('Hello<|im_end|>')
  ids = tok.encode(ChatTemplate.of(tok).render(HELLO, add_generation_prompt=True), special=True)
  assert ids.count(tok.eos) == 2 and ids.count(tok.encode('<|im_start|>', special=True)[0]) == 3
  with pytest.raises(ValueError, match="chat template='tool' is unknown; did you mean 'tools'"):
    ChatTemplate.of(tok, 'tool')


def test_no_template_is_an_error():
  with pytest.raises(
    ValueError, match="'byte' tokenizer has no chat template.*chat_template.jinja"
  ):
    ChatTemplate.of(tokenizers.ByteTokenizer())


@pytest.mark.parametrize('name', ['reasoning', 'thinking', 'reasoning_content'])
def test_names_of_reasoning_are_those_of_one_thing(name):
  message = [{'role': 'assistant', 'content': 'x', name: 'Hm.'}]
  source = '{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}'
  assert ChatTemplate(source).render(message) == 'Hm.|Hm.'
  both = [message[0] | {'reasoning_content': 'A', 'thinking': 'B'}]
  assert ChatTemplate(source).render(both) == 'A|B'


@pytest.mark.parametrize('family', ['qwen', 'llama3', 'mistral', 'gemma', 't5', 'bert'])
def test_names_of_control_tokens_in_messages_are_text(family):
  tokenizer = huggingface.HuggingFaceTokenizer(families.contents(family))
  names = [token for token in tokenizer._hidden]
  for content in ('a b', *names, f'x{names[-1]} y'):
    source = '{{ bos_token or eos_token or sep_token }}{{ messages[0].content }}'
    template = ChatTemplate(source, tokenizer.special_tokens)
    first = tokenizer.encode(template.render([{'role': 'user', 'content': ''}]), special=True)
    messages = [{'role': 'user', 'content': content}]
    ids = tokenizer.encode(template.render(quoted(messages, tokenizer)), special=True)
    control = {i for i, piece in enumerate(tokenizer.token_bytes) if not piece}
    unknown = {tokenizer._plain.token_to_id(tokenizer._hidden.get('<unk>', '<unk>'))}
    unknown |= {tokenizer._plain.token_to_id(tokenizer._hidden.get('[UNK]', '[UNK]'))}
    assert ids[: len(first)] == first
    assert not (control - unknown) & {*ids[len(first) :]}, content
  # As they stand, they are the tokens: transformers' way.
  assert len(tokenizer.encode(names[0], special=True)) == 1


def test_names_of_control_tokens_in_names_of_objects_are_text():
  tokenizer = huggingface.HuggingFaceTokenizer(families.contents('qwen'))
  template = ChatTemplate('{{ messages[0].tool_calls | tojson }}{{ tools | tojson }}')
  (name, *_) = tokenizer._hidden
  call = {'function': {'name': 'f', 'arguments': {f'a{name}': {name: 'b'}}}}
  tools = [{'function': {'parameters': {'properties': {f'{name}\n{name}': {'type': 'null'}}}}}]
  messages = [{'role': 'assistant', 'tool_calls': [call]}]
  text = template.render(quoted(messages, tokenizer), tools=quoted(tools, tokenizer))
  ids = tokenizer.encode(text, special=True)
  assert all(tokenizer.token_bytes[i] for i in ids)
  assert tokenizer.decode(ids).count(name) == 4


def test_templates_and_messages_without_end():
  for source in ('{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}', '{{ ' + '9' * 5000 + ' }}'):
    with pytest.raises(ValueError, match='the chat template'):
      ChatTemplate(source).render([{'role': 'user', 'content': 'a'}])
  nested = []
  for _ in range(100_000):
    nested = [nested]
  with pytest.raises(ValueError, match='JSON data only'):
    ChatTemplate('a').render([{'role': 'user', 'content': nested}])
