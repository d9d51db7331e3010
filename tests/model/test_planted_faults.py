"""Can the laws fail? Each fault that is planted here must break the law that exists to catch it."""
import dataclasses

import jax
import jax.numpy as jnp
import laws
import pytest

from kernels.mask import Mask, Relative
from model import attention, cache, layers, transformer


def allow_all(self, T, S):
  return jnp.ones((1, T, S), bool)


def without(field):
  """Mask.allowed that forgets a field."""
  original = Mask.allowed
  empty = {'window': {'window': 0}, 'segments': {'query_segments': None, 'key_segments': None}}[field]
  return lambda self, T, S: original(dataclasses.replace(self, **empty), T, S)


def off_by_one(self, T, S):
  """A query sees the next token too."""
  index = jnp.arange(T)[None]
  return index[:, None, :] <= index[:, :, None] + 1


def shifted_when_decoding(positions, *args):
  return layers.rope_angles(positions + (positions.shape[1] == 1), *args)


def unguarded_append(self, k, v, heads):
  """Slots.append without the guard against what unused slots hold."""
  new, _ = cache_append(self, k, v, heads=heads)
  return new, tuple(jax.lax.dynamic_index_in_dim(x, self.layer, 0, keepdims=False) for x in new.cache.buffers)


def append_ahead(self, k, v, heads):
  """Slots.append that leaves a slot free at every call."""
  ahead = lambda slots, lengths: dataclasses.replace(slots, cache=dataclasses.replace(slots.cache, lengths=lengths))
  new, read = cache_append(ahead(self, self.cache.lengths + 1), k, v, heads=heads)
  return ahead(new, self.cache.lengths), read


def maskless(self, T):
  """Cache.mask that lets everything be seen."""
  return dataclasses.replace(cache_mask(self, T), causal=False)


def rotate_prompts_only(x, angles):
  return layers.rotate(x, angles) if x.shape[1] > 1 else x


def scores_from_the_start(self, q, k):
  """Relative.scores that takes new queries for the first ones of their row."""
  return relative_scores(self, q - q[:, :1], k)


relative_scores = Relative.scores
cache_append, cache_mask = cache.Slots.append, cache.Cache.mask

FAULTS = {
    'dropped mask': (Mask, 'allowed', allow_all, laws.check_causality, 'llama'),
    'mask off by one': (Mask, 'allowed', off_by_one, laws.check_causality, 'llama'),
    'dropped window': (Mask, 'allowed', without('window'), laws.check_window, 'mistral'),
    'dropped segments': (Mask, 'allowed', without('segments'), laws.check_segments, 'llama'),
    'dropped cache mask': (cache.Cache, 'mask', maskless, laws.check_cached_decode, 'llama'),
    'shifted positions': (transformer, 'rope_angles', shifted_when_decoding, laws.check_cached_decode, 'llama'),
    'keys not rotated': (attention, 'rotate', rotate_prompts_only, laws.check_cached_decode, 'llama'),
    'tokens written in the wrong slot': (cache.Slots, 'append', append_ahead, laws.check_cached_decode, 'llama'),
    'no guard against unused slots': (cache.Slots, 'append', unguarded_append, laws.check_unused_slots, 'llama'),
    'distances from the wrong query': (Relative, 'scores', scores_from_the_start, laws.check_cached_decode, 'relative'),
    'latent keys not rotated': (attention, 'rotate', rotate_prompts_only, laws.check_cached_decode, 'deepseek'),
    'padding is seen': (Mask, 'allowed', allow_all, laws.check_padding_and_neighbours, 'llama'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_law_catches(fault, monkeypatch):
  where, name, replacement, law, config = FAULTS[fault]
  monkeypatch.setattr(where, name, replacement)
  with pytest.raises(AssertionError):
    law(laws.make_config(config, attention='reference'))
