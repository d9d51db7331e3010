"""Does what balances experts weigh the same, however few of a batch's tokens are learned from?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.preferences import ChoiceBatch
from model import heads, router, transformer
from model.config import MoEConfig
from objectives.classify import Classify
from objectives.classify_head import ClassifyHead
from objectives.denoise import MaskedLM
from objectives.distil import Distil
from objectives.experts import EXPERTS
from objectives.next_token import NextToken
from objectives.preference import Preference
from objectives.reward import Reward
from objectives.sft import SFT
from parallel.pipeline import PipelineConfig
from tests.training.conftest import B, T, V, quickly, tiny
from training import state as states

MOE = MoEConfig(experts=4, balance_loss=0.3, z_loss=0.1)
# Each of the same tokens, of which pairs learn from the second half of every segment.
KINDS = {
  'next_token': NextToken(),
  'distil': Distil(teacher='t'),
  'preference': Preference(variant='simpo', reference='none'),
  'reward': Reward(),
  'classify_head': ClassifyHead(),
}


def batch_of(learned: int) -> ChoiceBatch:
  """Two segments a row, of which the last `learned` tokens of each are learned from."""
  draw, half = np.random.default_rng(0), T // 2
  batch = ChoiceBatch.empty(B, T)
  batch.tokens[:] = draw.integers(3, V, (B, T))
  batch.targets[:] = draw.integers(0, 2, (B, T))
  batch.positions[:] = np.tile(np.arange(half), 2)
  batch.segments[:] = np.repeat([1, 2], half)
  batch.weights[:] = np.tile(np.arange(half) >= half - learned, 2)
  return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize('frozen', [(), ('*.selection_bias',)])
def test_a_frozen_selection_bias_stays_where_it_is(frozen):
  """What a step balances is the trained part of a model, which has None in its place."""
  moe = dataclasses.replace(MOE, selection_bias=True, bias_rate=0.1)
  config = tiny(model={'layers': 1, 'moe': moe}, train={'frozen': frozen})
  policy = jax.eval_shape(functools.partial(transformer.init, config.model, 0))
  trained, _ = states.rule(config).parted({'policy': policy})
  load = jnp.ones((1, moe.experts))
  after = jax.eval_shape(lambda m: router.balanced(m, load, moe.bias_rate), trained['policy'])
  assert jax.tree.structure(after) == jax.tree.structure(trained['policy'])
  assert (after.stack.blocks[0].feed_forward.selection_bias is None) == bool(frozen)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_its_part_of_the_loss_is_a_mean_over_all_tokens(kind, one_device):
  config = dataclasses.replace(tiny(model={'moe': MOE}), objective=KINDS[kind])
  policy = quickly(jax.jit(functools.partial(transformer.init, config.model, 0)))()
  models = {'policy': policy, 'teacher': policy}
  if kind in ('reward', 'classify_head'):
    labels = 1 if kind == 'reward' else 2
    models['head'] = heads.new(config.model, 0, labels=labels)
  loss = jax.jit(lambda batch: KINDS[kind].loss(models, batch)[EXPERTS])
  report = policy(*(getattr(batch_of(1), name) for name in ('tokens', 'positions', 'segments')))[2]
  by_hand = (report['balance_loss'] + report['router_z_loss']) / (B * T)
  assert by_hand > 0.01
  for learned in (1, T // 2):
    total, weight = loss(batch_of(learned))
    np.testing.assert_allclose(total / weight, by_hand, rtol=1e-5)


def test_a_schedule_of_one_loss_learns_from_all_tokens():
  """Elsewhere the loss that it adds experts' to would be of a few."""
  pipeline = PipelineConfig(schedule='1f1b')
  decoder = tiny(model={'moe': MOE}).model.with_execution(pipeline=pipeline)
  encoder = dataclasses.replace(decoder, causal=False)
  for objective, model in ((SFT(), decoder), (MaskedLM(), encoder), (Classify(), decoder)):
    with pytest.raises(NotImplementedError, match="'1f1b' knows one loss.*balance_loss=0.3"):
      objective.accepts({'policy': model})
  NextToken().accepts({'policy': decoder})
