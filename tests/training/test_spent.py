"""Is what training is said to compute for a token what its parts come to, counted by hand?"""

import dataclasses

import pytest

from model.adaptation import AdapterConfig
from model.config import MoEConfig
from model.flops import forward_flops_per_token
from objectives.policy import GRPO
from objectives.ppo import PPO
from tests.training.conftest import tiny
from training.spent import flops_per_token

MOE = MoEConfig(experts=4, per_token=1, feed_forward=16)


def forward(config):
  return forward_flops_per_token(config.model, config.data.sequence_length)


def test_of_experts_a_token_meets_the_adapters_of_its_own(one_device):
  """Rank times both sides of gate, up and down, of 1 of 4 experts."""
  rank = 2
  adapter = AdapterConfig(kind='lora', rank=rank, targets=('*.feed_forward.*',))
  config = dataclasses.replace(tiny(model={'moe': MOE}), adapter=adapter)
  m = config.model
  beside = flops_per_token(config) - 2 * forward(config)
  assert beside == pytest.approx(6 * m.L * 3 * rank * (m.D + MOE.feed_forward) * MOE.per_token)


@pytest.mark.parametrize('tied', [False, True])
def test_what_is_not_trained_has_no_gradient(one_device, tied):
  """Of the stack one by what goes in is needed, of the head alone none."""
  config = tiny(model={'tie_embeddings': tied})
  m = config.model

  def passes(**rule):
    train = dataclasses.replace(config.train, **rule)
    return flops_per_token(dataclasses.replace(config, train=train)) / forward(config)

  assert passes() == 3
  blocks = passes(trained=('policy.stack.*',))
  assert 2 < blocks < 3
  if not tied:
    head = passes(trained=('policy.head.*',))
    assert 1 < head < 2
    table = m.V * m.D
    # Of a table that is looked up there is no product to leave out.
    assert passes(frozen=('policy.embedding.*',)) == pytest.approx(3)
    assert (head - 1) / (blocks - 2) == pytest.approx(table / (m.L * per_layer(m)), rel=0.05)


def per_layer(m):
  """Weights of a layer's matrices."""
  return 2 * m.D * m.H * (m.N + m.K) + (3 if m.gated else 2) * m.D * m.F


def test_a_policy_scores_answers_and_its_critic_no_vocabulary(one_device):
  reward = ('configs/rewards/brackets.py',)
  config = tiny()
  m, T, new = config.model, config.data.sequence_length, config.data.sequence_length // 2
  head, body = 2 * m.D * m.V, forward(config) - 2 * m.D * m.V
  policy = body + head * new / T
  given = {'reward': reward, 'max_new_tokens': new, 'group': 2}
  alone = dataclasses.replace(config, objective=GRPO(beta=0.0, **given))
  assert flops_per_token(alone) == pytest.approx(3 * policy)
  given = {'reward': reward, 'max_new_tokens': new, 'epochs': 2}
  actor = PPO(critic='separate', **given)
  # The reference, and before an epoch of two the critic, say something of a rollout.
  value_head = 6 * (m.D + 1)
  found = flops_per_token(dataclasses.replace(config, objective=actor))
  assert found == pytest.approx((3 + 1 / 2) * policy + (3 + 1 / 2) * body + value_head)
  shared = flops_per_token(dataclasses.replace(config, objective=PPO(critic='shared', **given)))
  assert shared == pytest.approx((3 + 1 / 2 + 1 / 2) * policy + value_head)
