"""How do records become rows to tune on? As documents do (data/prepare.py), with what is learned of
them marked; and no example is ever cut in two by packing.

  read -> render and encode -> fit into a row -> split -> pack

The result lies in the same cache, under a key of the sources' content and of what changes it.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

import files
import names
from data import cache, generation, tokenizers
from data.chat import PREPARED_DAY
from data.config import CleanConfig, DataConfig, SourceConfig
from data.conversations import TURNS, Example, ExampleWriter
from data.prepare import identity, tokenizer_identity
from data.prepared import Prepared, described, held_out_sources, kept
from data.records import LabelRecord, Record, records
from data.shards import PACKINGS, Rows, ShardWriter
from data.splits import question, share_of
from data.tokenizer import Tokenizer

FORMAT = 3  # part of every key: raise it when the code changes what a config means
TOO_LONG = ('drop', 'left', 'right')
WEIGHTINGS = ('token', 'example')
QUANTILES = {'shortest': 0, 'median': 0.5, '90%': 0.9, '99%': 0.99, 'longest': 1}


class MakesExamples(Protocol):
  """What makes examples of records."""

  def example(self, place: str, record: Record) -> Example:
    """Raises ValueError, naming the place, for a record that makes none."""


class Fitted(NamedTuple):
  """What is left of an example that has to fit into a row.

  Attributes:
    example: None where it is dropped.
    cut: which parts of it were truncated. dropped: why it is.
  """

  example: Example | None
  cut: tuple[str, ...] = ()
  dropped: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
  """What is made of records of any kind.

  Attributes:
    too_long: what becomes of an example of more than data.sequence_length tokens: 'drop', or cut
      its 'left' or its 'right' end off.
    packing: of examples into rows: where they 'fit' best, in 'order', or each 'alone'.
    weighting: what counts alike: each learned 'token', or each 'example' (a mean of means).

  Raises ValueError for names that are unknown.
  """

  too_long: str = 'drop'
  packing: str = 'fit'
  weighting: str = 'token'

  # Without annotations: facts of a kind, no settings. Which objective it is of, which formats of
  # records it takes, and by what names lengths are reported.
  tunes = ''
  formats = ()
  sides = ('tokens',)
  notes = 0  # how many its examples have

  def __post_init__(self):
    names.check('objective.too_long', self.too_long, TOO_LONG)
    names.check('objective.packing', self.packing, PACKINGS)
    names.check('objective.weighting', self.weighting, WEIGHTINGS)

  def writer(self, tokenizer: Tokenizer) -> tuple[MakesExamples, Tokenizer]:
    """What makes the examples, and the tokenizer of the run. Raises ValueError where the one that
    is given does not do for it.
    """
    raise NotImplementedError

  def facts(self, config: DataConfig) -> dict:
    """Of the settings that change examples, JSON-able: part of the key."""
    raise NotImplementedError

  def completed(self, placed: Iterator[tuple[str, Record]]) -> Iterator[tuple[str, Any]]:
    """The records of a source, with what they take of one another."""
    return placed

  def identity(self, example: Example) -> bytes:
    """What two examples have in common that are one."""
    notes = np.array(example.notes, np.float64)
    return example.ids.tobytes() + example.scored.tobytes() + notes.tobytes()

  def question(self, record: Any) -> bytes:
    """What a record asks: those that ask the same are on the same side."""
    return question(record)

  def lengths(self, example: Example) -> tuple[int, ...]:
    """Of each of `sides`."""
    return (len(example.ids),)

  def fitted(self, example: Example, config: DataConfig, reserved: int = 0) -> Fitted:
    """The example as it fits into a row; reserved: tokens that will stand in front of its ids."""
    raise NotImplementedError

  def rows_of(self, config: DataConfig, tokenizer: Tokenizer) -> Rows:
    """How examples fill rows."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences(Packed):
  """What is made of records of which a decoder, or an encoder, learns a part of one sequence."""

  def fitted(self, example, config, reserved=0):
    most = config.sequence_length + 1 - reserved  # the last token is a target only
    if len(example.ids) <= most:
      return Fitted(example)
    if self.too_long == 'drop':
      return Fitted(None, dropped='too_long')
    keep = slice(-most, None) if self.too_long == 'left' else slice(most)
    example = Example(example.ids[keep], example.scored[keep])
    if not example.scored[1:].any():
      return Fitted(None, self.sides, 'nothing_learned_when_truncated')
    return Fitted(example, self.sides)

  def rows_of(self, config, tokenizer):
    del tokenizer
    return Rows(config.sequence_length, self.packing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Sequences):
  """What is made of conversations and completions.

  Attributes:
    template: file of the chat template, for a tokenizer that has none; it becomes the run's.
    turns: of the assistant that are learned: 'all' or the 'last' of each conversation.

  Raises ValueError for names that are unknown.
  """

  template: str = ''
  turns: str = 'all'
  tunes = 'sft'
  formats = ('chat', 'sharegpt', 'alpaca', 'completion')

  def __post_init__(self):
    super().__post_init__()
    names.check('objective.turns', self.turns, TURNS)

  def writer(self, tokenizer):
    template = self._template()
    writer = ExampleWriter(tokenizer, template, self.turns)
    return writer, tokenizer.with_template(template) if template else tokenizer

  def _template(self) -> str:
    return pathlib.Path(self.template).expanduser().read_text() if self.template else ''

  def facts(self, config):
    return {
      'template': self._template(),
      'turns': self.turns,
      'too_long': [self.too_long, config.sequence_length],
    }


def prepare(
  config: DataConfig,
  settings: Packed,
  log: Callable[[str], object] = print,
  prompt: Sequence[int] = (),
) -> Prepared:
  """Prepares the records of a config's sources, or loads them if that was done before.

  prompt: ids, of no token, that stand before every example and are not learned (model.soft).
  Raises:
    ValueError: sources that are no records; cleaning that would not be done; a tokenizer that
      would have to be trained; a record that is none, naming its place; nothing to train on, or
      nothing held out.
    cache.CorruptShardError, FileNotFoundError: as data.prepare.prepare.
  """
  _check(config, settings)
  tokenizer = tokenizers.build(config.tokenizer, (), ())
  if config.tokenizer.path:
    # A chat model may end a turn with another token than a document.
    tokenizer.generation = generation.beside(config.tokenizer.path)
  writer, tokenizer = settings.writer(tokenizer)
  prompt = np.array(prompt, np.int32)
  build = functools.partial(_build, settings, tokenizer, writer, prompt)
  key = _key(config, settings, generation.ends(tokenizer), prompt)
  prepared = kept(config, key, build, log, settings.rows_of(config, tokenizer))
  for line in _described(prepared.report, settings):
    log(line)
  alike = settings.weighting == 'example'
  return dataclasses.replace(
    prepared,
    key=f'{prepared.key}-{settings.weighting}',
    train=tuple(dataclasses.replace(source, alike=alike) for source in prepared.train),
    validation=dataclasses.replace(prepared.validation, alike=alike),
  )


def _check(config: DataConfig, settings: Packed) -> None:
  """Raises ValueError for what a config says of documents, and would not be done to records."""
  for field, of in (('sources', config.sources), ('validation', config.validation)):
    for i, source in enumerate(of):
      if not source.format:
        raise ValueError(
          f'data.{field}[{i}] (kind={source.kind!r}, path={source.path!r}) has no format, and '
          f'objective.kind={settings.tunes!r} tunes on records: say which fields its rows have, as '
          f'in --config.data.{field}[{i}].format={settings.formats[0]}, or use '
          'objective.kind=next_token for documents'
        )
      if source.format not in settings.formats:
        raise ValueError(
          f'data.{field}[{i}].format={source.format!r} is not of the records that '
          f'objective.kind={settings.tunes!r} tunes on: {", ".join(settings.formats)}; name the '
          f'columns of one of these by data.{field}[{i}].columns, or use another objective'
        )
  unread = CleanConfig(anonymise=(), near_duplicates=0)
  for field in dataclasses.fields(CleanConfig):
    given = getattr(config.clean, field.name)
    if field.name != 'exact_duplicates' and given != getattr(unread, field.name):
      raise ValueError(
        f'data.clean.{field.name}={given!r} is done to documents and not to records; set it to '
        f'{getattr(unread, field.name)!r} and clean the file before, as far as it needs it'
      )
  if config.split != 'hash' and not config.validation:
    raise ValueError(
      f"data.split={config.split!r} would cut a record in two; use 'hash', or data.validation"
    )
  if config.tokenizer.trained or config.tokenizer.kind == 'char' and not config.tokenizer.path:
    raise ValueError(
      f'data.tokenizer.kind={config.tokenizer.kind!r} without a path would be made of the records; '
      "tune a model (config.init) with its own tokenizer, or use kind='byte'"
    )


def _key(config: DataConfig, settings: Packed, ends: Sequence[int], prompt: np.ndarray) -> str:
  memo = files.kept(config.cache_dir) / 'sources.json'
  content = {
    'records': FORMAT,
    'sources': _identity(config.sources, memo),
    'validation': _identity(config.validation, memo),
    'tokenizer': tokenizer_identity(config.tokenizer, memo),
    'day': str(PREPARED_DAY),
    'ends': [*ends],
    **settings.facts(config),
    'exact_duplicates': config.clean.exact_duplicates,
    'validation_fraction': config.validation_fraction,
    **({'prompt': prompt.tolist()} if len(prompt) else {}),
  }
  if len(held_out_sources(config)) > 1:
    content['held_out'] = 'apart'
  return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()


def _identity(of, memo):
  return [
    [*entry, source.format, *source.columns]
    for source, entry in zip(of, identity(of, memo), strict=True)
  ]


def _build(
  settings: Packed,
  tokenizer: Tokenizer,
  writer: MakesExamples,
  prompt: np.ndarray,
  config: DataConfig,
  directory: pathlib.Path,
  log: Callable[[str], object],
) -> None:
  """Writes the shards of all sources."""
  began = time.perf_counter()
  tokenizer.save(directory / 'tokenizer')
  seen: set[bytes] = set()
  ids = max([tokenizer.vocabulary, *(prompt + 1)])  # below it are all that are written
  examples = functools.partial(_examples, config, settings, writer, prompt)
  held_out = collections.Counter(documents=0, tokens=0, scored=0)
  report = {'sources': [], 'validation_sources': [], 'validation': held_out}
  shards = functools.partial(
    ShardWriter, directory, vocabulary=ids, scored=True, notes=settings.notes
  )
  with shards('validation') as validation:

    def add(shard: ShardWriter, counts: collections.Counter, example: Example) -> None:
      counts.update(documents=1, tokens=len(example.ids), scored=int(example.scored[1:].sum()))
      shard.add(example.ids, example.scored, example.notes)

    for i, source in enumerate(config.sources):
      trained = collections.Counter(documents=0, tokens=0, scored=0)
      counts, before = _counts(source) | {'train': trained}, len(validation.shards)
      with shards(f'train-{i}') as train:
        for share, example in examples(source, seen, counts):
          apart = share < config.validation_fraction
          add(*((validation, held_out) if apart else (train, trained)), example)
      trained['shards'] = train.shards
      validation.end_shard()
      counts['held_out_shards'] = len(validation.shards) - before
      report['sources'].append(counts)
      if not trained['documents']:
        raise ValueError(
          f'nothing is left to train on of {source.path!r}: {_counted(counts)}; see '
          'objective.too_long, data.sequence_length and data.validation_fraction'
        )
    for source in config.validation:
      counts, before = _counts(source), len(validation.shards)
      for _, example in examples(source, seen, counts):
        add(validation, held_out, example)
      validation.end_shard()
      counts['held_out_shards'] = len(validation.shards) - before
      report['validation_sources'].append(counts)
  held_out['shards'] = validation.shards
  if not held_out['documents']:
    kept = sum(counts['train']['documents'] for counts in report['sources'])
    raise ValueError(
      f'nothing is held out: none of {kept} records that were kept falls into data.'
      f'validation_fraction={config.validation_fraction} ('
      f'{"; ".join(map(_counted, report["sources"]))}); raise it, or name a file by data.validation'
    )
  for counts in report['sources'] + report['validation_sources']:
    each = np.array(counts.pop('lengths') or [[0] * len(settings.sides)])
    quantiles = {side: _quantiles(each[:, i]) for i, side in enumerate(settings.sides)}
    counts['lengths'] = quantiles if len(quantiles) > 1 else quantiles.popitem()[1]
  # Records have no text of their own that compressors could be compared on.
  (directory / 'validation.text').write_bytes(b'')
  np.save(directory / 'validation.text.npy', np.zeros(1, np.int64))
  held_out['bytes'] = 0
  report['seconds'] = {'examples': time.perf_counter() - began}

  written = ['validation.text', 'validation.text.npy']
  written += [f'tokenizer/{path.name}' for path in sorted((directory / 'tokenizer').iterdir())]
  splits = [counts['train'] for counts in report['sources']] + [held_out]
  entries = [file for split in splits for shard in split['shards'] for file in shard['files']]
  entries += [cache.record(directory, name) for name in written]
  cache.write_index(directory, entries, report)


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
  return {name: int(np.quantile(lengths, q, method='nearest')) for name, q in QUANTILES.items()}


def _counts(source: SourceConfig) -> dict:
  return {
    'source': described(source),
    'read': 0,
    'dropped': collections.Counter(),
    'truncated': 0,
    'cut': collections.Counter(),
    'lengths': [],
  }


def _examples(
  config: DataConfig,
  settings: Packed,
  writer: MakesExamples,
  prompt: np.ndarray,
  source: SourceConfig,
  seen: set[bytes],
  counts: dict,
) -> Iterator[tuple[float, Example]]:
  """The examples of one source that fit into a row behind the prompt, which they begin with; each
  behind its `share_of`; updates `counts` on the way.
  """
  for place, record in settings.completed(records(source)):
    counts['read'] += 1
    example = writer.example(place, record)
    asked = settings.question(record)
    # Two records of one text with a label are one, whatever that says.
    content = asked if isinstance(record, LabelRecord) else settings.identity(example)
    digest = hashlib.blake2b(content, digest_size=16).digest()
    if config.clean.exact_duplicates and digest in seen:
      counts['dropped']['exact_duplicate'] += 1
      continue
    seen.add(digest)
    first, *others = settings.lengths(example)
    counts['lengths'].append((len(prompt) + first, *others))
    example, cut, dropped = settings.fitted(example, config, len(prompt))
    counts['truncated'] += bool(cut)
    counts['cut'].update(cut)
    if example is None:
      counts['dropped'][dropped] += 1
      continue
    yield share_of(asked), _behind(prompt, example)


def _behind(prompt: np.ndarray, example: Example) -> Example:
  """The example with a prompt before it, of which nothing is learned."""
  if not len(prompt):
    return example
  ids = np.concatenate([prompt, example.ids])
  return Example(ids, np.concatenate([np.zeros(len(prompt), bool), example.scored]))


def _described(report: dict, settings: Packed) -> Iterator[str]:
  several = len(settings.sides) > 1
  for counts in report['sources'] + report['validation_sources']:
    of = counts['source']
    place = f'{of["kind"]} {of["path"]} as {of["format"]!r}'
    lengths = counts['lengths'] if several else {settings.sides[0]: counts['lengths']}
    shown = '; '.join(
      f'{side}: ' + ', '.join(f'{name} {length:,}' for name, length in quantiles.items())
      for side, quantiles in lengths.items()
    )
    cut = ', '.join(f'{side} {n:,}' for side, n in counts['cut'].items())
    yield f'data: {place}: {_counted(counts)}{f" ({cut})" if several and cut else ""}; {shown}'
  trained = [counts['train'] for counts in report['sources']]
  tokens, scored, examples = (
    sum(split[unit] for split in trained) for unit in ('tokens', 'scored', 'documents')
  )
  packing = report['packing']['train']
  rows = sum(split['rows'] for split in packing)
  yield (
    f'data: {examples:,} examples of {tokens:,} tokens in {rows:,} rows, of which {scored:,} '
    f'({scored / tokens:.1%}) are learned; {report["validation"]["documents"]:,} examples held out'
  )


def _counted(counts: dict) -> str:
  dropped = ', '.join(f'{n:,} {name}' for name, n in counts['dropped'].items()) or 'none'
  return f'{counts["read"]:,} records; dropped: {dropped}; truncated: {counts["truncated"]:,}'
