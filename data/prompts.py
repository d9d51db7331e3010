"""Which prompts is a policy to answer, in which order, and what does a judge of its answers get to
see of each? Records of format 'prompt', read anew at every start: they are few, and short.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data import generation, tokenizers
from data.chat import PREPARED_DAY, ChatTemplate, quoted
from data.config import CleanConfig, DataConfig, SourceConfig
from data.records import PromptRecord, Row, records
from data.splits import question, share_of
from data.tokenizer import Tokenizer, in_utf8


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Attributes:
  place: 'file:line', for messages. ids: what the policy goes on from. text: the same, as it reads.
  row: all that the record says.
  """

  place: str
  ids: tuple[int, ...]
  text: str
  row: Row


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Prompts to train on, and those that are held out.

  Attributes:
    key: of all that decides about them. tokenizer: of the run. rows: how many answers an epoch
      has to learn from, each as often as it is learned from.
  """

  key: str
  tokenizer: Tokenizer
  train: tuple[Prompt, ...]
  validation: tuple[Prompt, ...]
  rows: int

  document_length = None  # of answers that are not written yet

  def validation_documents(self) -> Iterator[str]:
    """None: there are no texts to compress."""
    return iter(())

  def order(self, seed: int, index: int) -> Prompt:
    """Prompt number `index` of an endless sequence, in each epoch of which all come once, in an
    order of its own.
    """
    epoch, place = divmod(index, len(self.train))
    return self.train[_order(len(self.train), seed, epoch)[place]]


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(count)


class PromptWriter:
  """Makes prompts of records, for one tokenizer and one template.

  Args:
    template: Jinja text; '' is the tokenizer's own.
    encoder: whether it is an encoder that reads them, to an end, as sources do; a decoder reads a
      beginning, and goes on.
    prefix: text that stands in front of each.
  Raises ValueError for a template that differs from the tokenizer's own.
  """

  def __init__(
    self, tokenizer: Tokenizer, template: str = '', encoder: bool = False, prefix: str = ''
  ):
    self._tokenizer, self._encoder, self._prefix = tokenizer, encoder, prefix
    known = tokenizer.chat_templates.get('default', '')
    if template and known and template.strip() != known.strip():
      raise ValueError(
        'the chat template that is given differs from the one of the tokenizer, by which the model '
        'was trained; leave it out, or take it out of the tokenizer'
      )
    self._template = None
    if template or known:
      self._template = ChatTemplate(template or known, tokenizer.special_tokens, PREPARED_DAY)

  def prompt(self, place: str, record: PromptRecord) -> Prompt:
    """Raises ValueError, naming the place, for what has no ids, and for messages that cannot be
    rendered.
    """
    try:
      if isinstance(record.prompt, str):
        text = in_utf8(self._prefix + record.prompt)
        begin = [] if self._encoder else [self._tokenizer.bos]
        ids = [*begin, *self._tokenizer.encode(text)]
      else:
        text = in_utf8(self._prefix + self._rendered(record))
        ids = self._tokenizer.encode(text, special=True)
    except ValueError as error:
      raise ValueError(f'{place}: {error}') from error
    end = [self._tokenizer.eos] if self._encoder else []
    return Prompt(place, tuple(map(int, [*ids, *end])), text, record.row)

  def _rendered(self, record: PromptRecord) -> str:
    if self._template is None:
      raise ValueError(
        f'messages need a chat template, and this {self._tokenizer.kind!r} tokenizer has none; '
        'give one by objective.template, or prompts that are texts'
      )
    messages = quoted(record.prompt, self._tokenizer)
    variables = {'tools': quoted(record.tools, self._tokenizer)} if record.tools else {}
    return self._template.render(messages, add_generation_prompt=True, **variables)


def prepare(
  config: DataConfig,
  template: str,
  longest: int,
  uses: int,
  log: Callable[[str], Any],
  writer_of: Callable[[Tokenizer, str], PromptWriter] = PromptWriter,
) -> Prompts:
  """The prompts of a config's sources.

  Args:
    template: file of the chat template; '' is the tokenizer's own.
    longest: tokens of a prompt at most; longer ones are dropped, and counted.
    uses: how many rows of batches each prompt makes up in an epoch.
    writer_of: (tokenizer, Jinja text) -> what makes prompts of records.
  Raises ValueError for sources that are no prompts; what would not be done to prompts; a tokenizer
    that would have to be trained; a record that is none, naming its place; nothing to train on, or
    nothing held out.
  """
  _check(config)
  tokenizer = tokenizers.build(config.tokenizer, (), ())
  if config.tokenizer.path:
    # A chat model may end a turn with another token than a document.
    tokenizer.generation = generation.beside(config.tokenizer.path)
  source = pathlib.Path(template).expanduser().read_text() if template else ''
  writer = writer_of(tokenizer, source)
  tokenizer = tokenizer.with_template(source) if source else tokenizer
  seen: set[bytes] = set()
  counts = {'read': 0, 'exact_duplicate': 0, 'too_long': 0}

  def fresh(sources: Iterable[SourceConfig]) -> Iterator[tuple[float, Prompt]]:
    for of in sources:
      for place, record in records(of):
        counts['read'] += 1
        digest = hashlib.blake2b(_identity(record.row), digest_size=16).digest()
        if config.clean.exact_duplicates and digest in seen:
          counts['exact_duplicate'] += 1
          continue
        seen.add(digest)
        prompt = writer.prompt(place, record)
        if len(prompt.ids) > longest:
          counts['too_long'] += 1
          continue
        yield share_of(question(record)), prompt

  train, held_out = [], []
  for part, prompt in fresh(config.sources):
    (held_out if part < config.validation_fraction else train).append(prompt)
  held_out += [prompt for _, prompt in fresh(config.validation)]
  dropped = ', '.join(f'{n:,} {name}' for name, n in counts.items() if name != 'read' and n)
  log(
    f'data: {counts["read"]:,} prompts read; dropped: {dropped or "none"}; {len(train):,} to train '
    f'on, {len(held_out):,} held out; at most {longest} tokens each'
  )
  if not train or not held_out:
    raise ValueError(
      f'{len(train)} prompts are to train on and {len(held_out)} held out, of {counts["read"]} '
      f'({dropped or "none dropped"}); change data.validation_fraction='
      f'{config.validation_fraction}, name files by data.validation, or raise data.sequence_length '
      'less objective.max_new_tokens'
    )
  key = _key(train, held_out, generation.ends(tokenizer))
  return Prompts(key, tokenizer, tuple(train), tuple(held_out), len(train) * uses)


def _identity(row: Row) -> bytes:
  return json.dumps(row, sort_keys=True, default=str).encode('utf-8', 'surrogatepass')


def _key(train: list[Prompt], held_out: list[Prompt], ends: Sequence[int]) -> str:
  digest = hashlib.blake2b(json.dumps([*ends]).encode(), digest_size=12)
  for prompts in (train, held_out):
    for prompt in prompts:
      digest.update(np.array(prompt.ids, np.int64).tobytes() + _identity(prompt.row))
    digest.update(b'|')
  return digest.hexdigest()


def _check(config: DataConfig) -> None:
  """Raises ValueError for what a config says of documents, and would not be done to prompts."""
  for field, of in (('sources', config.sources), ('validation', config.validation)):
    for i, source in enumerate(of):
      if source.format != 'prompt':
        raise ValueError(
          f'data.{field}[{i}].format={source.format!r} has no prompts to answer: say '
          f'--config.data.{field}[{i}].format=prompt, and name the column of its prompts by '
          f'data.{field}[{i}].columns where it is another'
        )
      if source.weight != 1:
        raise ValueError(
          f'data.{field}[{i}].weight={source.weight}: prompts of all sources count alike; leave it '
          '1, and repeat or cut a file'
        )
  if config.seed:
    raise ValueError(
      f'data.seed={config.seed}: prompts come in an order of train.seed, by which answers are '
      'drawn, too; set that one, and leave data.seed 0 (a run that began with another goes on as '
      'it did with that and --allow_config_change)'
    )
  if config.split != 'hash' and not config.validation:
    raise ValueError(
      f"data.split={config.split!r} is of documents in their order; of prompts use 'hash', or "
      'data.validation'
    )
  unread = CleanConfig(anonymise=(), near_duplicates=0)
  for field in dataclasses.fields(CleanConfig):
    given = getattr(config.clean, field.name)
    if field.name != 'exact_duplicates' and given != getattr(unread, field.name):
      raise ValueError(
        f'data.clean.{field.name}={given!r} is done to documents and not to prompts; set it to '
        f'{getattr(unread, field.name)!r}'
      )
  if config.tokenizer.trained or config.tokenizer.kind == 'char' and not config.tokenizer.path:
    raise ValueError(
      f'data.tokenizer.kind={config.tokenizer.kind!r} without a path would be made of the prompts; '
      "train a policy (config.init) with its own tokenizer, or use kind='byte'"
    )
