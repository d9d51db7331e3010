"""What does a text to be classified become, and which words stand for its labels? One definition, a
file, for every way to ask: without examples, with some, and of a model that was tuned by it.

A decoder goes on from the pattern with a word, an encoder finds it in the place of [MASK], and an
encoder-decoder reads the pattern and answers with it.
"""

import dataclasses
import functools
import pathlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

import files
import names
from data.encoding import encoded_behind
from data.extra import extended, id_of
from data.records import LabelRecord
from data.tokenizer import Tokenizer, in_utf8

ROOT = pathlib.Path(__file__).resolve().parents[1]
MASK = '[MASK]'  # in a pattern: where the word is
SPELLED = '<mask>'  # the name of that id in a tokenizer that names none
# How a model is asked: by what it is.
PREFIX, CLOZE, TARGET = 'prefix', 'cloze', 'target'
NORMALISATIONS = ('sum', 'token', 'character')


@dataclasses.dataclass(frozen=True)
class Template:
  """A pattern and the words of its labels.

  Attributes:
    pattern: Jinja text of `text`, the record's; perhaps with [MASK], where the word is, which
      otherwise is at the end. White space before it belongs to the word of a decoder.
    words: the words of every label: (label, (word, ..)), in the order of the file.
    normalise: a word's score is the 'sum' of its tokens' log-probabilities, that divided by how
      many 'token's these are, or by the 'character's of the word.
    ending: text behind a word, a part of it: it tells a word from one that goes on.
    between: text between examples that are shown, and before the question.

  Raises ValueError for what is no template.
  """

  pattern: str
  words: tuple[tuple[str, tuple[str, ...]], ...]
  normalise: str = 'sum'
  ending: str = ''
  between: str = '\n\n'

  def __post_init__(self):
    names.check('normalise', self.normalise, NORMALISATIONS)
    for name in ('ending', 'between'):
      if not isinstance(value := getattr(self, name), str):
        raise ValueError(f'{name}={value!r} must be a text, as in {name} = "\\n"')
    if self.pattern.count(MASK) > 1:
      raise ValueError(f'the pattern has {MASK} {self.pattern.count(MASK)} times; give it once')
    if not re.search(r'\btext\b', self.pattern):
      raise ValueError(
        f'the pattern {self.pattern!r} is the same for every record: put {{{{ text }}}} into it'
      )
    if len(self.words) < 2:
      raise ValueError(f'words are of {len(self.words)} labels; a choice is between two and more')
    for label, words in self.words:
      if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(
          f'words of label {label!r}: {list(words)} must be texts, at least one, none of them empty'
        )
    self.asked('')  # a template that fails does so now

  @classmethod
  def read(cls, path: str) -> 'Template':
    """From a file, TOML or JSON by its name, of this repository where none is below the working
    directory. Raises ValueError naming it, FileNotFoundError.
    """
    place = pathlib.Path(path).expanduser()
    content = (
      place if place.exists() or not (ROOT / place).exists() else ROOT / place
    ).read_bytes()
    try:
      if path.endswith('.json'):
        values = files.json_object(content, path)
      else:
        values = tomllib.loads(content.decode())
      return cls.of(values)
    except (ValueError, UnicodeDecodeError) as error:
      said = str(error)
      raise ValueError(said if said.startswith(path) else f'{path}: {said}') from error

  @classmethod
  def of(cls, values: Mapping) -> 'Template':
    """From what a file holds."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
      names.check('a field of a template', name, known)
    if not isinstance(values.get('pattern'), str) or not isinstance(values.get('words'), Mapping):
      raise ValueError(
        'a template has a pattern, as in pattern = "{{ text }} It was [MASK].", and a table of '
        'words, as in [words] and positive = ["great", "good"]'
      )
    # What is no list is told with its label, as a list of one that is no text.
    words = tuple(
      (label, tuple(given if isinstance(given, (list, tuple)) else [given]))
      for label, given in values['words'].items()
    )
    return cls(**{**values, 'words': words})

  def values(self) -> dict:
    """What `of` reads, JSON-able."""
    words = {label: [*words] for label, words in self.words}
    return dataclasses.asdict(self) | {'words': words}

  @property
  def labels(self) -> tuple[str, ...]:
    """In the order of the file."""
    return tuple(label for label, _ in self.words)

  def number(self, place: str, record: LabelRecord) -> int:
    """Of the record's label, from 0. Raises ValueError for one that the template does not have."""
    try:
      return self.labels.index(names.check('label', record.label, self.labels))
    except ValueError as error:
      raise ValueError(f'{place}: {error}; give it words in the template, or mend it') from error

  @functools.cached_property
  def _sides(self):
    """Templates of the text before a word, without white space at its end, and behind it; and that
    white space.
    """
    before, _, behind = self.pattern.partition(MASK)
    stripped = before.rstrip()
    sides = (compiled(side, 'the pattern') for side in (stripped, behind))
    return *sides, before[len(stripped) :]

  @property
  def space(self) -> str:
    """Between the text before a word, and the word."""
    return self._sides[2]

  @property
  def ends_with_word(self) -> bool:
    """Whether no text comes behind the word."""
    return not self.pattern.partition(MASK)[2].strip()

  def asked(self, text: str, shots: Sequence[LabelRecord] = ()) -> tuple[str, str]:
    """The text before the word and behind it, for one that is to be classified; shots: examples,
    which stand before it with the first word of their label.
    """
    shown = []
    for shot in shots:
      before, behind = self._rendered(shot.text)
      shown.append(f'{before}{self.space}{dict(self.words)[shot.label][0]}{self.ending}{behind}')
    before, behind = self._rendered(text)
    return self.between.join([*shown, before]), behind

  def _rendered(self, text: str) -> tuple[str, str]:
    before, behind, _ = self._sides
    return _render(before, text), _render(behind, text)


class Word(NamedTuple):
  """A word as a model meets it: ids, of which label, how many characters."""

  ids: tuple[int, ...]
  label: int
  characters: int


class Asking:
  """A template for one tokenizer and one kind of model.

  Attributes:
    template, tokenizer, form: as they were given.
    words: of all labels, in order.
    mask: the id of [MASK], of an encoder; None otherwise.

  Raises ValueError where the words cannot be told apart so, or do not fit the pattern.
  """

  def __init__(self, template: Template, tokenizer: Tokenizer, form: str):
    self.template, self.tokenizer = template, tokenizer
    self.form = names.check('form', form, (PREFIX, CLOZE, TARGET))
    self.mask = None
    if form == CLOZE:
      self.mask = id_of(tokenizer, _mask_name(tokenizer))
    self._check_pattern()
    self.words = [
      Word(tuple(self._spelled(word)), label, len(word))
      for label, (_, words) in enumerate(template.words)
      for word in words
    ]
    self._check_words()

  def _check_pattern(self):
    if self.form == CLOZE and (self.mask is None or MASK not in self.template.pattern):
      missing = f'the pattern has no {MASK}'
      if self.mask is None:
        missing = f'the {self.tokenizer.kind!r} tokenizer has no mask'
      raise ValueError(
        f'an encoder finds a word in the place of {MASK}, and {missing}; write the pattern with '
        f'one, as in "{{{{ text }}}} It was {MASK}.", for a model that was trained with masks'
      )
    if self.form != CLOZE and not self.template.ends_with_word:
      raise ValueError(
        f'the pattern goes on behind {MASK}, and this model writes from left to right, so that it '
        f'would not be read; put {MASK} at the end, as in "{{{{ text }}}}\\nIt was {MASK}"'
      )

  def _spelled(self, word: str) -> list[int]:
    """Ids of a word; of an answer with the end of text, which tells it from one that goes on."""
    template = self.template
    if self.form == TARGET:
      return [*self.tokenizer.encode(in_utf8(word + template.ending)), self.tokenizer.eos]
    text = in_utf8(template.space + word + (template.ending if self.form == PREFIX else ''))
    begins = not template.pattern.partition(MASK)[0].strip()
    return self.tokenizer.encode(text) if begins else encoded_behind(self.tokenizer, text)

  def _check_words(self):
    """Raises ValueError for words that are nothing, several tokens under one mask, or the beginning
    of others.
    """
    spelled = [word for _, words in self.template.words for word in words]
    for word, text in zip(self.words, spelled, strict=True):
      label = self.template.labels[word.label]
      if not word.ids:
        raise ValueError(f'the word {text!r} of label {label!r} becomes no token; give another')
      if self.form == CLOZE and len(word.ids) > 1:
        parts = [self.tokenizer.decode([i]) for i in word.ids]
        raise ValueError(
          f'the word {text!r} of label {label!r} is {len(word.ids)} tokens, {parts}, and one '
          f'{MASK} is one; give a word that is one token, or use a decoder'
        )
    for i, word in enumerate(self.words):
      for j, other in enumerate(self.words):
        if i != j and other.ids[: len(word.ids)] == word.ids:
          raise ValueError(
            f'the word {spelled[i]!r} of label {self.template.labels[word.label]!r} is the '
            f'beginning of {spelled[j]!r} of label {self.template.labels[other.label]!r}, so that '
            'it would always be the likelier one; give other words, or an ending, as in '
            'ending = "\\n"'
          )

  def ids(self, text: str, shots: Sequence[LabelRecord] = ()) -> tuple[int, ...]:
    """What the model reads for a text."""
    before, behind = self.template.asked(text, shots)
    left = self.tokenizer.encode(in_utf8(before))
    if self.form == PREFIX:
      return (self.tokenizer.bos, *left)
    if self.form == TARGET:
      return (*left, self.tokenizer.eos)
    right = self.tokenizer.encode(in_utf8(behind))
    return (self.tokenizer.bos, *left, self.mask, *right, self.tokenizer.eos)

  def fitted(self, ids: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """At most so many of what is read: a decoder's last ones, behind the one that begins a text.

    Raises ValueError for a row of another model that is too long.
    """
    if len(ids) <= limit:
      return ids
    if self.form != PREFIX:
      raise ValueError(
        f'{len(ids)} tokens pass the {limit} that the model reads, and a text is not cut around '
        'its question; shorten it, or show fewer examples'
      )
    return (ids[0], *ids[len(ids) - limit + 1 :])

  def label_scores(self, sums: np.ndarray) -> np.ndarray:
    """Scores of labels [n, labels], f64, of log-probabilities of words [n, words]: the logarithm of
    the sum of the probabilities of a label's words, each normalised as the template says.
    """
    sizes = {
      'sum': [1 for _ in self.words],
      'token': [len(word.ids) for word in self.words],
      'character': [word.characters for word in self.words],
    }[self.template.normalise]
    scores = np.asarray(sums, np.float64) / np.array(sizes)[None]
    of = np.array([word.label for word in self.words])
    columns = [
      np.logaddexp.reduce(scores[:, of == label], 1) for label in range(len(self.template.labels))
    ]
    return np.stack(columns, 1)


def form_of(causal: bool, encoder_layers: int) -> str:
  """How a model of these fields of its config is asked."""
  if encoder_layers:
    return TARGET
  return PREFIX if causal else CLOZE


def with_mask(tokenizer: Tokenizer) -> Tokenizer:
  """The same, with an id for a mask behind its own where it has none."""
  name = _mask_name(tokenizer)
  return tokenizer if id_of(tokenizer, name) is not None else extended(tokenizer, [name])


def mask_of(tokenizer: Tokenizer) -> int:
  """The id of its mask. Raises ValueError where it has none."""
  mask = id_of(tokenizer, _mask_name(tokenizer))
  if mask is None:
    raise ValueError(
      f'the {tokenizer.kind!r} tokenizer has no mask, by which an encoder is asked; take a model '
      'that was trained with masks'
    )
  return mask


def _mask_name(tokenizer: Tokenizer) -> str:
  return tokenizer.special_tokens.get('mask_token', SPELLED)


def compiled(source: str, name: str):
  """Jinja text, in a sandbox, where a name that is not there is an error; `name`: what it is.

  Raises ValueError for what is none.
  """
  import jinja2
  import jinja2.sandbox

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
  )
  try:
    return environment.from_string(source)
  except jinja2.TemplateError as error:
    raise ValueError(f'{name}, at {source!r}: {error}') from error


def _render(template, text: str) -> str:
  try:
    return template.render(text=text)
  except Exception as error:  # a template can fail in any way that a program can
    raise ValueError(
      f'the pattern failed on {text[:60]!r}: {type(error).__name__}: {error}'
    ) from error
