"""Are loss and gradient of packed pairs those of transformers, on each pair in a row of its own?"""

import types

import jax
import numpy as np
import pytest

from data.batch import SourceBatch
from data.pairs import PairSource
from model import checkpoint
from objectives.seq2seq import Seq2Seq
from tests.goldens import ours

pytestmark = pytest.mark.oracle
torch = pytest.importorskip('torch', reason='torch is not installed')
pytest.importorskip('transformers', reason='transformers is not installed')

LENGTHS = ((7, 4), (5, 9), (11, 3), (1, 1), (8, 6), (4, 2))
ROWS = ((0, 1, 3), (2, 5), (4,))  # the pairs of each
EOS = 1


def pairs():
  draw = np.random.default_rng(5)
  return [[np.append(draw.integers(2, 66, n), EOS) for n in lengths] for lengths in LENGTHS]


def packed() -> SourceBatch:
  """The rows, as data.pairs fills them."""
  made = pairs()
  ids = np.concatenate([side for pair in made for side in pair])
  begins = np.cumsum([0, *(len(source) + len(target) for source, target in made)])
  order = [pair for row in ROWS for pair in row]
  shard = types.SimpleNamespace(
    tokens=ids,
    pieces=np.array([[begins[i], *map(len, made[i])] for i in order]),
    rows=np.cumsum([0, *map(len, ROWS)]),
  )
  source = PairSource('made', 1.0, (shard,), np.array([len(ROWS)]), start=0)
  batch = SourceBatch.empty(len(ROWS), 20, 24)
  for row in range(len(ROWS)):
    source.fill(row, batch, row)
  return batch


def alone():
  """The pairs padded, as a collator of transformers has them: labels are -100 behind a target."""
  made = pairs()
  sources, labels = np.zeros((len(made), 16), np.int64), np.full((len(made), 12), -100)
  for row, (source, target) in enumerate(made):
    sources[row, : len(source)], labels[row, : len(target)] = source, target
  return torch.tensor(sources), torch.tensor((sources > 0).astype(np.int64)), torch.tensor(labels)


@pytest.mark.parametrize('name', ['t5', 't5_v1_1'])
def test_loss_and_gradient(name, tmp_path):
  """Their decoder's inputs are made by transformers from the labels."""
  from tests.goldens import make

  theirs = make.build(name, tmp_path / 'model')
  sources, mask, labels = alone()
  expected = theirs(input_ids=sources, attention_mask=mask, labels=labels).loss
  expected.backward()
  norm = torch.sqrt(sum((p.grad**2).sum() for p in theirs.parameters() if p.grad is not None))

  _, model = checkpoint.load(tmp_path / 'model', mesh=ours.MESH)
  with jax.set_mesh(ours.MESH):
    batch = jax.tree.map(ours.put, packed())

    def mean(model):
      total, weight = Seq2Seq().loss({'policy': model}, batch)[Seq2Seq().term]
      return total / weight

    loss, gradient = jax.jit(jax.value_and_grad(mean))(model)
  assert int(batch.weights.sum()) == int((labels >= 0).sum())
  np.testing.assert_allclose(float(loss), expected.item(), rtol=1e-5)
  ours_norm = np.sqrt(sum(np.square(np.asarray(g)).sum() for g in jax.tree.leaves(gradient)))
  np.testing.assert_allclose(ours_norm, norm.item(), rtol=1e-4)
