"""Which part of what a chat model writes is for whom? Its thoughts, its calls of tools and its
answer are told apart as they come, in whatever pieces.

    parted = Parted(ChatManner(thinks=True))
    parted.add('<think>two and'); parted.add(' two</think>4', last=True)

What stands between the marks of thoughts comes first, if at all. White space beside marks belongs
to them. What is no whole call, as where max_tokens has cut it off, stays text.
"""

import dataclasses
import json
import secrets
from collections.abc import Callable, Container, Iterator
from typing import Any

from data.chat import ChatTemplate
from data.tokenizer import Tokenizer
from serving.fields import no_number

THINK = ('<think>', '</think>')
CALL = ('<tool_call>', '</tool_call>')

# How calls are written: between marks (Hermes, Qwen); as the whole answer, one object or several
# with `;` between (Llama 3); because a schema leaves nothing else.
MARKED, BARE, FORCED = 'marked', 'bare', 'forced'

# Whether thoughts are told apart: as the template has their marks, always, never.
REASONING = ('auto', 'think', 'none')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatManner:
  """How a text is written.

  Attributes:
    thinks: whether it may begin with thoughts. within: whether it begins amid them, because the
      prompt has opened them.
    calls: '', MARKED, BARE or FORCED. names: of tools; what calls another is text.
    several: whether there may be several calls; what follows the first is text otherwise.
  """

  thinks: bool = False
  within: bool = False
  calls: str = ''
  names: tuple[str, ...] = ()
  several: bool = True


@dataclasses.dataclass
class ChatParts:
  """Parts of a text. calls: as OpenAI's answers have them."""

  reasoning: str = ''
  content: str = ''
  calls: list[dict] = dataclasses.field(default_factory=list)


class Parted:
  """One text that is told apart. All that `add` gives, together, does not depend on the pieces."""

  def __init__(self, manner: ChatManner):
    self._manner = manner
    self._held = ''  # of which nothing is certain
    self._space = ''  # that has been left out before a call's mark, if text follows
    self._fresh = manner.within  # behind a mark, whose white space is left out
    self._content = self._called = False  # whether there has been any
    self._state = self._before if manner.thinks else self._answer
    if manner.within:
      self._state = self._thinking

  def add(self, text: str, last: bool = False) -> ChatParts:
    """What is certain by now. last: there is no more of it."""
    self._held += text
    said = ChatParts()
    while self._state(said, last):
      pass
    return said

  # States: each takes what it can; whether another one goes on from there.

  def _before(self, said: ChatParts, last: bool) -> bool:
    start = self._held.lstrip()
    if len(start) < len(THINK[0]) and THINK[0].startswith(start) and not last:
      return False
    self._state = self._answer
    if start.startswith(THINK[0]):
      self._begin(self._thinking, start[len(THINK[0]) :])
    return True

  def _thinking(self, said: ChatParts, last: bool) -> bool:
    if self._skips():
      return False
    before, closed, after = self._held.partition(THINK[1])
    if closed:
      said.reasoning += before.rstrip()
      self._begin(self._answer, after)
      return True
    certain = len(before) if last else _certain(before, THINK[1])
    said.reasoning += before[:certain]
    self._held = before[certain:]
    return False

  def _answer(self, said: ChatParts, last: bool) -> bool:
    if self._skips():
      return False
    if self._manner.calls == MARKED:
      return self._until_call(said, last)
    if self._manner.calls and not self._content:
      begun = self._held.lstrip()
      if self._manner.calls == FORCED or begun[:1] in ('', '{'):
        if last and not self._read_whole(said):
          self._tell(said, self._take())
        return False
    self._tell(said, self._take())
    return False

  def _until_call(self, said: ChatParts, last: bool) -> bool:
    before, opened, after = self._held.partition(CALL[0])
    if opened:
      kept = before.rstrip()
      self._tell(said, kept)
      self._space += before[len(kept) :]
      self._held, self._state = after, self._calling
      return True
    certain = len(before) if last else _certain(before, CALL[0])
    if last and self._called:
      certain = len(before.rstrip())
    self._tell(said, before[:certain])
    self._held = '' if last else before[certain:]
    return False

  def _calling(self, said: ChatParts, last: bool) -> bool:
    inner, closed, after = self._held.partition(CALL[1])
    if not closed and not last:
      return False
    call = made_call(_parsed(inner), 'arguments', self._manner.names) if closed else None
    if call is None:
      self._tell(said, CALL[0] + inner + closed)
      self._held, self._state = after, self._answer
      return True
    said.calls.append(call)
    self._called = True
    self._begin(self._answer if self._manner.several else self._rest, after)
    return True

  def _rest(self, said: ChatParts, last: bool) -> bool:
    """Behind the only call that there may be."""
    if not self._skips():
      self._tell(said, self._take())
    return False

  def _read_whole(self, said: ChatParts) -> bool:
    """Reads calls that are all that there is of an answer; whether they are."""
    calls, behind = [], 0
    for value, end in _values(self._held):
      several = value if self._manner.calls == FORCED and isinstance(value, list) else [value]
      key = 'arguments' if self._manner.calls == FORCED else 'parameters'
      made = [made_call(each, key, self._manner.names) for each in several]
      if not made or None in made:
        return False
      calls, behind = calls + made, end
      if not self._manner.several:
        break
    if not calls or (self._manner.several and self._held[behind:].strip('; \t\r\n')):
      return False
    said.calls += calls
    self._called = True
    rest, self._held = self._held[behind:].lstrip('; \t\r\n'), ''
    self._tell(said, rest)
    return True

  def _begin(self, state: Callable[[ChatParts, bool], bool], held: str) -> None:
    """Behind a mark."""
    self._held, self._state, self._fresh = held, state, True

  def _skips(self) -> bool:
    """Whether all that is there is white space behind a mark."""
    if self._fresh:
      self._held = self._held.lstrip()
      self._fresh = not self._held
    return self._fresh

  def _take(self) -> str:
    text, self._held = self._held, ''
    return text

  def _tell(self, said: ChatParts, text: str) -> None:
    if text:
      said.content += text if self._called and not self._content else self._space + text
      self._space, self._content = '', True


def _certain(text: str, mark: str) -> int:
  """Characters that belong to no mark that may be about to come, nor to the space before it."""
  begun = next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
  return len(text[: len(text) - begun].rstrip())


def _parsed(text: str) -> Any:
  """None for what is no JSON."""
  try:
    return json.loads(text, parse_constant=no_number)
  except (ValueError, RecursionError):
    return None


def _values(text: str) -> Iterator[tuple[Any, int]]:
  """Values of JSON that stand one behind another, each with where it ends; until there is none."""
  decoder, place = json.JSONDecoder(parse_constant=no_number), 0
  while place < len(text):
    place += len(text[place:]) - len(text[place:].lstrip('; \t\r\n'))
    try:
      value, place = decoder.raw_decode(text, place)
    except (ValueError, RecursionError):
      return
    yield value, place


def made_call(said: Any, key: str, names: tuple[str, ...]) -> dict | None:
  """A call of OpenAI's form, of an object with a name, and arguments by this key; None for what is
  none.
  """
  if not isinstance(said, dict) or said.get('name') not in names:
    return None
  arguments = said.get(key)
  if not isinstance(arguments, dict):
    return None
  try:
    # 1e999 is no number, and half a surrogate no text: such a call stays what was written.
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    written.encode()
  except ValueError:
    return None
  function = {'name': said['name'], 'arguments': written}
  return {'id': f'call_{secrets.token_hex(12)}', 'type': 'function', 'function': function}


def call_form(template: ChatTemplate | None, control: Container[str] = ()) -> str:
  """How a template has its model call tools: as it writes a call that is there; '' for none that
  can be read. control: names of tokens that are in no text.
  """
  if template is None or 'tools' not in template.source:
    return ''
  arguments = {'place': 'Ulm'}
  call = {'id': 'callcall1', 'type': 'function'}
  call |= {'function': {'name': 'weather', 'arguments': arguments}}
  asked = {'role': 'user', 'content': 'How is it?'}
  try:
    written = template.render([asked, {'role': 'assistant', 'content': '', 'tool_calls': [call]}])
  except ValueError:
    return ''
  marked = Parted(ChatManner(calls=MARKED, names=('weather',))).add(written, last=True).calls
  if marked:
    return '' if any(mark in control for mark in CALL) else MARKED
  for place, character in enumerate(written):
    if character == '{':
      value, _ = next(_values(written[place:]), (None, 0))
      if made_call(value, 'parameters', ('weather',)):
        return BARE
  return ''


def thinks(asked: str, template: ChatTemplate | None, tokenizer: Tokenizer) -> bool:
  """Whether thoughts are told apart. asked: one of REASONING. Raises ValueError where it cannot."""
  marked = template is not None and THINK[1] in template.source
  if asked == 'none' or (asked == 'auto' and not marked):
    return False
  if THINK[1] in tokenizer.control_ids():
    raise ValueError(
      f'--reasoning={asked}: {THINK[1]} is a control token of this tokenizer, which is in no text, '
      'so that thoughts end nowhere; give --reasoning=none'
    )
  return True
