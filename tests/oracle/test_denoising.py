"""Is the loss of noise put right that of transformers, on the same examples?"""

import functools

import jax
import numpy as np
import pytest

from data.chunks import ChunkTokens, uniform
from data.masking import Masking
from data.spans import Lengths, Spans
from model import checkpoint
from objectives.denoise import MaskedLM, SpanCorruption
from tests.goldens import ours

pytestmark = pytest.mark.oracle
pytest.importorskip('torch', reason='torch is not installed')
pytest.importorskip('transformers', reason='transformers is not installed')

ROWS = 4


def batch_of(noise):
  batch, draw = noise.empty(ROWS), np.random.default_rng(3)
  for row in range(ROWS):
    tokens = draw.integers(2, 50, noise.length).astype(np.int32)
    chunk = ChunkTokens(tokens, np.arange(noise.length), np.ones(noise.length, np.int32))
    noise.fill(chunk, functools.partial(uniform, 0, 0, row), batch, row)
  return batch


def models(name, tmp_path):
  from tests.goldens import make

  theirs = make.build(name, tmp_path / 'model')
  return theirs, checkpoint.load(tmp_path / 'model', mesh=ours.MESH)[1]


def judged(objective, model, batch):
  with jax.set_mesh(ours.MESH):
    placed = jax.tree.map(ours.put, batch)
    return {
      name: float(x) for name, x in jax.jit(objective.judged)({'policy': model}, placed).items()
    }


def long(x):
  import torch

  return torch.tensor(x.astype(np.int64))


@pytest.mark.parametrize('name', ['t5', 't5_v1_1'])
def test_spans(name, tmp_path):
  """Their decoder's inputs are made by transformers from the labels."""
  theirs, model = models(name, tmp_path)
  lengths = Lengths.of_source(24, 0.3, 2.0)
  batch = batch_of(Spans(lengths, '', tuple(range(66, 50, -1)), eos=1, start=0))
  expected = theirs(input_ids=long(batch.source), labels=long(batch.targets)).loss.item()
  sums = judged(SpanCorruption(), model, batch)
  assert sums['tokens'] == ROWS * lengths.target
  np.testing.assert_allclose(sums['nll'] / sums['tokens'], expected, rtol=1e-5)


def test_masks(tmp_path):
  """What is not scored has a label that transformers leaves out."""
  theirs, model = models('bert', tmp_path)
  batch = batch_of(Masking(24, '', 0.3, 0.8, 0.1, np.arange(4, 66), 66))
  labels = np.where(batch.weights > 0, batch.targets, -100)
  expected = theirs(input_ids=long(batch.tokens), labels=long(labels)).loss.item()
  sums = judged(MaskedLM(), model, batch)
  assert 0 < sums['tokens'] < ROWS * 24
  np.testing.assert_allclose(sums['nll'] / sums['tokens'], expected, rtol=1e-5)
