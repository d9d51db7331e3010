"""What exactly is a model asked? The rows of a task as prompts, with the examples that are shown
before each, frozen before any model sees them; and the same as ids of one model.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from data.chat import PREPARED_DAY, ChatTemplate, quoted
from data.records import LabelRecord
from data.template import Template
from data.tokenizer import Tokenizer, in_utf8
from decode.choices import room
from decode.loaded import LoadedModel
from evaluation.attacks import SAFETY, attacked
from evaluation.prompts import Shots, ranked
from evaluation.sandbox import Sandbox
from evaluation.task import (
  Classification,
  Generate,
  MultipleChoice,
  Perplexity,
  Row,
  Task,
  field_of,
  rendered,
  rows_of,
)

KEPT = 16  # times as many as may be shown: at so many the pool of a label is cut to these


@dataclasses.dataclass(frozen=True)
class Manner:
  """How tasks are asked.

  Attributes:
    data: the directory that relative paths of tasks are below.
    limit: the first rows of each task; 0: all. seed: of the examples shown, of draws and intervals.
    system: text before all else; of a chat, what the system says.
    chat: whether prompts are turns of a user, by the chat template of the run.
    programs: where programs run that a model wrote; None: nowhere.
    attacks: in which ways prompts of safety are asked besides, as evaluation.attacks.named has
      them; no other task is asked otherwise.
  """

  data: str = '.'
  limit: int = 0
  seed: int = 0
  system: str = ''
  chat: bool = False
  programs: Sandbox | None = None
  attacks: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Item:
  """One question of a task.

  Attributes:
    place: of its row. prompt: its own, without what stands before it.
    shots: (prompt, answer) of the examples before it; of a Classification (text, label).
    choices, truth: of a MultipleChoice, and which is right; of a Classification its label.
    references: of a Generate.
    digest: of all that is asked, what would be right, and by what it is told apart (Task.by);
      where functions of one's own judge an answer by its row, of that, too.
  """

  place: str
  row: Row
  prompt: str
  shots: tuple[tuple[str, str], ...] = ()
  choices: tuple[str, ...] = ()
  truth: int = 0
  references: tuple[str, ...] = ()
  digest: str = ''


def of_safety(task: Task) -> bool:
  """Whether its prompts are to be refused, or not, by what their rows say."""
  return getattr(task.kind, 'references', '') == SAFETY


def ways(task: Task, shots: Sequence[int]) -> tuple[list[int], list[int]]:
  """Of numbers of examples those that a task can be asked with, and the others.

  Raises ValueError where none is left.
  """
  shows = isinstance(task.kind, Classification | Generate) or bool(task.prompt)
  shows = shows and not isinstance(task.kind, Perplexity)
  # What is right there is a label, and no answer.
  shows = shows and (task.target or not of_safety(task))
  fit = [k for k in dict.fromkeys(shots) if shows or not k]
  if not fit:
    raise ValueError(
      f'--shots={",".join(map(str, shots))}: a {type(task.kind).__name__} without a question shows '
      'no examples; use --shots=0'
    )
  return fit, [k for k in dict.fromkeys(shots) if k not in fit]


class _Stream:
  """The questions of a task, in the order of its rows, made anew whenever they are gone through.

  Raises as `examples` does.
  """

  def __init__(self, task: Task, k: int, manner: Manner):
    self._task, self._manner = task, manner
    # A function may be slow, or draw: it is asked for its rows once.
    self._rows = [*self._read()] if callable(task.data) else None
    self._shown = _Shown(task, self._pool, k, manner.seed) if k else None
    self._template = None
    if isinstance(task.kind, Classification):
      # The task names its file alone, and the pattern and words are what is asked.
      self._template = Template.read(task.kind.template).values()

  def __iter__(self) -> Iterator[Item]:
    rows = self._read() if self._rows is None else self._rows
    for place, row in itertools.islice(rows, self._manner.limit or None):
      each = _plain(self._task, place, row)
      shots = self._shown.before(each) if self._shown else ()
      yield _frozen(self._task, each, shots, self._manner, self._template)

  def _read(self) -> Iterator[tuple[str, Row]]:
    rows = rows_of(self._task, self._task.data, self._manner.data)
    attacks = self._manner.attacks if of_safety(self._task) else {}
    return attacked(rows, attacks) if attacks else rows

  def _pool(self) -> Iterator[Item]:
    """What examples are drawn from, without any before them."""
    own = self._rows is not None and not self._task.shots
    source = self._task.shots or self._task.data
    rows = self._rows if own else rows_of(self._task, source, self._manner.data)
    return (_plain(self._task, *placed) for placed in rows)


class Questions(_Stream):
  """Those that `examples` gives, none of which is kept: what takes memory is those in hand. All are
  made once at first, so that what cannot be asked is said before any is. Raises as `examples` does.
  """

  def __init__(self, task: Task, k: int, manner: Manner):
    super().__init__(task, k, manner)
    self._n = sum(1 for _ in self)
    _check_some(task, self._n)

  def __len__(self) -> int:
    return self._n


def examples(task: Task, k: int, manner: Manner) -> list[Item]:
  """The questions of a task, each with k examples before it, in the order of its rows.

  Raises ValueError, naming the place, for rows that are not what the task takes, and for more
  examples than there are; FileNotFoundError naming --data, or a template.
  """
  asked = [*_Stream(task, k, manner)]
  _check_some(task, len(asked))
  return asked


def _check_some(task: Task, n: int) -> None:
  if not n:
    raise ValueError(f'{task.data} has no rows; give a file that has some')


def digest_of(asked: Iterable[Item]) -> str:
  """Of a set of questions."""
  prompts = PromptsDigest()
  for each in asked:
    prompts.add(each)
  return prompts.value


class PromptsDigest:
  """The same of questions that come one by one."""

  def __init__(self):
    self._hash, self._space = hashlib.blake2b(digest_size=16), b''

  def add(self, asked: Item) -> None:
    self._hash.update(self._space + asked.digest.encode())
    self._space = b' '

  @property
  def value(self) -> str:
    return self._hash.hexdigest()


def _plain(task: Task, place: str, row: Row) -> Item:
  """A row as a question, with nothing before it."""
  kind = task.kind
  if isinstance(kind, Classification):
    label = str(field_of(kind.label, place, row))
    return Item(place, row, str(field_of(kind.text, place, row)), choices=(label,))
  prompt = rendered(task.prompt, 'prompt', place, row)
  if isinstance(kind, MultipleChoice):
    choices = _choices(kind, place, row)
    return Item(place, row, prompt, choices=choices, truth=_truth(kind, choices, place, row))
  if isinstance(kind, Generate):
    return Item(place, row, prompt, references=_references(task, kind, place, row))
  return Item(place, row, prompt)


def _choices(kind: MultipleChoice, place: str, row: Row) -> tuple[str, ...]:
  if isinstance(kind.choices, tuple):
    return tuple(rendered(text, 'choices', place, row) for text in kind.choices)
  given = field_of(kind.choices, place, row)
  if not isinstance(given, list | tuple) or len(given) < 2:
    raise ValueError(
      f'{place}: {kind.choices!r} must be a list of 2 choices or more: {given!r:.60}'
    )
  return tuple(map(str, given))


def _truth(kind: MultipleChoice, choices: tuple[str, ...], place: str, row: Row) -> int:
  given = kind.answer if isinstance(kind.answer, int) else field_of(kind.answer, place, row)
  if isinstance(given, str) and given in choices:
    return choices.index(given)
  number = int(given) if isinstance(given, str) and given.isdecimal() else given
  if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(choices):
    raise ValueError(
      f'{place}: the answer {given!r} is neither the number of one of {len(choices)} choices, from '
      '0, nor its text'
    )
  return number


def _references(task: Task, kind: Generate, place: str, row: Row) -> tuple[str, ...]:
  if not kind.references:
    return (rendered(task.target, 'target', place, row),) if task.target else ()
  given = field_of(kind.references, place, row)
  texts = [given] if isinstance(given, str) else given
  if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
    raise ValueError(f'{place}: {kind.references!r} must be a text or several: {given!r:.60}')
  return tuple(texts)


class _Shown:
  """k examples of a pool, never the one that is asked.

  Of each label no more of the pool is kept than may be shown: the first k in the order of the seed,
  and one, where one of these is asked.
  """

  def __init__(self, task: Task, pool: Callable[[], Iterable[Item]], k: int, seed: int):
    self._task = task
    field = task.kind.label if isinstance(task.kind, Classification) else task.balanced
    of_labels: dict[str, dict[LabelRecord, Item]] = {}
    for each in pool():
      label = str(field_of(field, each.place, each.row)) if field else ''
      of = of_labels.setdefault(label, {})
      of.setdefault(LabelRecord(each.prompt, label), each)
      if len(of) >= KEPT * (k + 1):
        of_labels[label] = {record: of[record] for record in ranked([*of], seed)[: k + 1]}
    self._of = {record: each for of in of_labels.values() for record, each in of.items()}
    self._shots = Shots([*self._of], sorted(of_labels), k, seed)

  def before(self, asked: Item) -> tuple[tuple[str, str], ...]:
    """(prompt, answer) of each. Whoever has its prompt is the one that is asked."""
    shown = [self._of[record] for record in self._shots.before(asked.prompt)]
    return tuple((each.prompt, self._answer(each)) for each in shown)

  def _answer(self, shot: Item) -> str:
    if isinstance(self._task.kind, Classification):
      return shot.choices[0]
    if self._task.target:
      return rendered(self._task.target, 'target', shot.place, shot.row)
    if isinstance(self._task.kind, MultipleChoice):
      return shot.choices[shot.truth]
    if not shot.references:
      raise ValueError(f'{shot.place}: there is no answer to show; give the task a target')
    return shot.references[0]


def _frozen(task: Task, asked: Item, shots, manner: Manner, template: dict | None) -> Item:
  said = [manner.system, task.instruction, shots, asked.prompt, asked.choices, asked.truth]
  said.append(asked.references)
  if template is not None:
    said.append(template)
  if task.by:
    said.append(str(asked.row.get(task.by)))
  if task.judges_rows:
    said.append(asked.row)
  text = json.dumps(said, default=_told)
  digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
  return dataclasses.replace(asked, shots=shots, digest=digest)


def _told(value) -> str | list[str]:
  """What no JSON has of a row, the same in every process."""
  if isinstance(value, set | frozenset):
    return sorted(map(str, value))
  return re.sub(' at 0x[0-9a-f]+', '', str(value))


def is_pairs(task: Task) -> bool:
  """Whether it asks which of two texts is the likelier one, and nothing besides."""
  kind = task.kind
  return (
    isinstance(kind, MultipleChoice)
    and not isinstance(kind.choices, str)
    and (len(kind.choices), kind.normalise, kind.calibration) == (2, 'sum', 'none')
    and not (task.prompt or task.instruction)
  )


def chat_of(tokenizer: Tokenizer) -> ChatTemplate:
  """By which questions are turns, as if it were PREPARED_DAY: on another day they are the same."""
  return ChatTemplate.of(tokenizer, day=PREPARED_DAY)


def chat_settings(tokenizer: Tokenizer) -> dict[str, str]:
  """What of it decides the text of questions, JSON-able: a digest; the day, where it reads that."""
  source = tokenizer.chat_templates.get('default', '')
  said = json.dumps([source, tokenizer.special_tokens])
  settings = {'chat_template': hashlib.blake2b(said.encode(), digest_size=8).hexdigest()}
  return settings | ({'day': str(PREPARED_DAY.date())} if 'strftime_now' in source else {})


class Asker:
  """Questions of a task as one model reads them.

  Raises ValueError for a kind that the model cannot be asked, and for a chat without a template.
  """

  def __init__(self, model: LoadedModel, task: Task, manner: Manner):
    self.model, self.task, self.manner = model, task, manner
    self._tokenizer = model.tokenizer
    config, kind = model.model.config, type(task.kind).__name__
    self.encoder = config.encoder_layers > 0
    if not config.causal and not (isinstance(task.kind, Classification) or is_pairs(task)):
      raise ValueError(
        f'a {kind} is of a model that writes, and this one is an encoder; it can be asked to '
        'Classification, by a template with a mask, and which of two texts is likelier: a '
        "MultipleChoice of two, with an empty prompt and normalise='sum'"
      )
    if self.encoder and isinstance(task.kind, Perplexity):
      raise ValueError(
        'a Perplexity is of a text that a decoder goes through from left to right, and this model '
        'is an encoder-decoder; ask it a MultipleChoice or Generate'
      )
    if manner.chat and isinstance(task.kind, Classification | Perplexity):
      raise ValueError(f'--chat: a {kind} reads texts as they are, not as turns; leave it out')
    self._chat = chat_of(self._tokenizer) if manner.chat else None

  def text(self, asked: Item) -> str:
    """All that the model reads before its answer; of a chat with its template's marks."""
    task, system = self.task, self.manner.system
    if not self._chat:
      before = [text for text in (system, task.instruction) if text]
      shown = [f'{prompt}{task.space}{answer}' for prompt, answer in asked.shots]
      return task.between.join([*before, *shown, asked.prompt])
    turns = [*asked.shots, (asked.prompt, None)]
    messages = [{'role': 'system', 'content': system}] if system else []
    for i, (prompt, answer) in enumerate(turns):
      said = task.instruction + task.between + prompt if task.instruction and not i else prompt
      messages.append({'role': 'user', 'content': said})
      if answer is not None:
        messages.append({'role': 'assistant', 'content': answer})
    quote = quoted(messages, self._tokenizer)
    return self._chat.render(quote, add_generation_prompt=True)

  def ids(self, text: str) -> list[int]:
    """Of what `text` gave, with what begins or ends it."""
    ids = self._encoded(text)
    if self._chat:
      return ids
    return [*ids, self._tokenizer.eos] if self.encoder else [self._tokenizer.bos, *ids]

  def pairs(self, text: str, answers: Sequence[str]) -> tuple[list[int], list[list[int]], bool]:
    """What the model reads, each answer's ids behind it, and whether it was cut to fit.

    White space at the end of a text belongs to the answer, and a text with its answer is encoded as
    one and cut where the text ends: so tokens are those that a text of both has.
    """
    if not self._chat:
      stripped = text.rstrip()
      answers = [text[len(stripped) :] + answer for answer in answers]
      text = stripped
    if self.encoder:
      behind = [[*self._encoded(a.strip()), self._tokenizer.eos] for a in answers]
    else:
      first = len(self._encoded(text))
      behind = [self._encoded(text + answer)[first:] for answer in answers]
    for answer, ids in zip(answers, behind):
      if not ids:
        raise ValueError(f'{answer!r} becomes no token behind {text[-40:]!r}; give another text')
    limit = min(room(self.model, len(ids)) for ids in behind)
    ids = self.ids(text)
    cut = fitted(ids, limit)
    return cut, behind, len(cut) < len(ids)

  def answer(self, choice: str) -> str:
    """A choice as it stands behind the prompt."""
    if self._chat:
      return quoted(choice, self._tokenizer)
    return f'{self.task.space}{choice}' if self.task.prompt else choice

  def _encoded(self, text: str) -> list[int]:
    return list(self._tokenizer.encode(in_utf8(text), special=self._chat is not None))


def fitted(ids: list[int], limit: int) -> list[int]:
  """The last so many ids, behind the one that begins the text.

  Raises ValueError where there is no room for any.
  """
  if limit < 1:
    raise ValueError(f'an answer leaves room for {limit} tokens before it; shorten it')
  return ids if len(ids) <= limit else [*ids[:1], *ids[len(ids) - limit + 1 :]]
