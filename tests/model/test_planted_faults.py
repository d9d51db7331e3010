"""Can the laws fail? Each fault that is planted here must break the law that exists to catch it."""

import dataclasses

import jax.numpy as jnp
import laws
import pytest

from kernels import cached
from kernels.mask import Mask, Relative
from model import attention, cache, layers, transformer
from model.execution import ExecutionConfig


def allow_all(self, T, S):
  return jnp.ones((1, T, S), bool)


def without(field):
  """Mask.allowed that forgets a field."""
  original = Mask.allowed
  empty = {'window': {'window': 0}, 'segments': {'query_segments': None, 'key_segments': None}}[
    field
  ]
  return lambda self, T, S: original(dataclasses.replace(self, **empty), T, S)


def off_by_one(self, T, S):
  """A query sees the next token too."""
  index = jnp.arange(T)[None]
  return index[:, None, :] <= index[:, :, None] + 1


def shifted_when_decoding(positions, *args):
  return layers.rope_angles(positions + (positions.shape[1] == 1), *args)


def look_as(change):
  """Slots.look with other (lengths, queries)."""

  def look(self, q, **how):
    queries = self.lengths[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    return cached.attention(
      q, self.held, self.layer, *change(self, self.lengths + self.counts, queries), **how
    )

  return look


def append_ahead(self, keys, values, window=0):
  """Slots.append that leaves a slot free at every call."""
  appended = cache_append(dataclasses.replace(self, lengths=self.lengths + 1), keys, values, window)
  return dataclasses.replace(appended, lengths=self.lengths)


def as_if_fresh(self, keys, values, window=0):
  """Slots.append that begins anew at every call."""
  appended = cache_append(dataclasses.replace(self, fresh=True), keys, values, window)
  return dataclasses.replace(appended, fresh=self.fresh)


def padding_counts(held, slots, lengths):
  """kernels.cached.positions that takes the longest row for all."""
  return cached_positions(held, slots, jnp.broadcast_to(lengths.max(), lengths.shape))


def rotate_prompts_only(x, angles):
  return layers.rotate(x, angles) if x.shape[1] > 1 else x


def scores_from_the_start(self, q, k):
  """Relative.scores that takes new queries for the first ones of their row."""
  return relative_scores(self, q - q[:, :1], k)


relative_scores = Relative.scores
cache_append, cached_positions = cache.Slots.append, cached.positions

FAULTS = {
  'dropped mask': (Mask, 'allowed', allow_all, laws.check_causality, 'llama'),
  'mask off by one': (Mask, 'allowed', off_by_one, laws.check_causality, 'llama'),
  'dropped window': (Mask, 'allowed', without('window'), laws.check_window, 'mistral'),
  'dropped segments': (Mask, 'allowed', without('segments'), laws.check_segments, 'llama'),
  'dropped cache mask': (
    cache.Slots,
    'look',
    look_as(lambda self, lengths, queries: (lengths, queries * 0 + lengths[:, None])),
    laws.check_cached_decode,
    'llama',
  ),
  'shifted positions': (
    transformer,
    'rope_angles',
    shifted_when_decoding,
    laws.check_cached_decode,
    'llama',
  ),
  'keys not rotated': (attention, 'rotate', rotate_prompts_only, laws.check_cached_decode, 'llama'),
  'tokens written in the wrong slot': (
    cache.Slots,
    'append',
    append_ahead,
    laws.check_cached_decode,
    'llama',
  ),
  'no guard against unused slots': (
    cache.Slots,
    'look',
    look_as(lambda self, lengths, queries: (lengths * 0 + self.capacity, queries)),
    laws.check_unused_slots,
    'llama',
  ),
  'tokens written over others': (cache.Slots, 'append', as_if_fresh, laws.check_appending, 'llama'),
  'a ring that is as far for all rows': (
    cached,
    'positions',
    padding_counts,
    laws.check_appending,
    'mistral',
  ),
  'a ring without room for what is appended': (
    cache,
    '_whole',
    lambda slots: min(slots, 8),
    laws.check_appending,
    'mistral',
  ),
  'distances from the wrong query': (
    Relative,
    'scores',
    scores_from_the_start,
    laws.check_cached_decode,
    'relative',
  ),
  'latent keys not rotated': (
    attention,
    'rotate',
    rotate_prompts_only,
    laws.check_cached_decode,
    'deepseek',
  ),
  'padding is seen': (Mask, 'allowed', allow_all, laws.check_padding_and_neighbours, 'llama'),
}


@pytest.mark.costly
@pytest.mark.parametrize('fault', FAULTS)
def test_a_law_catches(fault, monkeypatch):
  where, name, replacement, law, config = FAULTS[fault]
  monkeypatch.setattr(where, name, replacement)
  with pytest.raises(AssertionError):
    law(laws.make_config(config, execution=ExecutionConfig(attention='reference')))
