"""Are prompts and examples read as they stand, and is what is none refused with its place?"""

import io
import json
import sys

import pytest

from decode.prompts import (
  check_adapters,
  named_runs,
  piped,
  prompt_of,
  read_asked,
  read_examples,
  read_prompts,
  with_examples,
)


class Piped(io.TextIOWrapper):
  def __init__(self, content: bytes, terminal: bool = False):
    super().__init__(io.BytesIO(content))
    self._terminal = terminal

  def isatty(self):
    return self._terminal


@pytest.mark.parametrize(
  'content, text',
  [
    (b'hi\n', 'hi'),
    (b'hi\r\n', 'hi'),
    (b'hi\n\n', 'hi\n'),
    (b'hi', 'hi'),
    (b'', ''),
    ('\ufeffd\u2028é'.encode(), 'd\u2028é'),
  ],
)
def test_a_pipe_is_a_prompt_without_the_end_of_its_last_line(monkeypatch, content, text):
  monkeypatch.setattr(sys, 'stdin', Piped(content))
  assert piped() == text


def test_nothing_is_awaited_of_a_terminal_or_of_no_stdin(monkeypatch):
  monkeypatch.setattr(sys, 'stdin', Piped(b'typed', terminal=True))
  assert piped() == ''
  monkeypatch.setattr(sys, 'stdin', None)
  assert piped() == ''
  with pytest.raises(ValueError, match='stdin holds no prompt'):
    read_prompts('-')


def test_a_pipe_may_hold_lines_of_prompts(monkeypatch):
  monkeypatch.setattr(sys, 'stdin', Piped(b'"a"\n\n{"prompt": [1, 2]}\n'))
  assert read_prompts('-') == [('stdin:1', 'a'), ('stdin:3', [1, 2])]
  for content, said in {
    b'"a"\nhi\n': 'stdin:2: not JSON',
    b'\xff"a"': 'stdin:1: not UTF-8',
    b'7': "stdin:1: '7' is neither a text",
  }.items():
    monkeypatch.setattr(sys, 'stdin', Piped(content))
    with pytest.raises(ValueError, match=said):
      read_prompts('-')
  monkeypatch.setattr(sys, 'stdin', Piped(b'\xff'))
  with pytest.raises(ValueError, match='stdin: not UTF-8 .*pipe in UTF-8'):
    piped()


def test_lines_name_adapters_and_the_command_their_runs(monkeypatch):
  lines = b'"a"\n{"prompt": "b", "adapter": "orders"}\n{"prompt": "c", "adapter": ""}\n'
  monkeypatch.setattr(sys, 'stdin', Piped(lines))
  assert [(prompt, name) for _, prompt, name in read_asked('-')] == [
    ('a', None),
    ('b', 'orders'),
    ('c', ''),
  ]
  monkeypatch.setattr(sys, 'stdin', Piped(b'{"prompt": "b", "adapter": 3}'))
  with pytest.raises(ValueError, match="f:2: adapter='order' is unknown; did you mean 'orders'"):
    check_adapters([('f:1', 'a', None), ('f:2', 'b', 'order'), ('f:3', 'c', '')], ['orders'])
  with pytest.raises(ValueError, match="f:2: adapter='orders', and no adapters were loaded"):
    check_adapters([('f:1', 'a', ''), ('f:2', 'b', 'orders')], [])
  with pytest.raises(ValueError, match='stdin:1: adapter=3 must be the name of one'):
    read_asked('-')
  assert named_runs(['orders=runs/orders', 'b=c=d']) == {'orders': 'runs/orders', 'b': 'c=d'}
  for given, said in ((['orders'], "'orders' is no name=DIR"), (['a=b', 'a=c'], "called 'a'")):
    with pytest.raises(ValueError, match=said):
      named_runs(given)


def test_examples_stand_before_a_prompt(tmp_path):
  path = tmp_path / 'examples.jsonl'
  lines = [{'prompt': '2 + 2 =', 'text': ' 4'}, {'prompt': '1 + 1 =', 'text': ' 2'}]
  path.write_text('\n'.join(map(json.dumps, lines)))
  both = read_examples(str(path))
  assert both == [('2 + 2 =', ' 4'), ('1 + 1 =', ' 2')] and read_examples(str(path), 1) == both[:1]
  assert with_examples(both, '3 =', chat=False) == '2 + 2 = 4\n\n1 + 1 = 2\n\n3 ='
  assert with_examples([], [1, 2], chat=False) == [1, 2]

  system, last = {'role': 'system', 'content': 's'}, {'role': 'user', 'content': '3 ='}
  turns = [{'role': 'user', 'content': '2 + 2 ='}, {'role': 'assistant', 'content': ' 4'}]
  assert with_examples(both[:1], '3 =', chat=True) == [*turns, last]
  assert with_examples(both[:1], [system, last], chat=False) == [system, *turns, last]
  for chat in (False, True):
    with pytest.raises(ValueError, match='ids with --examples'):
      with_examples(both, prompt_of([1, 2]), chat=chat)


@pytest.mark.parametrize(
  'content, shots, said',
  [
    ('{"prompt": "a", "text": "b"}', 2, '--shots=2 of .*, which holds 1 examples; ask for fewer'),
    ('', None, 'examples holds no example; add lines of'),
    ('"a"', None, "examples:1: '.*a.*' is no example; give "),
    ('{"prompt": "a"}', None, 'examples:1: .* must have two texts'),
    ('{"prompt": "a", "txt": "b"}', None, "examples:1: key='txt' is unknown; did you mean 'text'"),
  ],
)
def test_what_is_no_example_is_said_with_its_place(tmp_path, content, shots, said):
  path = tmp_path / 'examples'
  path.write_text(content)
  with pytest.raises(ValueError, match=said):
    read_examples(str(path), shots)
  with pytest.raises(ValueError, match='--examples=.*none: No such file'):
    read_examples(str(tmp_path / 'none'))


def test_messages_are_objects_all_of_them(monkeypatch):
  monkeypatch.setattr(
    sys, 'stdin', Piped(b'{"messages": [{"role": "system", "content": "s"}, "x"]}')
  )
  with pytest.raises(ValueError, match='stdin:1: messages=.*must be a list of objects'):
    read_prompts('-')
