"""Are chunks all of a corpus in order, and their noise the same however they are read?"""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from data import shards
from data.chunks import Chunked, ChunkLoader, Chunks, ChunkValidation
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.masking import Masking
from data.prepare import prepare
from data.spans import Lengths, Spans

SPANS = Spans(Lengths.of_source(32, 0.15, 3.0), 'spans', tuple(range(300, 290, -1)), eos=2, start=0)
MASKING = Masking(24, 'masks', 0.15, 0.8, 0.1, np.arange(3, 259), 259)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  where = tmp_path_factory.mktemp('corpus')
  for name, count in (('a', 60), ('b', 40)):
    draw = random.Random(name)
    texts = [
      ' '.join(map(str, draw.choices(range(1000), k=draw.randrange(1, 60)))) for _ in range(count)
    ]
    lines = [json.dumps({'text': f'{name}{i} {text}'}) + '\n' for i, text in enumerate(texts)]
    (where / f'{name}.jsonl').write_text(''.join(lines))
  sources = tuple(
    SourceConfig(kind='jsonl', path=f'{where}/{name}.jsonl', text_field='text', weight=weight)
    for name, weight in (('a', 3.0), ('b', 1.0))
  )
  return DataConfig(
    sources=sources,
    tokenizer=TokenizerConfig(kind='byte'),
    clean=CleanConfig(near_duplicates=0.0, anonymise=()),
    sequence_length=32,
    batch_size=6,
    validation_fraction=0.2,
    cache_dir=str(where / 'cache'),
  )


@pytest.fixture(scope='module')
def prepared(config):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(shards, 'SHARD_TOKENS', 1500)
    made = prepare(config, log=lambda _: None)
  assert len(made.train[0].shards) > 2
  return made


def chunked(prepared, noise):
  return Chunked.of(prepared, prepared.tokenizer, noise)


def documents(prepared, shard, whole):
  """Of one shard, without their ends where they are not whole."""
  alone = dataclasses.replace(prepared.train[0], shards=(shard,))
  return [ids if whole else ids[1:-1] for ids in alone.documents()]


@pytest.mark.parametrize('noise', [SPANS, MASKING], ids=['spans', 'masks'])
def test_chunks_are_the_documents_one_after_another(prepared, noise):
  chunks = chunked(prepared, noise).train[0]
  index = total = squares = 0
  for shard in prepared.train[0].shards:
    each = documents(prepared, shard, noise.whole)
    tokens = np.concatenate(each)
    number = np.repeat(np.arange(len(each)), list(map(len, each)))
    for begin in range(0, len(tokens) - noise.length + 1, noise.length):
      here, chunk = slice(begin, begin + noise.length), chunks[index]
      assert chunk.tokens.tolist() == tokens[here].tolist()
      _, segments = np.unique(number[here], return_inverse=True)
      assert (chunk.segments == 1 + segments).all()
      sizes = np.bincount(segments)
      assert chunk.positions.tolist() == [i for n in sizes for i in range(n)]
      squares += np.square(sizes).sum()
      total += noise.length
      index += 1
  assert index == len(chunks)
  assert chunks.document_length == pytest.approx(squares / total)


def take(loader, count):
  batches = [loader.take(None) for _ in range(count)]
  return {
    name: np.concatenate([getattr(batch, name) for batch in batches]) for name in vars(batches[0])
  }


def same(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize('noise', [SPANS, MASKING], ids=['spans', 'masks'])
def test_examples_are_the_same_in_any_batches_on_any_processes_and_after_a_restart(
  prepared, config, noise
):
  data = chunked(prepared, noise)
  whole = take(ChunkLoader(data, config, range(6)), 4)
  single = dataclasses.replace(config, batch_size=1)
  assert same(whole, take(ChunkLoader(data, single, [0]), 24))
  parts = [take(ChunkLoader(data, config, rows), 4) for rows in ([0, 3], [1, 2, 4, 5])]
  for name, field in whole.items():
    rows = field.reshape(4, 6, -1)
    assert np.array_equal(rows[:, [0, 3]].reshape(8, -1), parts[0][name])
    assert np.array_equal(rows[:, [1, 2, 4, 5]].reshape(16, -1), parts[1][name])
  loader = ChunkLoader(data, config, range(6))
  take(loader, 1)
  state = json.loads(json.dumps(loader.state()))
  restored = ChunkLoader(data, dataclasses.replace(config, batch_size=3), range(3))
  restored.restore(state)
  rest = take(restored, 6)
  assert all(np.array_equal(rest[name], field[6:]) for name, field in whole.items())
  assert not same(whole, take(ChunkLoader(data, dataclasses.replace(config, seed=1), range(6)), 4))


def test_other_noise_is_another_order(prepared, config):
  loader = ChunkLoader(chunked(prepared, SPANS), config, range(6))
  other = ChunkLoader(chunked(prepared, dataclasses.replace(SPANS, key='other')), config, range(6))
  with pytest.raises(ValueError, match='the data order has changed .*other'):
    other.restore(loader.state())


def test_noise_is_another_in_every_epoch(prepared, config):
  """Every chunk once an epoch, each time with spans of its own."""
  one = dataclasses.replace(prepared, train=prepared.train[:1])
  data = chunked(one, SPANS)
  single = dataclasses.replace(config, sources=config.sources[:1], batch_size=1)
  loader, epochs = ChunkLoader(data, single, [0]), []
  for _ in range(2):
    batch = take(loader, len(data.train[0]))
    text = {}
    for source, targets in zip(batch['source'], batch['targets']):
      pieces = {}
      for token in targets.tolist():
        if token >= 290:
          pieces[last := token] = []
        elif token != 2:
          pieces[last].append(token)
      key = tuple(x for t in source[:-1].tolist() for x in pieces.get(t, [t]))
      text[key] = tuple(source.tolist())
    epochs.append(text)
  assert epochs[0].keys() == epochs[1].keys() and len(epochs[0]) == len(data.train[0])
  assert np.mean([epochs[0][key] != epochs[1][key] for key in epochs[0]]) > 0.9


@pytest.mark.parametrize('noise', [SPANS, MASKING], ids=['spans', 'masks'])
def test_what_is_held_out_is_the_same_each_time_and_once(prepared, config, noise):
  data = chunked(prepared, noise)
  first, again = (
    [*ChunkValidation(data, dataclasses.replace(config, seed=seed), range(6))] for seed in (0, 9)
  )
  assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(again)))
  assert len(first) == -(-len(data.validation) // 6)
  real = sum(int(batch.segments.any(1).sum()) for batch in first)
  assert real == len(data.validation)
  if len(data.validation) % 6:
    assert not first[-1].weights[len(data.validation) % 6 :].any()
  assert data.rows == sum(map(len, data.train)) and list(data.validation_documents()) == []


def test_too_little_text_says_how_much_there_is(prepared):
  noise = dataclasses.replace(MASKING, length=100_000)
  with pytest.raises(ValueError, match=r'a.jsonl: \d+ tokens do not fill .* takes 100000 in one'):
    chunked(prepared, noise)


def test_documents_may_be_empty(tmp_path):
  """Without their ends, of which there are then only these."""
  with shards.ShardWriter(tmp_path, 'train', 300) as writer:
    for text in ([5, 6], [], [7], [], [], [8, 9, 10]):
      writer.add(np.array([1, *text, 2]))
  (entry,) = writer.shards
  shard = shards.PackedShard(tmp_path, tmp_path, entry['name'], entry['dtype'])
  chunks = Chunks('', 1.0, (shard,), 3, whole=False)
  assert len(chunks) == 2
  assert [chunks[i].tokens.tolist() for i in range(2)] == [[5, 6, 7], [8, 9, 10]]
  assert [chunks[i].segments.tolist() for i in range(2)] == [[1, 1, 2], [1, 1, 1]]
