"""Loading laws: deterministic, every row once per epoch,
independent of the number of processes, exactly resumable.
"""

import collections
import dataclasses
import json
import random
import types

import jax
import numpy as np
import pytest

from data import shards
from data.batch import DTYPES, Batch
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.loader import row_sequence, train_loader, validation_batches
from data.prepare import prepare


@pytest.fixture(autouse=True)
def many_shards(monkeypatch):
  monkeypatch.setattr(shards, 'SHARD_TOKENS', 4000)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  where = tmp_path_factory.mktemp('corpus')
  for name, count in (('a', 90), ('b', 30)):
    rng = random.Random(name)
    texts = [
      f'{name}{i} ' + ' '.join(map(str, rng.choices(range(1000), k=rng.randrange(80))))
      for i in range(count)
    ]
    (where / f'{name}.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  return where


def settings(corpus, names='ab', weights=(3.0, 1.0), **kinds):
  chosen = tuple(
    SourceConfig(kind='jsonl', path=f'{corpus}/{name}.jsonl', text_field='text', weight=weight)
    for name, weight in zip(names, weights)
  )
  base = dict(
    sources=chosen,
    tokenizer=TokenizerConfig(kind='byte'),
    clean=CleanConfig(near_duplicates=0.0),
    sequence_length=32,
    batch_size=6,
    validation_fraction=0.2,
    cache_dir=str(corpus / 'cache'),
  )
  return DataConfig(**(base | kinds))


def prepared_and_config(corpus, **kinds):
  config = settings(corpus, **kinds)
  return prepare(config, log=lambda line: None), config


def take(loader, n):
  batches = [next(loader) for _ in range(n)]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def same(one, other):
  return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def row_key(batch, r):
  return (batch.tokens[r].tobytes(), batch.targets[r].tobytes(), batch.segments[r].tobytes())


def pairs(batch):
  """Multiset of (input, target) of a batch or a stack of them."""
  real = batch.segments > 0
  return collections.Counter(zip(batch.tokens[real].tolist(), batch.targets[real].tolist()))


def test_a_batch_says_what_it_says(corpus):
  prepared, config = prepared_and_config(corpus)
  batch = take(train_loader(prepared, config), 20)
  for name, leaf in vars(batch).items():
    assert leaf.dtype == DTYPES[name] and leaf.shape == (20, 6, 32)
  padding = batch.segments == 0
  assert (batch.weights == np.where(padding, 0, 1)).all() and (batch.tokens[padding] == 0).all()
  inside = (batch.segments[..., 1:] == batch.segments[..., :-1]) & ~padding[..., 1:]
  assert (batch.targets[..., :-1][inside] == batch.tokens[..., 1:][inside]).all()
  assert (np.diff(batch.positions)[inside] == 1).all()
  starts = np.concatenate([np.ones((20, 6, 1), bool), np.diff(batch.segments) != 0], -1) & ~padding
  assert (batch.positions[starts] == 0).all()
  assert (np.diff(batch.segments)[~inside & ~padding[..., 1:]] == 1).all()
  assert not (padding[..., :-1] & ~padding[..., 1:]).any()


def test_one_epoch_is_every_pair_once_and_epochs_differ(corpus):
  prepared, config = prepared_and_config(corpus, names='a', weights=(1.0,), batch_size=1)
  rows = len(prepared.train[0])
  assert len(prepared.train[0].shards) > 2
  loader = train_loader(prepared, config)
  first, second = take(loader, rows), take(loader, rows)
  expected = collections.Counter()
  for ids in prepared.train[0].documents():
    expected.update(zip(ids[:-1].tolist(), ids[1:].tolist()))
  assert pairs(first) == pairs(second) == expected
  assert not same(first, second)
  assert not same(first, take(train_loader(prepared, dataclasses.replace(config, seed=1)), rows))
  assert same(first, take(train_loader(prepared, config), rows))


def test_mixture_follows_the_weights_and_epochs_of_each_source(corpus):
  prepared, config = prepared_and_config(corpus)
  names = {}
  for i, source in enumerate(prepared.train):
    for row in range(len(source)):
      batch = Batch.empty(1, config.sequence_length)
      source.fill(row, batch, 0)
      names[row_key(batch, 0)] = i, row
  drawn = []
  loader = train_loader(prepared, config)
  for _ in range(200):
    batch = next(loader)
    drawn += [names[row_key(batch, r)] for r in range(config.batch_size)]
  assert [i for i, _ in drawn].count(0) == 900
  for i, source in enumerate(prepared.train):
    rows = [row for which, row in drawn if which == i]
    epochs = [
      rows[at : at + len(source)] for at in range(0, len(rows) - len(source) + 1, len(source))
    ]
    assert len(epochs) >= 2 and all(sorted(epoch) == list(range(len(source))) for epoch in epochs)
    assert epochs[0] != epochs[1]


class Rows:
  """A source of which only the number of its rows matters."""

  weight = 1.0

  def __len__(self):
    return 30


def test_no_source_has_the_order_of_another_in_any_epoch(corpus):
  """Sources of as many rows: an epoch's order is a seed's, and none of theirs is the same."""
  prepared = types.SimpleNamespace(train=(Rows(), Rows(), Rows()))
  sequence = row_sequence(prepared, settings(corpus))
  drawn = [sequence[i] for i in range(3 * 30 * 4)]
  orders = []
  for source in range(3):
    rows = [row for which, row in drawn if which == source]
    orders += [tuple(rows[at : at + 30]) for at in range(0, 120, 30)]
  assert all(sorted(order) == list(range(30)) for order in orders)
  assert len(set(orders)) == 12


def spread(parts, shares):
  """The rows of several processes back in the places that each was given."""
  whole = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-2), *parts)
  return jax.tree.map(lambda leaf: leaf[..., np.argsort(np.concatenate(shares)), :], whole)


@pytest.mark.parametrize(
  'shares', [[[0, 1, 2], [3, 4, 5]], [[0, 3, 4], [1, 2, 5]], [[5], [0, 2], [1, 3, 4]]], ids=str
)
def test_processes_share_out_the_same_batches(corpus, shares):
  prepared, config = prepared_and_config(corpus)
  alone = take(train_loader(prepared, config), 7)
  assert same(
    alone, spread([take(train_loader(prepared, config, rows), 7) for rows in shares], shares)
  )
  alone = list(validation_batches(prepared, config))
  parts = [list(validation_batches(prepared, config, rows)) for rows in shares]
  assert all(
    same(whole, spread(pieces, shares)) for whole, *pieces in zip(alone, *parts, strict=True)
  )


@pytest.mark.parametrize('steps', [0, 1, 5, 40])
def test_resuming_with_other_processes_and_batch_size_repeats_and_skips_nothing(corpus, steps):
  prepared, config = prepared_and_config(corpus)
  uninterrupted = take(train_loader(prepared, config), steps + 6)
  first = train_loader(prepared, config, range(3, 6))
  for _ in range(steps):
    next(first)
  state = json.loads(json.dumps(first.state()))
  assert state['examples'] == steps * config.batch_size
  parts = []
  for p in range(3):
    loader = train_loader(prepared, config, range(2 * p, 2 * p + 2))
    next(loader)  # a loader that has already been used
    loader.restore(state)
    parts.append(take(loader, 6))
  rest = jax.tree.map(lambda leaf: leaf[steps:], uninterrupted)
  assert same(rest, jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts))
  smaller = train_loader(prepared, dataclasses.replace(config, batch_size=4))
  smaller.restore(state)

  def flat(tree):
    return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), tree)

  assert same(flat(rest), flat(take(smaller, 9)))


def test_state_of_other_data_is_refused(corpus):
  prepared, config = prepared_and_config(corpus)
  state = train_loader(prepared, config).state()
  for change in (dict(seed=5), dict(weights=(1.0, 1.0)), dict(sequence_length=16)):
    other, changed = prepared_and_config(corpus, **change)
    with pytest.raises(ValueError, match='data order has changed.*then.*now'):
      train_loader(other, changed).restore(state)


def test_validation_is_every_pair_once_in_order_and_again(corpus):
  prepared, config = prepared_and_config(corpus)
  batches = validation_batches(prepared, config)
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
  assert len(batches) == len(stacked.tokens)
  real = stacked.segments > 0
  documents = [ids.tolist() for ids in prepared.validation.documents()]
  assert stacked.tokens[real].tolist() == [token for ids in documents for token in ids[:-1]]
  assert stacked.targets[real].tolist() == [token for ids in documents for token in ids[1:]]
  assert real.sum() == prepared.report['validation']['tokens']
  assert same(stacked, jax.tree.map(lambda *leaves: np.stack(leaves), *batches))


def test_batch_is_a_pytree():
  batch = Batch.empty(2, 3)
  assert len(jax.tree.leaves(batch)) == 5
  assert isinstance(jax.tree.map(lambda leaf: leaf + 1, batch), Batch)
  assert jax.jit(lambda b: b.targets.sum() + b.weights.sum())(batch) == 0
