"""Many workers write what one does, byte for byte: however many there are, wherever parts begin, and
whatever dies on the way.
"""

import functools
import gzip
import json
import os
import pathlib
import random
import signal
import threading

import pytest

from data import corpus, engine, partitions, prepare as prepares, shards, stages
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.prepare import prepare

WORDS = [f'{a}{b}{c}' for a in 'bdfgklm' for b in 'aeiou' for c in 'nrst']


def text(rng, words):
  return ' '.join(rng.choices(WORDS, k=words)) + f' {rng.randrange(10**6)}.\n'


def sources_at(place):
  """Lines, files, a compressed file and records of columns, with all that is counted in them."""
  rng = random.Random(0)
  texts = [text(rng, rng.randrange(3, 120)) for _ in range(120)]
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
  (place / 'a.jsonl').write_text('\n'.join(lines) + '\n\xff\n')
  with gzip.open(place / 'b.jsonl.gz', 'wt') as file:
    file.write('\n'.join(lines[:60]))
  (place / 'c.txt').write_text(text(rng, 300))
  (place / 'd.txt').write_bytes(b'\xff\xfe' + os.urandom(30))
  rows = [f'"{text(rng, 40)}",{i}' for i in range(30)]
  (place / 'e.csv').write_text('body,number\n' + '\n'.join(rows) + '\n')
  return (
    SourceConfig(kind='jsonl', path=f'{place}/*.jsonl*', text_field='text'),
    SourceConfig(kind='text', path=f'{place}/*.txt'),
    SourceConfig(kind='csv', path=f'{place}/e.csv', text_field='body'),
  )


def config(place, **changed):
  given = dict(
    sources=sources_at(place),
    tokenizer=TokenizerConfig(vocabulary=512, training_bytes=20_000),
    sequence_length=64,
    split='tail',
    validation_fraction=0.2,
  )
  return DataConfig(**given | changed)


def quiet(_):
  pass


def files_of(prepared):
  """Everything that was written, by name."""
  where = prepared.directories[0]
  assert [each.name for each in where.parent.iterdir() if '.' in each.name] == ['sources.json']
  return {
    str(path.relative_to(where)): path.read_bytes() for path in where.rglob('*') if path.is_file()
  }


def alone(config, place):
  return files_of(prepare(_in(config, place), log=quiet))


def together(config, place, by, log=quiet):
  build = functools.partial(corpus.build, engine=by)
  return files_of(prepare(_in(config, place), log=log, build=build))


def _in(config, place):
  import dataclasses

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
  monkeypatch.setattr(partitions, 'PART_BYTES', 3000)
  monkeypatch.setattr(corpus, 'BUCKET', 60)
  monkeypatch.setattr(shards, 'SHARD_TOKENS', 900)
  monkeypatch.setattr(stages, 'BLOCK', 7)


VARIANTS = {
  'tail': {},
  'hash': {'split': 'hash'},
  'char': {'tokenizer': TokenizerConfig(kind='char')},
  'apart': {'validation_fraction': 0.0, 'validation': True},
  'no duplicates': {'clean': CleanConfig(exact_duplicates=False, near_duplicates=0.0)},
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
  assert len(counts['problems']) >= 3 and len(counts['train']['shards']) > 3
