"""Many workers write what one does, byte for byte: however many there are, wherever parts begin,
and whatever dies on the way.
"""

import contextlib
import dataclasses
import functools
import gzip
import json
import os
import random
import signal
import time

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data import (
  clean as cleaning,
  corpus,
  duplicates,
  engine,
  partitions,
  shards,
  stages,
  tokenizers,
)
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.prepare import prepare

WORDS = [f'{a}{b}{c}' for a in 'bdfgklm' for b in 'aeiou' for c in 'nrst']


def text(rng, words):
  return ' '.join(rng.choices(WORDS, k=words)) + f' {rng.randrange(10**6)}.\n'


def sources_at(place):
  """Lines, files, a compressed file and records of columns, with all that is counted in them."""
  rng = random.Random(0)
  texts = [text(rng, rng.randrange(3, 60)) for _ in range(120)]
  near = [f'{each} and more' for each in texts[10:30]]
  near += [texts[40] + f' {i}' for i in range(50)]  # more than are compared all at once
  lines = [json.dumps({'text': each}) for each in texts + near + texts[:9]]
  lines += ['no JSON', '', '{"other": 1}', json.dumps({'text': ' '}), '"x"']
  lines += [
    json.dumps({'text': f'mail a{i}@example.org or 10.1.2.{i}: {each}'})
    for i, each in enumerate(texts[50:60])
  ]
  lines.append(json.dumps({'text': 'half \ud800 a pair ' + texts[61]}))
  rng.shuffle(lines)
  (place / 'a.jsonl').write_bytes('\n'.join(lines).encode() + b'\n\xff\n')
  with gzip.open(place / 'b.jsonl.gz', 'wt') as file:
    file.write('\n'.join(lines[:60]))
  for i in range(9):
    (place / f'c{i}.txt').write_text(text(rng, 100))
  (place / 'd.txt').write_bytes(b'\xff\xfe' + os.urandom(30))
  rows = [f'"{text(rng, 30)}",{i}' for i in range(20)]
  (place / 'e.csv').write_text('body,number\n' + '\n'.join(rows) + '\n')
  return (
    SourceConfig(kind='jsonl', path=f'{place}/*.jsonl*', text_field='text'),
    SourceConfig(kind='text', path=f'{place}/*.txt'),
    SourceConfig(kind='csv', path=f'{place}/e.csv', text_field='body'),
  )


def config(place, **changed):
  given = dict(
    sources=sources_at(place),
    tokenizer=TokenizerConfig(vocabulary=512, training_bytes=6_000),
    sequence_length=64,
    clean=CleanConfig(near_duplicates=1.0),  # one band, and so few tasks
    split='tail',
    validation_fraction=0.2,
  )
  return DataConfig(**given | changed)


def _plain(place, **changed):
  """With few stages."""
  clean = CleanConfig(near_duplicates=0.0)
  return config(place, tokenizer=TokenizerConfig(kind='byte'), clean=clean, **changed)


def quiet(_):
  pass


def files_of(prepared):
  """Everything that was written, by name."""
  where = prepared.directories[0]
  assert {each.name for each in where.parent.iterdir()} <= {where.name, 'sources.json'}
  return {
    str(path.relative_to(where)): path.read_bytes() for path in where.rglob('*') if path.is_file()
  }


def alone(config, place):
  return files_of(prepare(_in(config, place), log=quiet))


def together(config, place, by, log=quiet):
  build = functools.partial(corpus.build, engine=by)
  return files_of(prepare(_in(config, place), log=log, build=build))


def _in(config, place):
  return dataclasses.replace(config, cache_dir=str(place))


class Here:
  """Does tasks at once, in this process; for tests that ask what comes out and not who does it.

  Args:
    order: of the tasks that are waiting, which is done next.
  """

  slots = 3

  def __init__(self, order=lambda numbers: numbers[0]):
    self._waiting, self._order = {}, order

  def submit(self, number, task):
    self._waiting[number] = task

  def next(self, seconds):
    number = self._order(sorted(self._waiting))
    return number, engine.outcome_of(self._waiting.pop(number))

  def close(self):
    pass


@pytest.fixture
def small(monkeypatch):
  """Many parts, buckets, shards and blocks of little."""
  monkeypatch.setattr(partitions, 'PART_BYTES', 6000)
  monkeypatch.setattr(corpus, 'BUCKET', 150)
  monkeypatch.setattr(shards, 'SHARD_TOKENS', 4000)
  monkeypatch.setattr(stages, 'BLOCK', 7)
  monkeypatch.setattr(os, 'fsync', lambda _: None)


VARIANTS = {
  'tail': {'clean': CleanConfig(near_duplicates=0.9)},
  'hash': {'split': 'hash', 'tokenizer': TokenizerConfig(kind='char')},
  'apart': {
    'validation_fraction': 0.0,
    'validation': True,
    'tokenizer': TokenizerConfig(kind='byte'),
    'clean': CleanConfig(exact_duplicates=False, near_duplicates=0.0),
  },
}


@pytest.mark.parametrize('name', VARIANTS)
def test_parts_in_any_order_come_to_the_bytes_of_the_whole(tmp_path, small, name):
  changed = dict(VARIANTS[name])
  made = config(tmp_path)
  if changed.get('validation'):
    changed |= {'sources': made.sources[:1], 'validation': made.sources[1:]}
  made = config(tmp_path, **changed)
  expected = alone(made, tmp_path / 'alone')
  last = Here(order=lambda numbers: numbers[-1])
  assert together(made, tmp_path / 'parts', last) == expected
  counts = json.loads(expected['index.json'])['report']['sources'][0]
  assert len(counts['problems']) >= 3 and len(counts['train']['shards']) > 1


def test_a_shard_ends_with_the_document_that_fills_it_exactly(tmp_path, small, monkeypatch):
  made = _plain(tmp_path)
  where = prepare(_in(made, tmp_path / 'sized'), log=quiet).directories[0]
  ends = np.load(where / 'train-0-00000.documents.npy')
  monkeypatch.setattr(shards, 'SHARD_TOKENS', int(ends[3]))
  expected = alone(made, tmp_path / 'alone')
  assert together(made, tmp_path / 'parts', Here()) == expected
  first = next(each for each in _shards(expected) if each['name'] == 'train-0-00000')
  assert first['documents'] == 3 and first['tokens'] == shards.SHARD_TOKENS


def _shards(written):
  report = json.loads(written['index.json'])['report']
  return [shard for source in report['sources'] for shard in source['train']['shards']]


def test_links_join_what_they_join_however_they_are_divided():
  rng = np.random.default_rng(0)
  links = rng.integers(0, 300, (200, 2))
  earlier = np.arange(300)
  for begin in range(0, len(links), 7):
    duplicates.join(earlier, links[begin : begin + 7])
  graph = coo_array((np.ones(200), (links[:, 0], links[:, 1])), shape=(300, 300))
  _, cluster = connected_components(graph, directed=False)
  firsts = np.array([np.argmax(cluster == each) for each in cluster])
  assert ((earlier != np.arange(300)) == (firsts != np.arange(300))).all()
  assert (firsts[earlier] == firsts).all() and (earlier <= np.arange(300)).all()


def test_processes_that_die_change_nothing(tmp_path, small):
  """Of two workers and four, of which every few tasks one is killed."""
  made = _plain(tmp_path)
  expected = alone(made, tmp_path / 'alone')
  for workers, every in ((2, 9), (4, 7)):
    lines = []
    with contextlib.closing(Dying(workers, every)) as by:
      assert together(made, tmp_path / f'by {workers}', by, lines.append) == expected
    assert any('done again' in line for line in lines)


class Dying(engine.LocalEngine):
  """Kills the worker of one task of so many, at any moment of it."""

  def __init__(self, workers, every):
    super().__init__(workers)
    self._every, self._rng = every, random.Random(every)

  def submit(self, number, task):
    super().submit(number, task)
    if self._rng.randrange(self._every) == 0:
      time.sleep(self._rng.random() / 100)
      with contextlib.suppress(ProcessLookupError):  # killed before, behind its answer
        os.kill(self._busy[number].process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_one_worker_is_as_good(tmp_path):
  made = config(tmp_path)
  with contextlib.closing(engine.LocalEngine(1)) as by:
    assert together(made, tmp_path / 'one', by) == alone(made, tmp_path / 'alone')


@pytest.mark.slow
@pytest.mark.parametrize('trial', range(10))
def test_whoever_dies_and_when_the_bytes_are_the_same(tmp_path, small, trial):
  made = config(tmp_path, clean=CleanConfig(near_duplicates=0.9))
  expected = alone(made, tmp_path / 'alone')
  with contextlib.closing(Dying(2, 5 + trial)) as by:
    by._rng.seed(trial)
    assert together(made, tmp_path / 'together', by) == expected


MARK = 'poison for whoever reads it'


def deadly(out, *arguments):
  """As data.stages.clean, in a process that one document ends."""
  clean = cleaning.clean
  cleaning.clean = lambda text, config: os._exit(3) if MARK in text else clean(text, config)
  return stages.clean(out, *arguments)


class Deadly(engine.LocalEngine):
  def submit(self, number, task):
    call = task.call.replace('data.stages.clean', f'{__name__}.deadly')
    super().submit(number, dataclasses.replace(task, call=call))


@pytest.mark.parametrize('dies', [False, True])
def test_a_poisoned_document_is_named_counted_and_left_out(tmp_path, small, monkeypatch, dies):
  made = _plain(tmp_path, split='hash')
  expected = alone(made, tmp_path / 'alone')
  lines = (tmp_path / 'a.jsonl').read_bytes().splitlines(keepends=True)
  number = len(lines) - 20  # in a part behind the first
  texts_before = [n for n in map(_text, lines[:number]) if n is not None]
  lines.insert(number, json.dumps({'text': MARK}).encode() + b'\n')
  (tmp_path / 'a.jsonl').write_bytes(b''.join(lines))
  if not dies:

    def failing(text, config, clean=cleaning.clean):
      return {}[text] if text == MARK else clean(text, config)

    monkeypatch.setattr(cleaning, 'clean', failing)
  said = []
  with contextlib.closing(Deadly(1) if dies else Here()) as by:
    found = together(made, tmp_path / 'poisoned', by, said.append)
  quarantined = json.loads(found.pop(corpus.QUARANTINE))
  error = stages.KILLED if dies else 'KeyError'
  place = {'path': f'{tmp_path}/a.jsonl', 'document': len(texts_before) + 1, 'error': error}
  assert quarantined == place and any('1 poisoned documents left out' in line for line in said)
  first, without = (json.loads(each.pop('index.json'))['report'] for each in (found, expected))
  assert found == expected
  counts, before = first['sources'][0], without['sources'][0]
  assert counts['dropped'].pop('poisoned') == 1 and counts['dropped'] == before['dropped']
  assert counts['read']['documents'] == before['read']['documents'] + 1
  # What was read is what was dropped, and what was learned from or held out.
  everywhere = [each['train']['documents'] for each in first['sources']]
  read = sum(each['read']['documents'] for each in first['sources'])
  dropped = sum(sum(each['dropped'].values()) for each in first['sources']) + 1
  assert read - dropped == sum(everywhere) + first['validation']['documents']


def _text(line):
  try:
    return json.loads(line).get('text')
  except (ValueError, AttributeError):
    return None


class Stopping(Here):
  """Does some tasks, and is interrupted."""

  def __init__(self, tasks):
    super().__init__()
    self.left = tasks

  def next(self, seconds):
    self.left -= 1
    if self.left < 0:
      raise KeyboardInterrupt
    return super().next(seconds)


def test_the_same_command_goes_on_from_what_is_whole(tmp_path, small):
  made = _plain(tmp_path)
  expected = alone(made, tmp_path / 'alone')
  with pytest.raises(KeyboardInterrupt):
    together(made, tmp_path / 'again', Stopping(30))
  (work,) = (tmp_path / 'again').glob('*.work')
  done = sorted(work.glob('clean/*/texts'))
  damaged = next(path for path in done if path.stat().st_size)
  damaged.write_bytes(damaged.read_bytes()[:-1] + b'?')
  (work / 'clean' / '000000.abc.tmp').mkdir()  # of a worker that is gone
  said = []
  assert together(made, tmp_path / 'again', Here(), said.append) == expected
  (line,) = [line for line in said if line.startswith('data: clean')]
  assert f'{len(done) - 1} done before' in line, line

  with pytest.raises(KeyboardInterrupt):
    together(made, tmp_path / 'changed', Stopping(30))
  os.utime(tmp_path / 'e.csv')  # whose bytes are the same
  assert together(made, tmp_path / 'changed', Here(), said.append) == expected
  assert any('begun of other files' in line for line in said)


class Lossy(Here):
  def next(self, seconds):
    return super().next(seconds)[0], engine.WorkerLost('out of memory')


def test_a_task_that_nobody_can_do_is_an_error_that_names_it(tmp_path, small):
  made = config(tmp_path)
  with pytest.raises(ValueError, match='clean: 0+ lost 12 workers .*out of memory.*fewer workers'):
    together(made, tmp_path / 'lost', Lossy())
  other = dataclasses.replace(made.sources[0], text_field='body')
  with pytest.raises(ValueError, match="none of .* records has a text under the key 'body'"):
    together(dataclasses.replace(made, sources=(other,)), tmp_path / 'none', Here())


def test_a_worker_of_other_versions_or_files_is_refused(tmp_path, small, monkeypatch):
  task = engine.CorpusTask('data.stages.clean', str(tmp_path / 'x'), ())
  with pytest.raises(ValueError, match='install the same on all machines'):
    engine.perform(task)
  made = config(tmp_path)
  parts = partitions.partitions(made.sources)
  os.utime(tmp_path / 'e.csv', ns=(1, 1))
  with pytest.raises(ValueError, match='every machine must see the same files'):
    arguments = made.clean, made.sources[2], parts[-1]
    engine.perform(dataclasses.replace(task, arguments=arguments, versions=engine.versions()))


class Elsewhere(Here):
  """As Here, in another directory than who gives the tasks."""

  def __init__(self, directory):
    super().__init__()
    self._directory = directory

  def next(self, seconds):
    with contextlib.chdir(self._directory):
      return super().next(seconds)


def test_workers_in_another_directory_find_what_is_named_from_here(tmp_path, small, monkeypatch):
  """And reports have the names that were given."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'elsewhere').mkdir()
  tokenizers.CharTokenizer([*map(chr, range(128)), '\ufffd']).save('made')
  (tmp_path / 'listed').write_text('fable\n')
  clean = CleanConfig(near_duplicates=0.0, word_list='listed')
  sources_at(tmp_path)
  made = DataConfig(
    sources=(SourceConfig(kind='jsonl', path='a.jsonl', text_field='text'),),
    clean=clean,
    tokenizer=TokenizerConfig(kind='char', path='made'),
    sequence_length=64,
  )
  expected = alone(made, tmp_path / 'alone')
  assert together(made, tmp_path / 'parts', Elsewhere(tmp_path / 'elsewhere')) == expected
  counts = json.loads(expected['index.json'])['report']['sources'][0]
  assert counts['first_problems']['malformed'].startswith('a.jsonl:')
