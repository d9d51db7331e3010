"""How does a conversation go on, turn by turn? What was said is text; the model reads all of it at
every turn, of which a session has most already.

So an answer is the one that generating from the whole history at once would give: whatever was
taken back, stopped or said anew, the session is cut to what the history begins with, and reads the
rest.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator

from decode.generator import Generator
from decode.loaded import bucket
from decode.options import Options
from decode.request import LENGTH
from decode.session import Session, check_turn

# Tokens that a session begins with: a cache for all positions of a model may be large.
ROOM = 2048


@dataclasses.dataclass(frozen=True)
class Turn:
  """What the person said, and what came of it."""

  said: str
  answer: str


class Conversation:
  """Turns of a person and a model.

  Whatever interrupts it, Ctrl-C included, it holds turns that it can go on with; what is refused
  changes nothing.

  Attributes:
    chat: whether turns are put into the tokenizer's chat template; else they are one text, that
      goes on.
    system: what the system says, '' where nothing.
    turns: so far.
    note: which limit ended the last answer; '' where it ended itself, or was stopped.
  """

  def __init__(self, generator: Generator, *, chat: bool = True, **options):
    """options: of every turn, see decode.options.Options; cache_dtype and adapter are of the
    session.

    Raises ValueError and NotImplementedError for options that a turn cannot have, and where the
    tokenizer has no chat template.
    """
    self._cache_dtype = options.pop('cache_dtype', '')
    (self._front,) = generator.fronts_of(options.pop('adapter', ''), 1)
    self._given, self._options = options, Options.of(options)
    check_turn(self._options)
    generator.rules(self._options, 1, generator.parts)
    self._generator = generator
    self.chat, self.system, self.note = chat, '', ''
    self.turns: list[Turn] = []
    self._ids('Hello')
    self._session = self._session_of(min(self._front.context, ROOM))

  def say(self, text: str) -> Iterator[str]:
    """Pieces of the answer as they come. A turn is one when it has ended, or was stopped behind its
    first piece: by Ctrl-C, or by who listens no more.

    Raises ValueError, and nothing is changed, for what a template refuses and for more than the
    model has positions for.
    """
    ids = self._ids(text)
    if len(ids) >= self._front.context:
      raise ValueError(
        f'with this the conversation has {len(ids)} tokens, of {self._front.limit} at most, '
        f'answer included: {self.room} remain; say less, or make room by /undo or /reset'
      )
    return self._answer(text, ids)

  @property
  def tokens(self) -> int:
    """Of all that was said, and of what opens a turn."""
    return len(self._ids(''))

  @property
  def room(self) -> int:
    """Tokens that remain for what is said next and its answer."""
    return max(self._front.context - self.tokens, 0)

  @property
  def limit(self) -> str:
    """How many tokens there can be, as messages have it; '' where there is no end of them."""
    return '' if self._front.context == sys.maxsize else self._front.limit

  @property
  def messages(self) -> list[dict[str, str]]:
    """All that was said, as a chat template takes it."""
    system = [{'role': 'system', 'content': self.system}] if self.system else []
    turns = [
      {'role': role, 'content': content}
      for turn in self.turns
      for role, content in (('user', turn.said), ('assistant', turn.answer))
    ]
    return [*system, *turns]

  @property
  def text(self) -> str:
    """All that was said, as one text."""
    return ''.join(turn.said + turn.answer for turn in self.turns)

  def set_system(self, text: str) -> None:
    """From here on the system says this, or nothing for ''; it stands before all turns.

    Raises ValueError, and nothing is changed, where the template takes no such message.
    """
    before, self.system = self.system, text
    try:
      self._ids('Hello')
    except ValueError:
      self.system = before
      raise

  def undo(self) -> Turn:
    """Takes the last turn back, which it gives. Raises ValueError where there is none."""
    if not self.turns:
      raise ValueError('no turn is there to take back')
    return self.turns.pop()

  def reset(self) -> None:
    """Forgets all turns, but not what the system says."""
    self.turns = []

  def _ids(self, text: str) -> list[int]:
    """What the model reads when this is said next."""
    if self.chat:
      return self._generator.chat_ids([*self.messages, {'role': 'user', 'content': text}])
    return self._generator.encoded(self.text + text)

  def _session_of(self, capacity: int) -> Session:
    return self._generator.session(capacity, self._cache_dtype, self._front.adapter)

  def _answer(self, text: str, ids: list[int]) -> Iterator[str]:
    pieces, ended, self.note = [], False, ''
    try:
      self._bring(ids)
      with contextlib.closing(self._session.stream(**self._given)) as stream:
        for piece in stream:
          pieces.append(piece)
          yield piece
      ended, self.note = True, self._limit()
    finally:
      if pieces or ended:
        self.turns.append(Turn(text, ''.join(pieces)))

  def _bring(self, ids: list[int]) -> None:
    """Makes the session one that has read these ids, by reading what is new in them."""
    most = min(self._front.context, len(ids) + self._options.max_new_tokens)
    if most > self._session.capacity:
      self._session = self._session_of(min(self._front.context, bucket(most)))
    known = self._session.ids
    same = next(
      (i for i, (a, b) in enumerate(zip(known, ids)) if a != b), min(len(known), len(ids))
    )
    self._session.truncate(same)
    if ids[same:]:
      self._session.append(ids[same:])

  def _limit(self) -> str:
    """What is to be said of the end of an answer that nobody asked for."""
    notes = [note for note in self._generator.report.notes if note]
    if notes:
      return f'{notes[0]}; /undo or /reset make room'
    if self._session.finish == LENGTH:
      return f'max_new_tokens={self._options.max_new_tokens} ended it; start with more of them'
    return ''
