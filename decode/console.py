"""How does a person talk to a model at a terminal? Lines, commands among them, answers as they
come; and what Ctrl-C means where.
"""

import contextlib
import inspect
import io
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Callable

import commands
import files
import names
from decode.conversation import Conversation

COMMAND = re.compile(r'/([a-z]+)(?:\s+(.*))?', re.DOTALL)
SHOWN = 40  # characters of what is taken back


class Console:
  """A conversation at a terminal.

  What a person can mend is said in one line, and loses nothing. Ctrl-C stops an answer; where a
  line is awaited, it ends the conversation at the second time, and the end of the input at once.
  """

  def __init__(
    self,
    conversation: Conversation,
    read: Callable[[str], str] = input,
    out: io.TextIOBase | None = None,
  ):
    """read: a line, without its end, behind a prompt that it shows; EOFError where there are no
    more. out: for all that is shown; default: stdout.
    """
    self.conversation = conversation
    self._read, self._out = read, out or sys.stdout
    self._waits = False  # for a line
    self._leaving = False  # at the next Ctrl-C
    self._saved: set[pathlib.Path] = set()
    self._commands = {
      'help': self._help,
      'reset': self._reset,
      'undo': self._undo,
      'save': self._save,
    }
    if conversation.chat:
      self._commands['system'] = self._system

  def run(self) -> None:
    """Until the person ends it."""
    self._say('/help says what there is; Ctrl-C stops an answer, Ctrl-D ends the conversation')
    while True:
      count = len(self.conversation.turns)
      try:
        self._step()
      except EOFError:
        self._say('')
        return
      except KeyboardInterrupt:
        if self._waits and self._leaving:
          self._say('')
          return
        self._interrupted(len(self.conversation.turns) > count)

  def _step(self) -> None:
    """One line, or several that are one message, and what they ask for."""
    self._waits = True
    text = self._message()
    self._waits = self._leaving = False
    try:
      self._act(text)
    except (ValueError, NotImplementedError, FloatingPointError, OSError) as error:
      self._say(f'error: {commands.said(error)}')

  def _message(self) -> str:
    """What the person says: a line that ends in a backslash goes on in the next one."""
    lines = [self._read('> ')]
    while lines[-1].endswith('\\'):
      lines[-1] = lines[-1][:-1]
      lines.append(self._read('. '))
    return '\n'.join(lines)

  def _act(self, text: str) -> None:
    command = COMMAND.fullmatch(text.rstrip())
    if command:
      self._command(command[1], (command[2] or '').strip())
    elif text.strip() or not self.conversation.chat:
      self._answer(text)

  def _command(self, name: str, rest: str) -> None:
    try:
      names.check('command', f'/{name}', [f'/{known}' for known in self._commands])
    except ValueError as error:
      raise ValueError(f'{error}. Begin the line with a space to say it to the model') from None
    act = self._commands[name]
    if inspect.signature(act).parameters:
      act(rest)
    elif rest:
      raise ValueError(f'/{name} takes nothing behind it, and {rest[:SHOWN]!r} is there')
    else:
      act()

  def _answer(self, text: str) -> None:
    with contextlib.closing(self.conversation.say(text)) as answer:
      # What is logged while programs are made comes before the text, not in its midst.
      first = next(answer, '')
      for piece in itertools.chain([first], answer):
        print(piece, end='', file=self._out, flush=True)
    self._say('')
    if self.conversation.note:
      self._say(f'NOTE: {self.conversation.note}')

  def _interrupted(self, kept: bool) -> None:
    if self._waits:
      self._leaving = True
      self._say('\nCtrl-C again, or Ctrl-D, ends the conversation')
    elif kept:
      self._say('\n(stopped; what is written stays, /undo takes it back)')
    else:
      self._say('\n(stopped before anything was written: what you said is taken back)')

  def _help(self) -> None:
    """/help: this."""
    for act in self._commands.values():
      self._say(inspect.getdoc(act))
    self._say('A line that ends in \\ goes on in the next one.')
    self._say('Ctrl-C stops an answer; where a line is awaited, twice, or Ctrl-D, ends it all.')
    tokens, limit = self.conversation.tokens, self.conversation.limit
    of = f' of {limit}' if limit else ''
    self._say(f'{_turns(self.conversation)} so far, {tokens} tokens{of}.')

  def _reset(self) -> None:
    """/reset: begin anew; what the system says stays."""
    before = _turns(self.conversation)
    self.conversation.reset()
    stays = '; what the system says stays' if self.conversation.system else ''
    self._say(f'(begun anew, without {before}{stays})')

  def _undo(self) -> None:
    """/undo: take back the last thing said, and its answer."""
    said = self.conversation.undo().said
    shown = said if len(said) <= SHOWN else f'{said[:SHOWN]}...'
    self._say(f'(taken back: {shown!r}; left: {_turns(self.conversation)})')

  def _save(self, path: str) -> None:
    """/save FILE: write the conversation, as {"messages": ..} or, without a template, as text."""
    if not path:
      raise ValueError('/save needs a file, as in /save talk.jsonl')
    target = pathlib.Path(path).expanduser()
    files.check_local('/save', str(target))
    place = target.absolute()
    if target.is_file() and place not in self._saved:
      raise ValueError(f'/save {path}: a file is there, and stays as it is; give another name')
    files.check_writable(target)

    if self.conversation.chat:
      messages = {'messages': self.conversation.messages}
      files.replace(target, json.dumps(messages, ensure_ascii=False) + '\n')
    else:
      files.replace(target, self.conversation.text)
    self._saved.add(place)
    self._say(f'(wrote {_turns(self.conversation)} to {path})')

  def _system(self, text: str) -> None:
    """/system TEXT: what the system says, before all turns; without TEXT, nothing."""
    self.conversation.set_system(text)
    if text:
      self._say('(the system says that from here on, before all turns)')
    else:
      self._say('(the system says nothing)')

  def _say(self, text: str) -> None:
    print(text, file=self._out, flush=True)


def _turns(conversation: Conversation) -> str:
  count = len(conversation.turns)
  return f'{count} turn' if count == 1 else f'{count} turns'
