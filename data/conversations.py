"""Which tokens does a record become, and which of them is a model to learn? Those of the assistant,
and always the one that ends its turn.

A conversation is what the chat template makes of it, encoded as a whole, as transformers'
apply_chat_template does, as if it were PREPARED_DAY; a completion is encoded apart from its prompt,
as generation meets it, and as what stands behind one.
Where a template has no {% generation %} blocks, a turn is what it adds to the messages before.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

import names
from data import generation
from data.chat import PREPARED_DAY, ChatTemplate, quoted
from data.encoding import encoded_behind
from data.records import ChatRecord, JudgedRecord, LabelRecord, PreferenceRecord, Record, TextRecord
from data.tokenizer import Tokenizer, in_utf8

ASSISTANT = 'assistant'
TURNS = ('all', 'last')


@dataclasses.dataclass(frozen=True)
class Example:
  """Attributes:
  ids: int32 [n], what the model reads, and learns to go on with.
  scored: bool [n], which of them it is to learn.
  notes: numbers that are kept beside it, for rows that read some.
  """

  ids: np.ndarray
  scored: np.ndarray
  notes: tuple[float, ...] = ()


class ExampleWriter:
  """Makes examples of records, for one tokenizer and one template.

  Args:
    template: Jinja text; '' is the tokenizer's own.
    turns: which of the assistant's turns are learned, 'all' or the 'last'.
  Raises ValueError for a template that differs from the tokenizer's own: the model has learned
    that one.
  """

  def __init__(self, tokenizer: Tokenizer, template: str = '', turns: str = 'all'):
    self._tokenizer, self._last = tokenizer, names.check('turns', turns, TURNS) == 'last'
    self._ends = np.array(generation.ends(tokenizer))
    known = tokenizer.chat_templates.get('default', '')
    if template and known and template.strip() != known.strip():
      raise ValueError(
        'the chat template that is given differs from the one of the tokenizer, by which the model '
        'was trained and will be asked; leave it out, or take it out of the tokenizer'
      )
    self._template = None
    if template or known:
      self._template = ChatTemplate(template or known, tokenizer.special_tokens, PREPARED_DAY)

  def example(self, place: str, record: Record) -> Example:
    """Raises ValueError, naming the place, for a record that the template cannot render, whose
    turns cannot be told apart, that has nothing to learn, or a turn that no end token closes.
    """
    try:
      if isinstance(record, TextRecord):
        return self._completion(record)
      if isinstance(record, LabelRecord):
        raise ValueError(
          "records of format 'label' are classified: use objective.kind=classify, whose template "
          'says in which words'
        )
      if isinstance(record, PreferenceRecord | JudgedRecord):
        raise ValueError(
          'records of answers that are compared or judged are learned as such: use '
          "objective.kind='preference' or 'kto'"
        )
      return self._conversation(record)
    except ValueError as error:
      raise ValueError(f'{place}: {error}') from error

  def _completion(self, record: TextRecord) -> Example:
    if not record.completion:
      raise ValueError('the completion is empty: there is nothing to learn')
    prompt = self._tokenizer.encode(record.prompt)
    if prompt:
      completion = encoded_behind(self._tokenizer, record.completion)
    else:
      completion = self._tokenizer.encode(record.completion)
    ids = np.array([self._tokenizer.bos, *prompt, *completion, self._tokenizer.eos], np.int32)
    return Example(ids, np.arange(len(ids)) > len(prompt))

  def _conversation(self, record: ChatRecord) -> Example:
    if self._template is None:
      raise ValueError(
        f'messages need a chat template, and this {self._tokenizer.kind!r} tokenizer has none; '
        "give one by objective.template, or records of format 'completion'"
      )
    messages = quoted(record.messages, self._tokenizer)
    variables = {'tools': quoted(record.tools, self._tokenizer)} if record.tools else {}
    turns = [
      i
      for i, message in enumerate(record.messages)
      if message['role'] == ASSISTANT and i >= record.given
    ]
    if not turns:
      raise ValueError(
        f'no message of role {ASSISTANT!r} is to be learned; its roles are '
        + ', '.join(message['role'] for message in record.messages)
      )
    text, spans = self._spans(messages, turns, variables)
    encoded = self._tokenizer.encode_with_places(in_utf8(text))
    ids = np.array(encoded.ids, np.int32)
    scored = np.zeros(len(ids), bool)
    for turn, (begin, end) in spans:
      inside = (encoded.ends > begin) & (encoded.begins < end)
      scored |= self._with_end(ids, inside, turn)
    return Example(ids, scored)

  def _spans(self, messages, turns: Sequence[int], variables):
    """The rendered text, and [begin, end) in characters of each turn that is learned, behind the
    number of its message.
    """
    learned = turns[-1:] if self._last else turns
    if self._template.marks_generation:
      text, spans = self._template.render_with_spans(messages, **variables)
      every = [i for i, message in enumerate(messages) if message['role'] == ASSISTANT]
      if len(spans) != len(every):
        raise ValueError(
          f'the {{% generation %}} blocks of the chat template mark {len(spans)} parts, of '
          f'{len(every)} messages of the assistant; mend it, so that each has one'
        )
      return text, [(i, span) for i, span in zip(every, spans) if i in learned]
    text = self._template.render(messages, **variables)
    return text, [(i, self._added(messages, i, text, variables)) for i in learned]

  def _added(self, messages, turn: int, text: str, variables) -> tuple[int, int]:
    """What message `turn` adds to the text of those before it and of what opens the turn."""
    if turn == 0:
      raise ValueError(
        'the conversation begins with the assistant, whose turn nothing opens; begin with another'
      )
    before = self._template.render(messages[:turn], add_generation_prompt=True, **variables)
    behind = self._template.render(messages[: turn + 1], **variables)
    if not (text.startswith(behind) and behind.startswith(before)):
      raise ValueError(
        f'the chat template writes messages[{turn}] otherwise when more follow (it may leave '
        'thoughts out, or close the last turn in its own way), so that it does not tell which part '
        "is the assistant's; set objective.turns='last', or put {% generation %} blocks around the "
        "assistant's content and its end token"
      )
    return len(before), len(behind)

  def _with_end(self, ids: np.ndarray, inside: np.ndarray, turn: int) -> np.ndarray:
    """The tokens of a turn up to the one that ends it, which may follow a marked part."""
    places = np.flatnonzero(inside)
    if not len(places):
      raise ValueError(f'messages[{turn}], of the assistant, has no tokens: nothing to learn')
    first, last = places[0], places[-1]
    ends = np.flatnonzero(np.isin(ids[first : last + 2], self._ends))
    if not len(ends):
      shown = ', '.join(map(str, self._ends))
      raise ValueError(
        f'messages[{turn}], of the assistant, is closed by no token that ends a text (ids {shown}),'
        ' so that the model would not learn to stop; let the chat template write one behind it, or '
        "name the one that it writes in the model's generation_config.json (eos_token_id)"
      )
    chosen = np.zeros(len(ids), bool)
    chosen[first : first + ends[-1] + 1] = True
    return chosen
