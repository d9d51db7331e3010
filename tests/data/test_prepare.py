"""The whole pipeline: what comes out is what went in, the split is stable,
the cache is atomic and checked.
"""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from data import building, cache, clean, sentencepiece, shards, tokenizers
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.prepare import corpus_key, prepare

SHAKESPEARE = pathlib.Path(__file__).parents[3] / 'shared' / 'data' / 'tinyshakespeare.txt'


def text(i, words=60):
  rng = random.Random(i)
  return f'Document {i}: ' + ' '.join(str(rng.randrange(10**6)) for _ in range(words)) + ' \u20ac\n'


def write(path, texts):
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))


def config(tmp_path, **kinds):
  base = dict(
    sources=(SourceConfig(kind='jsonl', path=f'{tmp_path}/*.jsonl', text_field='text'),),
    tokenizer=TokenizerConfig(kind='byte'),
    sequence_length=50,
    validation_fraction=0.2,
    cache_dir=str(tmp_path / 'cache'),
  )
  return DataConfig(**(base | kinds))


def quiet(_):
  pass


def decoded(prepared, source):
  """Documents of a split, after checking that each begins with bos and ends with eos."""
  tok = prepared.tokenizer
  for ids in source.documents():
    assert ids[0] == tok.bos and ids[-1] == tok.eos
    yield tok.decode(ids[1:-1])


def test_the_document_length_is_the_one_that_tokens_see(tmp_path):
  write(tmp_path / 'a.jsonl', [text(i, words=3 + i) for i in range(40)])
  prepared = prepare(config(tmp_path), log=quiet)
  lengths = np.concatenate([np.asarray(shard.pieces[:, 1]) for shard in prepared.train[0].shards])
  each = np.repeat(lengths, lengths)  # of every token
  assert lengths.min() < 50 == lengths.max() and prepared.document_length == pytest.approx(
    each.mean()
  )


def test_the_document_length_of_sources_is_by_their_weights(tmp_path):
  """Of one every token stands in a whole row; of the other in the 14 of its text."""
  write(tmp_path / 'a.jsonl', [f'{i:02} short text' for i in range(40)])
  write(tmp_path / 'b.jsonl', [f'{i:02}' + 'x' * 97 for i in range(40)])

  def source(name, weight):
    path = f'{tmp_path}/{name}.jsonl'
    return SourceConfig(kind='jsonl', path=path, text_field='text', weight=weight)

  loose = CleanConfig(near_duplicates=0.0)
  for weights, expected in (((1.0, 1.0), (14 + 50) / 2), ((1.0, 3.0), (14 + 3 * 50) / 4)):
    sources = tuple(map(source, 'ab', weights))
    prepared = prepare(config(tmp_path, sources=sources, clean=loose), log=quiet)
    assert prepared.document_length == pytest.approx(expected)


def test_the_tail_of_every_source_is_held_out(tmp_path):
  """Of its characters, wherever documents end: the last fifth."""
  sizes = {'a': 30, 'b': 200}
  for name, words in sizes.items():
    write(tmp_path / f'{name}.jsonl', [text(f'{name}{i}', words) for i in range(10)])
  sources = tuple(
    SourceConfig(kind='jsonl', path=f'{tmp_path}/{name}.jsonl', text_field='text') for name in 'ab'
  )
  prepared = prepare(config(tmp_path, sources=sources, split='tail'), log=quiet)
  held_out = ''
  for source, (name, words) in zip(prepared.train, sizes.items(), strict=True):
    whole = ''.join(text(f'{name}{i}', words) for i in range(10))
    training = int(len(whole) * (1 - 0.2))
    assert ''.join(decoded(prepared, source)) == whole[:training]
    held_out += whole[training:]
  assert ''.join(prepared.validation_documents()) == held_out


def test_what_a_tokenizer_loses_is_counted_by_characters_and_documents(tmp_path, monkeypatch):
  write(tmp_path / 'a.jsonl', [text(i) + '\u20ac' * (i % 3) for i in range(30)])
  monkeypatch.setattr(
    tokenizers.ByteTokenizer, 'losses', lambda self, text, ids: text.count('\u20ac') - 1
  )
  found = prepare(config(tmp_path), log=quiet).report['tokenizer']
  assert (found['documents_lost'], found['characters_lost']) == (20, 30)


def test_every_document_comes_back_on_exactly_one_side(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, 'SHARD_TOKENS', 5000)  # many shards
  texts = [text(i) for i in range(100)]
  write(tmp_path / 'a.jsonl', texts)
  prepared = prepare(config(tmp_path), log=quiet)
  train, held_out = (
    list(decoded(prepared, prepared.train[0])),
    list(decoded(prepared, prepared.validation)),
  )
  assert len(prepared.train[0].shards) > 3
  assert sorted(train + held_out) == sorted(texts) and 5 < len(held_out) < 40
  assert held_out == list(prepared.validation_documents())
  assert prepared.validation_bytes == sum(len(t.encode()) for t in held_out)
  assert prepared.report['validation']['tokens'] == sum(len(t.encode()) + 1 for t in held_out)
  assert json.loads(json.dumps(prepared.report)) == prepared.report


def test_split_is_stable_as_data_grows(tmp_path):
  write(tmp_path / 'a.jsonl', [text(i) for i in range(60)])
  before = prepare(config(tmp_path), log=quiet)
  write(tmp_path / 'a.jsonl', [text(i) for i in range(200, 0, -1)])
  after = prepare(config(tmp_path), log=quiet)
  assert before.key != after.key
  common = {text(i) for i in range(1, 60)}
  assert common.intersection(before.validation_documents()) == common.intersection(
    after.validation_documents()
  )


def test_duplicates_never_straddle(tmp_path):
  texts = [text(i, 400) for i in range(40)]
  near = [t.replace('Document', 'The document') for t in texts]
  write(tmp_path / 'a.jsonl', texts)
  write(tmp_path / 'b.jsonl', [t.upper().replace(' ', '  ') for t in texts] + near)
  other = [text(i, 400) for i in range(100, 110)]
  write(tmp_path / 'c.jsonl', other)
  prepared = prepare(config(tmp_path), log=quiet)
  assert prepared.report['sources'][0]['dropped'] == {'exact_duplicate': 40, 'near_duplicate': 40}
  assert sorted(
    [*decoded(prepared, prepared.train[0]), *prepared.validation_documents()]
  ) == sorted(texts + other)
  kept = prepare(
    config(tmp_path, clean=CleanConfig(exact_duplicates=False, near_duplicates=0.0)), log=quiet
  )
  assert kept.report['sources'][0]['dropped'] == {}
  sides = [
    {' '.join(t.lower().split()) for t in side}
    for side in (decoded(kept, kept.train[0]), kept.validation_documents())
  ]
  assert sides[1] and not sides[0] & sides[1]


def test_report_counts_and_never_shows_values(tmp_path):
  personal = [text(i) + 'mail me@secret.org 10.1.2.3 ' for i in range(30)]
  write(tmp_path / 'a.jsonl', personal + ['', 'x\ud800' + text(99)])
  lines = []
  prepared = prepare(config(tmp_path), log=lines.append)
  counts = prepared.report['sources'][0]
  assert counts['anonymised'] == {'email': 30, 'ip': 30} and counts['dropped']['empty'] == 1
  assert counts['repaired_characters'] == 1 and counts['read']['documents'] == 32
  everything = (
    json.dumps(prepared.report) + ''.join(lines) + ''.join(prepared.validation_documents())
  )
  assert 'secret' not in everything and '10.1.2.3' not in everything


def test_second_call_loads_and_only_what_matters_changes_the_key(tmp_path):
  write(tmp_path / 'a.jsonl', [text(i) for i in range(40)])
  base = config(tmp_path)
  first, lines = prepare(base, log=quiet), []
  again = prepare(base, log=lines.append)
  assert (
    first.key == again.key
    and first.report == again.report
    and len(lines) == 1
    and 'loaded' in lines[0]
  )
  same = [
    dict(batch_size=3),
    dict(seed=9),
    dict(sources=(dataclasses.replace(base.sources[0], weight=2.0),)),
  ]
  assert {corpus_key(config(tmp_path, **change)) for change in same} == {corpus_key(base)}
  changes = [
    dict(split='tail'),
    dict(validation_fraction=0.3),
    dict(clean=CleanConfig(filters='code')),
    dict(tokenizer=TokenizerConfig(kind='char')),
  ]
  assert (
    len({corpus_key(config(tmp_path, **change)) for change in changes} | {corpus_key(base)}) == 5
  )
  longer, lines = config(tmp_path, sequence_length=80), []
  assert prepare(longer, log=lines.append).key == f'{corpus_key(base)}-80'
  assert not any('encoded' in line for line in lines) and any('packed' in line for line in lines)


def test_tail_split_is_nanogpts(tmp_path):
  body = ''.join(text(i) for i in range(50))
  (tmp_path / 'a.txt').write_text(body)
  source = SourceConfig(kind='text', path=str(tmp_path / 'a.txt'))
  tail = config(
    tmp_path,
    sources=(source,),
    split='tail',
    validation_fraction=0.1,
    clean=CleanConfig(anonymise=()),
    tokenizer=TokenizerConfig(kind='char'),
  )
  prepared = prepare(tail, log=quiet)
  cut = int(len(body) * 0.9)
  assert ''.join(prepared.validation_documents()) == body[cut:]
  assert list(decoded(prepared, prepared.train[0])) == [body[:cut]]


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f'{SHAKESPEARE} is not beside the checkout')
def test_tinyshakespeare_splits_as_in_nanogpt(tmp_path):
  prepared = prepare(
    DataConfig(
      sources=(SourceConfig(kind='text', path=str(SHAKESPEARE)),),
      split='tail',
      validation_fraction=0.1,
      tokenizer=TokenizerConfig(kind='char', vocabulary=68),
      sequence_length=64,
      batch_size=12,
      cache_dir=str(tmp_path),
    ),
    log=quiet,
  )
  # nanoGPT's prepare.py prints: vocab size 65, train 1,003,854 tokens, val 111,540 tokens;
  # here each has one eos more.
  assert prepared.report['sources'][0]['train']['tokens'] == 1_003_854 + 1
  assert prepared.report['validation']['tokens'] == 111_540 + 1
  assert prepared.report['packing']['train'][0]['fill'] > 0.9999


def test_sentencepiece_is_trained_on_the_training_split_only(tmp_path):
  write(tmp_path / 'a.jsonl', [text(i) + ' zebra' * 5 for i in range(300)])
  made = config(tmp_path, tokenizer=TokenizerConfig(vocabulary=600))
  prepared = prepare(made, log=quiet)
  assert (
    prepared.report['tokenizer']['characters_lost'] == 0 and prepared.tokenizer.vocabulary == 600
  )
  assert [b'zebra' in piece for piece in prepared.tokenizer.token_bytes].count(True) == 1
  training = decoded(prepared, prepared.train[0])
  assert sentencepiece.train(made.tokenizer, training) == prepared.tokenizer.model


@pytest.mark.parametrize('kind', ['truncated', 'flipped', 'missing', 'index'])
def test_damage_is_detected_and_named(tmp_path, kind):
  write(tmp_path / 'a.jsonl', [text(i) for i in range(40)])
  prepared = prepare(config(tmp_path), log=quiet)
  for directory, _, names in os.walk(prepared.directories[0]):
    for name in names:
      damaged = pathlib.Path(directory) / name
      whole = damaged.read_bytes()
      if (name == cache.INDEX) != (kind == 'index'):
        continue
      if kind in ('truncated', 'index'):
        damaged.write_bytes(whole[:-5])
      elif kind == 'flipped':
        damaged.write_bytes(whole[:-5] + bytes([whole[-5] ^ 16]) + whole[-4:])
      else:
        damaged.unlink()
      with pytest.raises(cache.CorruptShardError, match=f'{name}.*delete .* and run again'):
        prepare(config(tmp_path), log=quiet)
      damaged.write_bytes(whole)
  verify(prepare(config(tmp_path), log=quiet))


def verify(prepared):
  """Reads every file and compares checksums."""
  for directory in prepared.directories:
    cache.check(directory, cache.read_index(directory)['files'], contents=True)


def test_large_corpora_skip_checksums_loudly_and_a_check_reads_them(tmp_path, monkeypatch):
  write(tmp_path / 'a.jsonl', [text(i) for i in range(40)])
  prepared = prepare(config(tmp_path), log=quiet)
  tokens = prepared.directories[0] / 'train-0-00000.tokens'
  whole = tokens.read_bytes()
  tokens.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
  monkeypatch.setattr(cache, 'CHECK_BYTES', 0)
  lines = []
  loaded = prepare(config(tmp_path), log=lines.append)
  assert any('not the checksums' in line for line in lines)
  with pytest.raises(cache.CorruptShardError, match='bits have changed'):
    verify(loaded)
  tokens.write_bytes(whole[:-1])
  with pytest.raises(cache.CorruptShardError, match='truncated'):
    prepare(config(tmp_path), log=quiet)


def test_a_failed_or_killed_build_leaves_nothing_half_done(tmp_path):
  write(tmp_path / 'a.jsonl', [text(i) for i in range(40)])
  with pytest.raises(ValueError, match='lower tokenizer.vocabulary'):
    prepare(config(tmp_path, tokenizer=TokenizerConfig(vocabulary=60_000)), log=quiet)
  where = tmp_path / 'cache'
  assert [path.name for path in where.iterdir() if path.name != 'sources.json'] == []
  killed = (
    'import os; from data import prepare; from data.config import *\n'
    'prepare._encode = lambda *a: os._exit(9)\n'
    f'prepare.prepare({config(tmp_path)!r})'
  )
  assert (
    subprocess.run([sys.executable, '-c', killed], check=False, capture_output=True).returncode == 9
  )
  assert len(list(where.glob('*.partial-*'))) == 1
  lines = []
  prepare(config(tmp_path), log=lines.append)
  assert any('left by a run that was killed' in line for line in lines) and not list(
    where.glob('*.partial-*')
  )


def test_nothing_left_is_an_error_that_names_the_source(tmp_path):
  write(tmp_path / 'a.jsonl', [text(i) for i in range(3)])
  with pytest.raises(ValueError, match='nothing is left to train on of .*a?.jsonl'):
    prepare(config(tmp_path, clean=CleanConfig(filters='prose')), log=quiet)
  with pytest.raises(ValueError, match="use split='tail'"):
    prepare(config(tmp_path, validation_fraction=1e-9), log=quiet)


def test_a_race_keeps_the_first_result(tmp_path):
  lines = []
  with building.building(tmp_path / 'x', lines.append) as mine:
    (mine / cache.INDEX).write_text('mine')
    shutil.copytree(mine, tmp_path / 'x')
    (tmp_path / 'x' / cache.INDEX).write_text('theirs')
  assert (tmp_path / 'x' / cache.INDEX).read_text() == 'theirs' and 'another process' in lines[0]
  assert [path.name for path in tmp_path.iterdir()] == ['x']


def test_tokens_are_kept_as_wide_as_the_vocabulary_needs(tmp_path):
  for vocabulary, dtype in ((65_536, 'uint16'), (65_537, 'uint32')):
    with shards.ShardWriter(tmp_path, f'v{vocabulary}', vocabulary) as writer:
      writer.add(np.array([1, vocabulary - 1, 2]))
    stored = np.fromfile(tmp_path / f'v{vocabulary}-00000.tokens', dtype)
    assert writer.shards[0]['dtype'] == dtype and stored.tolist() == [1, vocabulary - 1, 2]


@pytest.mark.parametrize('which', [0, 1])
def test_a_directory_whose_index_is_gone_is_prepared_anew(tmp_path, which):
  write(tmp_path / 'a.jsonl', [text(i) for i in range(40)])
  first = prepare(config(tmp_path), log=quiet)
  (first.directories[which] / cache.INDEX).unlink()
  lines = []
  again = prepare(config(tmp_path), log=lines.append)
  assert any(f'{first.directories[which]} had no index.json' in line for line in lines)
  assert sorted(again.validation_documents()) == sorted(first.validation_documents())
  verify(again)
  assert {path.name for path in (tmp_path / 'cache').iterdir()} == {first.key.split('-')[0]}


def test_an_index_of_another_form_is_refused_by_its_name(tmp_path):
  write(tmp_path / 'a.jsonl', [text(i) for i in range(40)])
  index = prepare(config(tmp_path), log=quiet).directories[0] / cache.INDEX
  for damaged in (b'[' * 100_000, b'9' * 5000, b'\xff', b'[]', b'{"report": {}, "files": [1]}'):
    index.write_bytes(damaged)
    with pytest.raises(cache.CorruptShardError, match='index.json .*; delete .* and run again'):
      prepare(config(tmp_path), log=quiet)


def test_what_a_host_of_a_longer_name_is_building_stays(tmp_path):
  theirs = tmp_path / f'x.partial-{socket.gethostname()}-b-7'
  theirs.mkdir()
  with building.building(tmp_path / 'x', quiet) as mine:
    (mine / cache.INDEX).touch()
  assert theirs.is_dir()


@pytest.mark.parametrize('content', [b'{"model": {}', b'{"model": {"type": "nonsense"}}', b''])
def test_a_broken_tokenizer_is_found_before_the_corpus_is_read(tmp_path, monkeypatch, content):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'tokenizer.json').write_bytes(content)
  broken = TokenizerConfig(kind='huggingface', path=str(tmp_path / 'mine'))
  for name in ('content_digest', 'documents'):
    monkeypatch.setattr(f'data.sources.{name}', lambda *_: pytest.fail('it was read'))
  with pytest.raises(ValueError, match='mine'):
    prepare(config(tmp_path, tokenizer=broken), log=quiet)
  with pytest.raises(FileNotFoundError, match='no tokenizer at .*none'):
    none = dataclasses.replace(broken, path=str(tmp_path / 'none'))
    prepare(config(tmp_path, tokenizer=none), log=quiet)
  with pytest.raises(ValueError, match="tokenizer.vocabulary=7 but this 'byte' tokenizer has 259"):
    prepare(config(tmp_path, tokenizer=TokenizerConfig(kind='byte', vocabulary=7)), log=quiet)


def test_two_models_named_by_their_indices_have_two_keys(tmp_path):
  write(tmp_path / 'a.jsonl', [text(1)])
  keys = []
  for name in 'ab':
    (tmp_path / name).mkdir()
    (tmp_path / name / 'tokenizer.json').write_text('{"kind": "sentencepiece"}')
    (tmp_path / name / 'tokenizer.model').write_text(name)
    for path in (tmp_path / name, tmp_path / name / 'tokenizer.json'):
      tokenizer = TokenizerConfig(kind='sentencepiece', path=str(path))
      keys.append(corpus_key(config(tmp_path, tokenizer=tokenizer)))
  assert keys[0] == keys[1] != keys[2] == keys[3]


def test_the_home_directory_is_one_place(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.chdir(tmp_path)
  write(tmp_path / 'a.jsonl', [text(i) for i in range(30)])
  prepared = prepare(config(tmp_path, cache_dir='~/cache'), log=quiet)
  assert prepared.directories[0].parent == tmp_path / 'home' / 'cache'
  assert not (tmp_path / '~').exists()


def test_a_tokenizer_is_trained_on_about_as_many_bytes_as_were_asked_for(tmp_path, monkeypatch):
  """Of a text of three bytes a character, on a third of the characters."""
  write(tmp_path / 'a.jsonl', ['\u6c34' * 2000 + f'{i:04}' for i in range(25)])
  shares = []

  def build(of, training, everything, share):
    shares.append(share)
    return tokenizers.ByteTokenizer()

  monkeypatch.setattr(tokenizers, 'build', build)
  tokenizer = TokenizerConfig(training_bytes=60_000)
  loose = CleanConfig(anonymise=(), near_duplicates=0.0)
  prepared = prepare(config(tmp_path, tokenizer=tokenizer, clean=loose), log=quiet)
  trained = prepared.report['sources'][0]['train']['bytes']
  assert shares == [pytest.approx(60_000 / trained, rel=1e-3)]


def test_as_many_processes_clean_as_may_be_used(tmp_path, monkeypatch):
  """Of a node of 128 cores, a job may have two."""
  asked, clean_all = [], clean.clean_all

  def spied(texts, config, workers):
    asked.append(workers)
    return clean_all(texts, config, workers=1)

  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1}, raising=False)
  monkeypatch.setattr(os, 'cpu_count', lambda: 128)
  monkeypatch.setattr(clean, 'clean_all', spied)
  monkeypatch.setattr('data.prepare.PARALLEL_BYTES', 0)
  write(tmp_path / 'a.jsonl', [text(i) for i in range(20)])
  made = TokenizerConfig(kind='sentencepiece', vocabulary=512)
  prepared = prepare(config(tmp_path, tokenizer=made), log=quiet)
  assert asked == [2] and prepared.tokenizer._threads == 2
