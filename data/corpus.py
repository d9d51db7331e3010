"""How is a corpus prepared by many workers, to the very bytes that data/prepare.py writes alone?

  clean -> exact -> bands -> near -> clusters -> keep -> look -> sample -> tokenizer
    -> encode -> shard

The stages are pure functions of parts (data/stages.py); an engine does them, here or on a cluster
(data/engine.py), and this process only adds up their reports. Documents are in the order of
sources, files and lines, whoever read them and when; which of several alike is kept and where a
shard ends follow from that order, and what a tokenizer is trained on from hashes, so that the
workers' number, their deaths and what was done before change nothing. What a stage leaves lies in
cache_dir/<key>.work, from where the same command goes on; all machines must see that directory, and
the sources, under the same paths.
"""

import collections
import dataclasses
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

import files
from data import cache, content, duplicates, prepare, shards, sources, tokenizers
from data.config import DataConfig, SourceConfig
from data.engine import CorpusTask, TaskEngine, run
from data.partitions import NUMBERS, Partition, Workspace, partitions
from data.prepared import conclude_plans
from data.stages_encode import SIDES

PLAN = 'plan.json'
BUCKET = 2**21  # documents that a worker compares at a time
MOST_POISONED = 0.01  # share of documents; of few, FEW
FEW = 10
SHOWN = 5  # quarantined documents, in a message
QUARANTINE = 'quarantine.jsonl'


def build(
  config: DataConfig, directory: pathlib.Path, log: Callable[[str], object], engine: TaskEngine
) -> None:
  """Writes what data.prepare writes, and the rows of config.sequence_length beside it.

  Raises:
    ValueError, FileNotFoundError: as data.prepare.prepare; and where too many documents are
      poisoned, workers are lost, or see other files.
  """
  if config.clean.word_list:  # what is wrong with them is not the documents' fault
    content.listed(config.clean.word_list)
  if config.clean.classifier:
    content.classifier(config.clean.classifier)
  key = directory.name.partition('.partial-')[0]
  work = directory.with_name(f'{key}.work').absolute()
  parts = _begun(config, work, log)
  _Corpus(config, work, parts, engine, log).build(directory)
  shutil.rmtree(work)


def _begun(config: DataConfig, path: pathlib.Path, log: Callable[[str], object]) -> list[Partition]:
  """The parts of a corpus; what was done for others is removed."""
  parts = partitions((*config.sources, *config.validation))
  plan = files.digest([prepare.FORMAT, [dataclasses.asdict(part) for part in parts]])
  place = path / PLAN
  if path.exists() and (not place.is_file() or place.read_text() != plan):
    log(f'data: removed {path}, which was begun of other files, or by another version')
    shutil.rmtree(path)
  if path.exists():
    log(f'data: going on from what is done in {path}')
    for left in path.glob('*/*.tmp'):
      shutil.rmtree(left, ignore_errors=True)
  files.replace(place, plan)
  return parts


class _Corpus:
  """A corpus in the making: its stages in order."""

  def __init__(
    self,
    config: DataConfig,
    path: pathlib.Path,
    parts: Sequence[Partition],
    engine: TaskEngine,
    log: Callable[[str], object],
  ):
    self._config, self._parts, self._engine, self._log = config, parts, engine, log
    self._work = Workspace(path)
    self._sources = (*config.sources, *config.validation)
    self._seconds: dict[str, float] = {}

  def build(self, directory: pathlib.Path) -> None:
    cleaned = self._clean()
    exact, near = self._duplicates(cleaned)
    kept = self._keep(exact, near)
    report = {'sources': self._counts(cleaned, kept, near)}
    for counts in report['sources']:
      self._log(prepare.described_counts(counts))
    sides = self._sides(kept)
    self._tokenizer(kept, sides)
    encoded = self._each('encode', lambda i: (i, sides[i]), module='data.stages_encode')
    written = self._shards(directory, encoded, report)
    written += self._quarantine(directory, cleaned)
    prepare.write_index(self._config, directory, written, report)

  def _run(
    self,
    stage: str,
    arguments: Sequence[tuple],
    weights: Sequence[float],
    module: str,
    place: str = '',
  ) -> list[dict]:
    began = time.perf_counter()
    tasks = [
      CorpusTask(f'{module}.{stage}', str(self._work.of(place or stage, i)), each, weight)
      for i, (each, weight) in enumerate(zip(arguments, weights, strict=True))
    ]
    reports = run(self._engine, stage, tasks, self._log)
    for task in tasks:
      if not pathlib.Path(task.place, cache.INDEX).is_file():
        raise ValueError(
          f'{task.place} was made on another machine, and is not here: data.cache_dir='
          f'{self._config.cache_dir!r} must be a directory that all machines share'
        )
    self._seconds[stage] = time.perf_counter() - began
    return reports

  def _each(
    self, stage: str, arguments: Callable[[int], tuple], module: str = 'data.stages'
  ) -> list[dict]:
    """A task for each part, which gets the directory, and what `arguments` says of it."""
    given = [(str(self._work.path), *arguments(i)) for i in range(len(self._parts))]
    return self._run(stage, given, [part.size for part in self._parts], module)

  def _clean(self) -> list[dict]:
    settings = dataclasses.replace(
      self._config.clean,
      word_list=_absolute(self._config.clean.word_list),
      classifier=_absolute(self._config.clean.classifier),
    )
    given = [(settings, self._sources[part.source], _absolute_part(part)) for part in self._parts]
    reports = self._run('clean', given, [part.size for part in self._parts], 'data.stages')
    reports = [_as_given(report, part) for report, part in zip(reports, self._parts, strict=True)]
    numbers = np.cumsum([0, *(report['passed'] for report in reports)], dtype=np.int64)
    np.save(self._work.path / f'{NUMBERS}.tmp.npy', numbers)
    os.replace(self._work.path / f'{NUMBERS}.tmp.npy', self._work.path / NUMBERS)
    for number, source in enumerate(self._sources):
      self._check_found(source, [reports[i] for i in self._of_source(number)])
    poisoned = [each for report in reports for each in report['poisoned']]
    documents = sum(report['documents'] for report in reports)
    if len(poisoned) > max(FEW, MOST_POISONED * documents):
      shown = '; '.join(f'{path}, document {n}: {error}' for path, n, error in poisoned[:SHOWN])
      raise ValueError(
        f'{len(poisoned):,} of {documents:,} documents could not be cleaned, which is more than '
        f'{MOST_POISONED:.0%}, and so the fault of something else: {shown}'
      )
    return reports

  def _check_found(self, source: SourceConfig, of: Sequence[dict]) -> None:
    problems = collections.Counter()
    for report in of:
      problems.update(report['problems'])
    keys = {key: kind for report in of for key, kind in report['keys'].items()}
    sources.check_found(source, sum(report['documents'] for report in of), problems, keys)

  def _duplicates(self, cleaned: Sequence[dict]) -> tuple[int, int]:
    """Tasks of the two stages that wrote what is dropped; 0 of one that was not to run."""
    documents, directory = sum(report['passed'] for report in cleaned), str(self._work.path)
    buckets = -(-documents // BUCKET)
    exact = buckets if self._config.clean.exact_duplicates else 0
    self._run('exact', [(directory, i, exact) for i in range(exact)], [1.0] * exact, 'data.stages')
    threshold = self._config.clean.near_duplicates
    if not threshold or not documents:
      return exact, 0
    self._each('bands', lambda i: (i, exact, threshold))
    number, _ = duplicates.bands(threshold)
    given = [
      (directory, band, i, buckets, threshold) for band in range(number) for i in range(buckets)
    ]
    self._run('near', given, [1.0] * len(given), 'data.stages')
    self._run('clusters', [(directory, len(given))], [1.0], 'data.stages')
    return exact, 1

  def _keep(self, exact: int, near: int) -> list[dict]:
    return self._each('keep', lambda i: (i, exact, near, self._config.validation_fraction))

  def _of_source(self, number: int) -> list[int]:
    return [i for i, part in enumerate(self._parts) if part.source == number]

  def _counts(self, cleaned: Sequence[dict], kept: Sequence[dict], near: int) -> list[dict]:
    """What the report says of each source, as data.prepare counts it."""
    found = []
    for number, source in enumerate(self._sources):
      counts = prepare.no_counts(source)
      lines: collections.Counter = collections.Counter()
      for i in self._of_source(number):
        of, left = cleaned[i], kept[i]
        if of['documents']:
          counts['read'].update(documents=of['documents'], characters=of['characters'])
        counts['problems'].update(of['problems'])
        for kind, (path, line) in of['places'].items():
          if isinstance(line, int) and line:
            line += lines[path]
          counts['problems'].first.setdefault(kind, f'{path}:{line}' if line else path)
        if self._parts[i].span:
          lines[self._parts[i].files[0][0]] += of['lines']
        counts['dropped'].update(dict(left['dropped']))
        counts['repaired_characters'] += of['repaired']
        counts['anonymised'].update(dict(left['masked']))
      counts['first_problems'] = counts['problems'].first
      if near:
        of = [kept[i] for i in self._of_source(number)]
        counts['dropped']['near_duplicate'] = sum(each['different'] - each['kept'] for each in of)
      found.append(counts)
    return found

  def _sides(self, kept: Sequence[dict]) -> list[tuple[str, float]]:
    """Of each part, what of it is for training; see data.stages.boundary. Raises ValueError where
    a side is empty.
    """
    config, training = self._config, len(self._config.sources)
    sides: list[tuple[str, float]] = []
    each, held_out = [], False
    for number in range(len(self._sources)):
      of = [kept[i] for i in self._of_source(number)]
      total = sum(part['characters'] for part in of)
      if config.validation:
        sides += [('all', float(number < training))] * len(of)
        trained = total if number < training else 0
      elif config.split == 'hash':
        sides += [('hash', config.validation_fraction)] * len(of)
        trained = sum(part['trained'] for part in of)
      else:
        trained = left = int(total * (1 - config.validation_fraction))
        for part in of:
          sides.append(('tail', left))
          left -= part['characters']
      counted = (sum(part[what] for part in of) for what in ('different', 'kept'))
      each.append((*counted, bool(trained)))
      held_out |= trained < total
    prepare.check_split(config, each, held_out)
    return sides

  def _tokenizer(self, kept: Sequence[dict], sides: Sequence[tuple[str, float]]) -> None:
    config = self._config.tokenizer
    config = dataclasses.replace(config, path=_absolute(config.path))
    if config.kind == 'char' and not config.path:
      self._each('look', lambda i: (i,))
    if config.trained:
      training = [*self._trained_characters(kept, sides)]
      share = prepare.sampled_share(config, self._sizes(kept, training))
      self._each('sample', lambda i: (i, sides[i], share))
    given = str(self._work.path), config
    self._run('tokenizer', [given], [1.0], 'data.stages_encode')
    made = tokenizers.load(self._work.of('tokenizer', 0) / 'tokenizer')
    self._log(prepare.described_tokenizer(made, self._seconds['tokenizer']))

  def _sizes(self, kept: Sequence[dict], training: Sequence[int]) -> Iterator[list[int]]:
    """As data.prepare.sampled_share takes them."""
    for number in range(len(self._sources)):
      of = self._of_source(number)
      counted = ([kept[i][what] for i in of] for what in ('bytes', 'characters'))
      yield [*map(sum, counted), sum(training[i] for i in of)]

  def _trained_characters(
    self, kept: Sequence[dict], sides: Sequence[tuple[str, float]]
  ) -> Iterator[int]:
    for of, (how, value) in zip(kept, sides, strict=True):
      if how == 'hash':
        yield of['trained']
      elif how == 'all':
        yield of['characters'] * int(value)
      else:
        yield min(max(int(value), 0), of['characters'])

  def _shards(self, directory: pathlib.Path, encoded: Sequence[dict], report: dict) -> list[dict]:
    """Writes all shards and their rows into the corpus's directory; completes the report."""
    config, began = self._config, time.perf_counter()
    rows = shards.Rows(config.sequence_length)
    tasks, held_out_shards = self._cut()
    given = [(str(self._work.path), *task, rows) for task in tasks]
    weights = [float(len(slices)) for _, _, slices in tasks]
    place = f'shard-{rows.size}'  # the only stage on which the rows' length depends
    made = self._run('shard', given, weights, 'data.stages_encode', place)
    (text,) = self._run('held_out', [(str(self._work.path),)], [1.0], 'data.stages_encode')

    (directory / rows.name).mkdir()
    for i in range(len(made)):
      _move(self._work.of(place, i), directory)
    _move(self._work.of('held_out', 0), directory)
    shutil.copytree(self._work.of('tokenizer', 0) / 'tokenizer', directory / 'tokenizer')

    by_split: dict[str, list[dict]] = collections.defaultdict(list)
    for (name, _, _), of in zip(tasks, made, strict=True):
      by_split[name.rpartition('-')[0]].append(of)
    trained = [by_split[f'train-{i}'] for i in range(len(self._sources))]
    splits = [*trained, by_split[SIDES[1]]]
    lost = collections.Counter()
    report['validation'] = collections.Counter(documents=0, bytes=0, tokens=0)
    for number, counts in enumerate(report['sources']):
      counts['train'] = collections.Counter(documents=0, bytes=0, tokens=0)
      for i in self._of_source(number):
        counts['train'].update(encoded[i]['train'])
        report['validation'].update(encoded[i]['validation'])
        lost.update(encoded[i]['lost'])
      counts['train']['shards'] = [of['shard'] for of in trained[number]]
      counts['held_out_shards'] = held_out_shards[number]
    report['validation']['shards'] = [of['shard'] for of in splits[-1]]
    loaded = tokenizers.load(directory / 'tokenizer')
    written = prepare.conclude(directory, loaded, lost, report)
    self._log(prepare.described_encoding(report, self._seconds['encode']))
    # Of what is held out apart no rows are made, but those of all of it.
    plans = [[of['plan'] for of in split] for split in splits]
    plans = [*plans[: len(config.sources)], plans[-1]]
    conclude_plans(rows, directory / rows.name, plans, began, self._log)
    return written

  def _cut(self) -> tuple[list[tuple[str, str, list]], list[int]]:
    """Name, side and slices of each shard, which ends with the document that reaches its size, as
    data.shards.ShardWriter has it; and how many of each source's are of what is held out.
    """
    tasks, held_out_shards = [], []
    for number in range(len(self._sources)):
      for cut in self._cut_side(number, SIDES[0]):
        count = sum(name.startswith(f'train-{number}-') for name, _, _ in tasks)
        tasks.append((f'train-{number}-{count:05d}', SIDES[0], cut))
    count = 0
    for number in range(len(self._sources)):
      before = count
      for cut in self._cut_side(number, SIDES[1]):
        tasks.append((f'{SIDES[1]}-{count:05d}', SIDES[1], cut))
        count += 1
      held_out_shards.append(count - before)
    return tasks, held_out_shards

  def _cut_side(self, source: int, side: str) -> Iterator[list[tuple[int, int, int]]]:
    slices, tokens = [], 0
    for part in self._of_source(source):
      ends = np.cumsum(np.load(self._work.of('encode', part) / f'{side}.npy'))
      first = begin = 0
      while first < len(ends):
        last = int(np.searchsorted(ends, begin + shards.SHARD_TOKENS - tokens)) + 1
        full = last <= len(ends)
        last = min(last, len(ends))
        slices.append((part, first, last))
        tokens += int(ends[last - 1]) - begin
        first, begin = last, int(ends[last - 1])
        if full:
          yield slices
          slices, tokens = [], 0
    if slices:
      yield slices

  def _quarantine(self, directory: pathlib.Path, cleaned: Sequence[dict]) -> list[dict]:
    """Writes a line for each document that was left out because the code failed on it."""
    lines, read = [], collections.Counter()
    for part, of in zip(self._parts, cleaned, strict=True):
      for path, number, error in of['poisoned']:
        lines.append({'path': path, 'document': number + read[path], 'error': error})
      if part.span:
        read[part.files[0][0]] += of['documents']
    if not lines:
      return []
    (directory / QUARANTINE).write_text(''.join(json.dumps(line) + '\n' for line in lines))
    first = lines[0]
    self._log(
      f'data: {len(lines):,} poisoned documents left out, the first {first["path"]}, document '
      f'{first["document"]} ({first["error"]}); {QUARANTINE} in the corpus names them'
    )
    return [cache.record(directory, QUARANTINE)]


def _absolute(path: str) -> str:
  """A path as all machines see it, whatever directory their workers are in; '' is none."""
  if not path or files.remote(path) or files.of_hub(path):
    return path
  return os.path.abspath(os.path.expanduser(path))


def _absolute_part(part: Partition) -> Partition:
  within = tuple((_absolute(path), *version) for path, *version in part.files)
  return dataclasses.replace(part, files=within)


def _as_given(report: dict, part: Partition) -> dict:
  """The report on a part, with the paths that its sources were given by."""
  given = {_absolute(path): path for path, *_ in part.files}
  places = {kind: (given[path], line) for kind, (path, line) in report['places'].items()}
  poisoned = [[given[path], *rest] for path, *rest in report['poisoned']]
  return report | {'places': places, 'poisoned': poisoned}


def _move(place: pathlib.Path, directory: pathlib.Path) -> None:
  """A task's files, its index apart."""
  for path in sorted(place.rglob('*')):
    if path.is_file() and path.name != cache.INDEX:
      os.rename(path, directory / path.relative_to(place))
