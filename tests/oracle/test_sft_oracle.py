"""Is what TRL learns of examples what we learn of them? Its collator pads, ours packs: the loss and
its gradient are the same.
"""

import jax
import numpy as np
import pytest

from data import shards
from data.batch import Batch
from model import checkpoint
from objectives.sft import SFT
from tests.goldens import ours

pytestmark = pytest.mark.oracle
pytest.importorskip('torch', reason='torch is not installed')
pytest.importorskip('transformers', reason='transformers is not installed')
pytest.importorskip('trl', reason='trl is not installed')

T = 24
# Prompts and completions, in tokens.
LENGTHS = [(3, 2), (9, 15), (1, 12), (5, 1), (2, 20), (7, 7), (11, 3), (4, 4)]


def examples():
  """Ids [n] and whether each is of the completion."""
  draw = np.random.default_rng(4)
  for prompt, completion in LENGTHS:
    ids = draw.integers(3, 60, prompt + completion).astype(np.int32)
    yield ids, np.arange(len(ids)) >= prompt


def packed(directory) -> Batch:
  """The rows that a run would read, as one batch."""
  with shards.ShardWriter(directory, 'train-0', 64, scored=True) as writer:
    for ids, completion in examples():
      writer.add(ids, completion)
  (entry,) = writer.shards
  plan = shards.Rows(T).write_plan(directory, directory, entry)
  shard = shards.PackedShard(directory, directory, entry['name'], entry['dtype'], True)
  source = shards.PackedSource('pairs', 1.0, (shard,), np.array([plan['rows']]))
  batch = Batch.empty(len(source), T)
  for row in range(len(source)):
    source.fill(row, batch, row)
  return batch


def test_the_loss_and_its_gradient_are_those_of_trl_s_collator(tmp_path):
  import torch
  from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

  from tests.goldens import make

  theirs = make.build('llama', tmp_path / 'model')
  collator = DataCollatorForLanguageModeling(pad_token_id=0)
  rows = [
    {'input_ids': ids.tolist(), 'labels': np.where(completion, ids, -100).tolist()}
    for ids, completion in examples()
  ]
  loss = theirs.train()(**collator(rows)).loss
  loss.backward()
  gradients = [p.grad for p in theirs.parameters() if p.grad is not None]
  norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))

  (tmp_path / 'rows').mkdir()
  batch = packed(tmp_path / 'rows')
  assert len(batch.tokens) < len(LENGTHS)
  assert batch.weights.sum() == sum(completion for _, completion in LENGTHS)
  model, objective = checkpoint.load(tmp_path / 'model', mesh=ours.MESH)[1], SFT()

  def mean(model, batch):
    total, weight = objective.loss({'policy': model}, batch)[objective.term]
    return total / weight

  with jax.set_mesh(ours.MESH):
    placed = jax.tree.map(ours.put, batch)
    value, gradient = jax.jit(jax.value_and_grad(mean))(model, placed)
  np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
  squares = sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(gradient))
  np.testing.assert_allclose(np.sqrt(squares), norm.item(), rtol=1e-4)
