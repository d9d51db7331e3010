"""To how many tokens a prompt is padded: is it rounding to logits, and nothing to draws?"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from decode import loaded, loop
from decode.options import Options
from model.execution import ExecutionConfig
from tests.decode.small import config_of, generator_of

CAPACITY = 256
# Some, and all.
BUCKETS = [(32, 256), pytest.param((32, 64, 128, 256), marks=pytest.mark.slow)]
PROMPTS = ['def main(', 'x', 'naïve, and longer']
OPTIONS = Options(seed=5, temperature=[0.7, 1.0, 1.3], top_p=0.95, repetition_penalty=1.2, chunk=16)


@functools.cache
def generator_in(dtype):
  sizes = dict(width=64, heads=4, feed_forward=96)
  return generator_of(config_of(CAPACITY, **sizes, execution=ExecutionConfig(dtype=dtype)))


def states_in(dtype, buckets, monkeypatch):
  """After the prompts, read in each bucket."""
  generator = generator_in(dtype)
  encoded = [generator.encoded(prompt) for prompt in PROMPTS]
  stop_at = np.array([len(ids) + 64 for ids in encoded], np.int32)
  shapes, prefill, choose, states = [], loop.prefill, loaded.bucket, []

  def reading(model, tokens, *given, **how):
    shapes.append(tokens.shape)
    return prefill(model, tokens, *given, **how)

  with monkeypatch.context() as patch:
    patch.setattr(loop, 'prefill', reading)
    for size in buckets:
      patch.setattr(loaded, 'bucket', functools.partial(choose, smallest=size))
      states.append(generator.read(encoded, CAPACITY, stop_at))
  assert shapes == [(len(PROMPTS), size) for size in buckets]
  return states


def chunk_of(dtype, state, steps):
  """What the prompts' rows write next; the state is used up."""
  generator = generator_in(dtype)
  rules, *_ = generator.rules(OPTIONS, len(PROMPTS), len(PROMPTS))
  chunk = generator.advance(state, generator.placed(rules), OPTIONS, steps)[1]
  return jax.tree.map(np.asarray, chunk)


@pytest.mark.slow
@pytest.mark.parametrize('buckets', BUCKETS)
@pytest.mark.parametrize(
  'dtype, bound',
  [('float32', 1e-5), pytest.param('bfloat16', 1e-1, marks=pytest.mark.slow)],
)
def test_logits_of_other_buckets_differ_by_rounding(dtype, bound, buckets, monkeypatch):
  """The next token's, and, after the same tokens, those behind it."""
  states = states_in(dtype, buckets, monkeypatch)
  logits = [np.asarray(state.logits)[:, :259] for state in states]
  assert all(np.isfinite(x).all() and x.std() > 0.5 for x in logits), 'too dull to tell anything'
  for other in logits[1:]:
    np.testing.assert_allclose(other, logits[0], rtol=0, atol=bound)

  first, *others = [chunk_of(dtype, state, 16) for state in states]
  for other in others:
    for row in range(len(PROMPTS)):
      apart = np.flatnonzero(other.ids[row] != first.ids[row])
      same = apart[0] if len(apart) else 16
      np.testing.assert_allclose(other.raw[row, :same], first.raw[row, :same], rtol=0, atol=bound)
      # In f32 no two tokens here are as near to each other as rounding brings them.
      assert same == 16 or dtype == 'bfloat16'


@pytest.mark.slow
@pytest.mark.parametrize('buckets', BUCKETS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_draws_of_other_buckets_are_the_same(dtype, buckets, monkeypatch):
  """By the same logits the same token, bit for bit: what is thrown knows the row's seed and the
  token's place, and nothing of how the prompt was read.
  """
  states = states_in(dtype, buckets, monkeypatch)
  logits = np.asarray(states[0].logits)

  def by_the_same(state):
    same = jax.device_put(logits, state.logits.sharding)
    return chunk_of(dtype, dataclasses.replace(state, logits=same), 1)

  first, *others = map(by_the_same, states)
  assert first.real[:, 0].all() and len({*first.ids[:, 0].tolist()}) > 1
  for other in others:
    for name in ('ids', 'raw', 'processed'):
      np.testing.assert_array_equal(getattr(other, name)[:, 0], getattr(first, name)[:, 0])
