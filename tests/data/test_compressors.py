"""Are held-out documents compressed beside the steps, and no more than can be waited for?"""

import threading
import types

import jax.numpy as jnp
import pytest

from data import compressors
from training import evaluation

TEXTS = [f'{i} some text, and some more of it' for i in range(12)]


def data(texts, size=None):
  return types.SimpleNamespace(
    validation_documents=lambda: iter(texts),
    validation_bytes=size or sum(len(text.encode()) for text in texts),
  )


def test_all_are_compressed_where_they_are_few():
  waited = compressors.beside(data(TEXTS), lambda line: line)
  assert waited() == waited() == compressors.compression_baselines(TEXTS)
  assert compressors.beside(data([], 1), pytest.fail)() == {}


def test_of_many_a_part_is_and_that_is_said():
  lines = []
  waited = compressors.beside(data(TEXTS, 2 * compressors.LARGEST + 1), lines.append)
  assert waited() == compressors.compression_baselines(TEXTS[::3])
  assert 'are of one of 3 held-out documents: all are 537 MB' in lines[-1]


def test_what_fails_is_heard():
  with pytest.raises(ValueError, match='no bytes to compress'):
    compressors.beside(data(['', '']), lambda line: line)()


class Objective:
  """Two batches of ones, and their sum."""

  def validation_batches(self, prepared, config, rows):
    return [jnp.ones(()), jnp.ones(())]

  def judged(self, models, batch):
    return {'validation_loss': batch}

  def verdict(self, sums, prepared):
    return dict(sums)


def test_only_the_end_of_a_run_waits_for_it(monkeypatch):
  """An evaluation in its midst is done while documents are still being compressed."""
  may_end, lines = threading.Event(), []

  def slow(documents):
    may_end.wait(60)
    return {'gzip': 2.0, 'xz': 1.0}

  monkeypatch.setattr(compressors, 'compression_baselines', slow)
  monkeypatch.setattr(evaluation.states, 'applied', lambda config, models: models)
  config = types.SimpleNamespace(objective=Objective(), data=None)
  put = type('Put', (), {'rows': (), '__call__': lambda self, batch: batch})()
  evaluate = evaluation.make_evaluate(config, data(TEXTS), put, lines.append)
  assert evaluate({}) == {'validation_loss': 2.0} and not lines
  may_end.set()
  bits = {'gzip_bits_per_byte': 2.0, 'xz_bits_per_byte': 1.0}
  assert evaluate({}, go_on=True) == {'validation_loss': 2.0} | bits
