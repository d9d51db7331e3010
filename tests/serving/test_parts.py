"""Are thoughts, calls of tools and the answer told apart, in whatever pieces a text comes; and does
a stream say of them what the whole says? Of families' forms, as their templates write them.
"""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings, strategies as st
from starlette.testclient import TestClient

from data.chat import ChatTemplate
from data.tokenizers import ByteTokenizer
from decode.schema import to_regex
from serving.fake import SIZES as SMALL, FakeService
from serving.fields import Denied
from serving.http import app
from serving.parts import BARE, FORCED, MARKED, ChatManner, ChatParts, Parted, call_form
from serving.tools import Tools
from serving.wire import Served
from tests.decode.automata import all_plain
from tests.serving.test_http import TOKENIZER, pieces

NAMES = ('f', 'g')
F = '{"name": "f", "arguments": {"x": "</think> \\u00e9"}}'
G = '{"name": "g", "arguments": {}}'
LLAMA_F, LLAMA_G = (each.replace('arguments', 'parameters') for each in (F, G))
MARKED_F, MARKED_G = (f'<tool_call>\n{each}\n</tool_call>' for each in (F, G))

# Of (how it is written, the text): thoughts, answer, names of the calls.
READ = [
  (dict(thinks=True), '<think>\na b\n</think>\n\nc ', ('a b', 'c ', '')),
  (dict(thinks=True), ' c <think>a</think>', ('', ' c <think>a</think>', '')),
  (dict(thinks=True, within=True), 'a\n</think>c', ('a', 'c', '')),
  (dict(thinks=True, within=True), '\na </thi', ('a </thi', '', '')),  # cut off
  (dict(thinks=True), '<thin', ('', '<thin', '')),
  (dict(thinks=True), '<think>\n\n</think>\n\nc', ('', 'c', '')),
  (dict(calls=MARKED), f'so:\n{MARKED_F}\n{MARKED_G}\n', ('', 'so:', 'fg')),
  (dict(calls=MARKED), f'a \n{MARKED_F}\n b\n', ('', 'a \nb', 'f')),
  (dict(calls=MARKED), f'a \n{MARKED_F[:-1]}', ('', f'a \n{MARKED_F[:-1]}', '')),
  (dict(calls=MARKED), ' <tool_call>h</tool_call> ', ('', ' <tool_call>h</tool_call> ', '')),
  (dict(calls=MARKED), MARKED_F.replace('"f"', '"h"'), ('', MARKED_F.replace('"f"', '"h"'), '')),
  (dict(calls=MARKED, several=False), f'{MARKED_F} {MARKED_G}', ('', MARKED_G, 'f')),
  (dict(calls=MARKED, thinks=True), f'<think>{MARKED_G}</think>{MARKED_F}', (MARKED_G, '', 'f')),
  (dict(calls=BARE), f'{LLAMA_F}; {LLAMA_G}\n', ('', '', 'fg')),
  (dict(calls=BARE), f' {LLAMA_F}', ('', '', 'f')),
  (dict(calls=BARE), f'{LLAMA_F} is it', ('', f'{LLAMA_F} is it', '')),
  (dict(calls=BARE), f'It is {LLAMA_F}', ('', f'It is {LLAMA_F}', '')),
  (dict(calls=BARE), f'{LLAMA_F[:-1]}', ('', LLAMA_F[:-1], '')),
  (dict(calls=BARE), F, ('', F, '')),
  (dict(calls=BARE, several=False), f'{LLAMA_F};{LLAMA_G}', ('', LLAMA_G, 'f')),
  (dict(calls=BARE), '{"name": "f", "parameters": {"x": NaN}}',
   ('', '{"name": "f", "parameters": {"x": NaN}}', '')),
  # No number of JSON, and no text of UTF-8.
  (dict(calls=BARE), '{"name": "f", "parameters": {"x": 1e999}}',
   ('', '{"name": "f", "parameters": {"x": 1e999}}', '')),
  (dict(calls=BARE), '{"name": "f", "parameters": {"x": "\\ud83d"}}',
   ('', '{"name": "f", "parameters": {"x": "\\ud83d"}}', '')),
  (dict(calls=BARE, thinks=True), f'<think>a</think>\n{LLAMA_F}', ('a', '', 'f')),
  (dict(calls=FORCED), f'[{F}, {G}]', ('', '', 'fg')),
  (dict(calls=FORCED), F, ('', '', 'f')),
  (dict(calls=FORCED), F[:-1], ('', F[:-1], '')),
]  # fmt: skip


def read(manner, *texts):
  """All that is told of a text in these pieces; of calls their names and arguments."""
  parted, said = Parted(ChatManner(names=NAMES, **manner)), ChatParts()
  for i, text in enumerate(texts):
    more = parted.add(text, last=i == len(texts) - 1)
    said.reasoning += more.reasoning
    said.content += more.content
    said.calls += [call['function'] for call in more.calls]
  return said


@pytest.mark.parametrize('manner, text, parts', READ)
def test_parts_are_those_that_were_written(manner, text, parts):
  for said in (read(manner, text), read(manner, *text, '')):
    assert (said.reasoning, said.content) == parts[:2]
    assert ''.join(call['name'] for call in said.calls) == parts[2]
    for call in said.calls:
      expected = {'f': json.loads(F), 'g': json.loads(G)}[call['name']]
      assert json.loads(call['arguments']) == expected['arguments']


WORDS = ['<think>', '</think>', '<', ' ', '\n', 'a', ';', MARKED_F, MARKED_G, LLAMA_F, LLAMA_G]
WORDS += ['<tool_call>', '</tool_call>', '{', '}']
MANNERS = st.fixed_dictionaries(
  {
    'thinks': st.booleans(),
    'within': st.booleans(),
    'several': st.booleans(),
    'calls': st.sampled_from(['', MARKED, BARE, FORCED]),
  }
)


@settings(max_examples=200)
@given(MANNERS, st.lists(st.sampled_from(WORDS), max_size=8).map(''.join), st.data())
def test_parts_do_not_depend_on_pieces(manner, text, data):
  manner |= {'within': manner['thinks'] and manner['within']}
  cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
  split = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
  whole = read(manner, text)
  assert read(manner, *split) == whole
  kept = lambda said: ''.join((said.reasoning + said.content).split())  # noqa: E731
  if not (manner['thinks'] or whole.calls):
    assert whole.content == text
  elif not whole.calls:  # nothing but marks, and space beside them, is left out
    assert kept(whole).replace('<think>', '').replace('</think>', '') == ''.join(
      text.split()
    ).replace('<think>', '').replace('</think>', '')


QWEN = (
  '{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>'
  '{{ m.content }}{% for c in m.tool_calls %}<tool_call>\n{"name": "{{ c.function.name }}", '
  '"arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endfor %}'
  '{% if add_generation_prompt %}<|a|>{% if enable_thinking is false %}<think>\n\n</think>\n\n'
  '{% elif opened %}<think>\n{% endif %}{% endif %}'
)
LLAMA = QWEN.replace('<tool_call>\n', '').replace('\n</tool_call>', '')
LLAMA = LLAMA.replace('"arguments"', '"parameters"').replace('<think>', '').replace('</think>', '')
XML = QWEN.replace('{"name": "{{ c.function.name }}"', '<function={{ c.function.name }}>')


def test_how_calls_are_written_is_what_a_template_writes():
  sources = [QWEN, LLAMA, XML, '{{ messages[0].content }}', QWEN.replace('tools', 'utensils')]
  assert [call_form(ChatTemplate(each)) for each in sources] == [MARKED, BARE, '', '', '']
  assert call_form(None) == ''
  marked = ChatTemplate(sources[0])
  assert call_form(marked, ['<tool_call>']) == '', 'whose text never has the mark'


class Templated(ByteTokenizer):
  def __init__(self, source):
    super().__init__()
    self.chat_templates = {'default': source}

  def encode(self, text, *, special=False):
    return super().encode(text)


SIZES = dataclasses.replace(SMALL, capacity=512)
TOOLS = [{'type': 'function', 'function': {'name': name}} for name in NAMES]
ASKED = {'messages': [{'role': 'user', 'content': 'hi'}], 'logprobs': True}
THOUGHT = f'<think>\nfirst\n</think>\n\nso: {MARKED_F}\n{MARKED_G}'
SPOKEN = [
  (QWEN, THOUGHT, {'tools': TOOLS}, ('first', 'so:', 'fg', 'tool_calls')),
  (QWEN, THOUGHT, {}, ('first', f'so: {MARKED_F}\n{MARKED_G}', '', 'stop')),
  (QWEN, THOUGHT, {'tools': TOOLS, 'max_tokens': 12}, ('firs', None, '', 'length')),
  (QWEN, 'on\n</think>4', {'chat_template_kwargs': {'opened': True}}, ('on', '4', '', 'stop')),
  (QWEN, 'on', {'chat_template_kwargs': {'enable_thinking': False}}, (None, 'on', '', 'stop')),
  (LLAMA, f'{LLAMA_F}; {LLAMA_G}', {'tools': TOOLS}, (None, None, 'fg', 'tool_calls')),
  (LLAMA, 'a </think>', {'tools': TOOLS}, (None, 'a </think>', '', 'stop')),
  (LLAMA, f'[{F}, {G}]', {'tools': TOOLS, 'tool_choice': 'required', 'parallel_tool_calls': True,
    'messages': ASKED['messages']}, (None, None, 'fg', 'tool_calls')),
]  # fmt: skip


@pytest.mark.parametrize('template, text, asked, parts', SPOKEN)
def test_a_stream_says_what_the_whole_says(template, text, asked, parts):
  write = lambda request: TOKENIZER.encode(text)  # noqa: E731
  served = FakeService(Templated(template), write, sizes=SIZES)
  asked = ASKED | {'max_tokens': 180} | asked
  with served.by_itself(), TestClient(app(served, Served(name='m'), hosts=['*'])) as client:
    answer = client.post('/v1/chat/completions', json=asked).json()
    chunks = pieces(client.post('/v1/chat/completions', json=asked | {'stream': True}))
  (choice,) = answer['choices']
  message, calls = choice['message'], choice['message'].get('tool_calls', [])
  said = (message.get('reasoning_content'), message['content'])
  assert (*said, ''.join(c['function']['name'] for c in calls), choice['finish_reason']) == parts

  deltas = [chunk['choices'][0]['delta'] for chunk in chunks]
  for name in ('reasoning_content', 'content'):
    assert ''.join(delta.get(name, '') for delta in deltas) == (message.get(name) or '')
  streamed = [call for delta in deltas for call in delta.get('tool_calls', [])]
  assert [call['index'] for call in streamed] == [*range(len(calls))]
  assert [call['function'] for call in streamed] == [call['function'] for call in calls]
  assert chunks[-1]['choices'][0]['finish_reason'] == parts[3]
  tokens = [
    token for c in chunks for token in (c['choices'][0]['logprobs'] or {}).get('content', [])
  ]
  assert tokens == choice['logprobs']['content']


def test_what_the_template_does_not_read_is_refused():
  served = FakeService(Templated(QWEN), lambda request: [1])
  with served.by_itself(), TestClient(app(served, Served(name='m'), hosts=['*'])) as client:
    for name in ('thinking', 'messages', 'role', 'endfor', 'm', 'tojson', ''):
      asked = ASKED | {'chat_template_kwargs': {name: True}}
      error = client.post('/v1/chat/completions', json=asked).json()['error']
      assert error['param'] == f'chat_template_kwargs.{name}'
  with pytest.raises(ValueError, match='--reasoning=none'):
    hidden = Templated(QWEN)
    hidden.control_ids = lambda: {'</think>': 7}
    app(FakeService(hidden), Served(name='m'), hosts=['*'])


COLOR = {'type': 'object', 'properties': {'p': {'$ref': '#/$defs/P'}}, 'required': ['p']}
COLOR['$defs'] = {'P': {'enum': ['red', 'blue']}}
PERSON = {'type': 'object', 'properties': {'name': {'enum': ['Ann', 'Bob']}}}
PERSON['properties']['q'] = {'$ref': '#/properties/name'}
PERSON['required'] = ['name', 'q']
REFERRING = [
  {'type': 'function', 'function': {'name': name, 'parameters': parameters}}
  for name, parameters in (('f', COLOR), ('g', PERSON))
]
RIGHT = [
  {'name': 'f', 'arguments': {'p': 'red'}},
  {'name': 'g', 'arguments': {'name': 'Ann', 'q': 'Bob'}},
]


@pytest.mark.parametrize('choice', ['required', {'name': 'f'}, {'name': 'g'}])
@pytest.mark.parametrize('tools', [[0], [1], [0, 1]])
@pytest.mark.parametrize('several', [False, True])
def test_references_of_parameters_are_to_their_own_places(choice, tools, several):
  names = [REFERRING[i]['function']['name'] for i in tools]
  if choice != 'required' and choice['name'] not in names:
    return
  given = {'tools': [REFERRING[i] for i in tools], 'tool_choice': choice}
  made = Tools.of(given | {'parallel_tool_calls': several}, '')
  regex = to_regex(made.keeps({})['schema'], all_plain)
  for call in RIGHT:
    wrong = call | {'arguments': dict.fromkeys(call['arguments'], 'g')}
    for each, is_right in ((call, call['name'] in made.names), (wrong, False)):
      text = json.dumps([each, each] if several else each)
      assert (re.fullmatch(regex, text) is not None) == is_right, text


def test_what_is_strict_has_to_be_asked_for():
  tools = [TOOLS[0], {'type': 'function', 'function': {'name': 'g', 'strict': True}}]
  with pytest.raises(Denied, match=r'tools\[1\].function.strict with tool_choice=auto') as refused:
    Tools.of({'tools': tools}, MARKED)
  assert refused.value.param == 'tools[1].function.strict'
  assert Tools.of({'tools': tools, 'tool_choice': 'required'}, MARKED).forced == ('f', 'g')
  assert Tools.of({'tools': tools, 'tool_choice': 'none'}, MARKED) is None


def test_tools_go_with_a_format_that_asks_for_nothing():
  tools = Tools.of({'tools': TOOLS}, MARKED)
  assert tools.keeps({'response_format': {'type': 'text'}}) == tools.keeps({}) == {}
  for name, asked in (
    ('response_format', {'type': 'json_object'}),
    ('response_format', {'type': 'text', 'json_schema': {'name': 'a', 'schema': {}}}),
    ('regex', 'a'),
  ):
    with pytest.raises(Denied, match=f'{name} with tools'):
      tools.keeps({name: asked})
