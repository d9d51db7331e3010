"""Is a prompt that is read once for its group what it is in a row of its own with each answer?"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_objective import Run
from test_policy import PENALISED, config, logs_by_hand
from test_rollouts import FAMILY, Started, config as rollout_config, place  # noqa: F401, a fixture

from kernels.mask import Mask
from model import flops
from model.parts import LatentConfig, MoEConfig
from objectives.rollout import Rollouts
from objectives.rollout_rows import AnswerRows, RolloutBatch
from objectives.rollout_seq2seq import GRPOSeq2Seq
from parallel import axes
from tests.training.conftest import B, T, V, assert_close

G, NEW = PENALISED.group, PENALISED.max_new_tokens
SHARED = dataclasses.replace(PENALISED, shared_prompts=True)


def groups_of(groups=B // G, seed=0) -> RolloutBatch:
  """Answers of 1 to all tokens, G to each prompt, one of which fills its place up; one without a
  reward, the first of its group, and what counts nowhere is not to be read.
  """
  draw, form = np.random.default_rng(seed), AnswerRows(T)
  batch = form.empty(groups * G)
  for row in range(len(batch.tokens)):
    if row % G == 0:
      prompt = draw.integers(3, V, (T - NEW, 1, 4)[row // G % 3]).tolist()
    answer = draw.integers(3, V, 1 + row * 3 % NEW).tolist()
    here = form.fill(batch, row, prompt, answer)
    batch.weights[row, here] = row != G
    for name, scale in (('behaviour', 0.2), ('reference', 0.3), ('advantages', 0.5)):
      getattr(batch, name)[row, here] = draw.normal(size=len(answer)) * scale
    batch.behaviour[row, here] -= 5.5  # about what a new model says
    batch.reference[row, here] -= 5.5
    at = row, here.stop - 1
    batch.last[at], batch.lengths[at], batch.failed[at] = 1, len(answer), row == G
    batch.scores[at] = draw.normal()
  return batch


NETWORKS = {
  'windows': {'window': 3, 'global_every': 2, 'sinks': True},
  'latents': {'kv_heads': 4, 'latent': LatentConfig(width=6, rope_width=4, value_width=3)},
  'distances': {'position': 'relative', 'relative_buckets': 8, 'relative_distance': 12},
  'places': {'position': 'learned'},
  'experts': {'moe': MoEConfig(experts=4, feed_forward=16)},
}


def said_of(run, batch, objective):
  with jax.set_mesh(run.mesh):
    put = jax.device_put(batch, jax.NamedSharding(run.mesh, axes.spec('batch', 'length')))
    said = jax.jit(objective.said, static_argnums=2)(run.state.models, put, ('policy',))
  return np.asarray(said['policy'])


@pytest.mark.costly
@pytest.mark.parametrize('network', [{}, *NETWORKS.values()], ids=['plain', *NETWORKS])
def test_log_probabilities_are_those_of_rows_of_their_own(one_device, network):
  run, batch = Run(config(SHARED, model=network)), groups_of(3)
  expected = logs_by_hand(run.state.models['policy'], batch, SHARED.temperature)
  expected = np.where(batch.weights > 0, np.asarray(expected), 0)
  said = said_of(run, batch, SHARED)
  np.testing.assert_allclose(said, expected, atol=2e-5)
  assert (said != 0).sum() == batch.weights.sum()


def test_a_prompt_meets_the_layers_once_and_the_head_never(one_device):
  run, batch = Run(config(SHARED)), groups_of()
  made = str(jax.make_jaxpr(SHARED.sums)(run.state.models, batch))
  shared, D = T - NEW + G * NEW, run.config.model.D
  assert f'f32[{B // G},{shared},{D}]' in made and f'f32[{B},{T},{D}]' not in made
  assert f'f32[{B},{NEW},{V}]' in made and f'f32[{B // G},{shared},{V}]' not in made


@pytest.mark.slow
@pytest.mark.parametrize(
  'parts',
  [
    {'train': {'accumulation': 2}},
    {'mesh': {'data': 2, 'tensor': 2}},
    {'mesh': {'fsdp': 4}},
    {'mesh': {'stage': 2}},
    *({'model': NETWORKS[name]} for name in ('windows', 'latents', 'experts')),
  ],
  ids=['parts', 'tensor', 'fsdp', 'stages', 'windows', 'latents', 'experts'],
)
def test_a_step_is_that_of_rows_of_their_own(parts):
  """On one device, whatever the parts and the devices: metrics, and the policy after it."""
  batch, data = groups_of(4), {'data': {'batch_size': 16}}
  network = {'model': parts['model']} if 'model' in parts else {}
  whole = Run(config(PENALISED, **data, **network))
  devices = int(np.prod(list(parts.get('mesh', {}).values())))
  run = Run(config(SHARED, **data, **parts), devices)
  metrics, again = whole.go([batch])[0], run.go([batch])[0]
  for name in metrics.keys() - {'expert_load', 'expert_load_max'}:  # a prompt is routed once
    np.testing.assert_allclose(metrics[name], again[name], rtol=2e-4, atol=2e-5, err_msg=name)
  # Rows of the embedding move by up to 10.
  assert_close(jax.device_get(whole.state.models), jax.device_get(run.state.models), 3e-5)


def test_tokens_and_flops_are_those_that_are_read():
  """By hand: a trunk's are of one, a branch's see the trunk and each other."""
  batch = groups_of(3)
  lengths = batch.lengths.sum(1).reshape(-1, G).sum(1)
  # The last token of a prompt stands in every branch, the last of an answer nowhere.
  begins = np.array([T - NEW, 1, 4]) - 1
  assert SHARED.tokens(batch) == SHARED.weights(batch)['experts'] == (lengths + begins).sum()
  padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:G])]), batch)
  assert SHARED.tokens(padded) == SHARED.tokens(batch)

  made = config(SHARED, model={'window': 5, 'global_every': 2})
  network, P = made.model, T - NEW
  scores = 0
  for kind in network.kinds:
    seen = np.asarray(
      Mask(window=kind.window, branches=G, trunk=P).allowed(P + G * NEW, P + G * NEW)
    )
    scores += seen.sum() * 2 * network.N * 2 * network.H
  dense = 2 * network.L * (flops.attention_weights(network) + 3 * network.D * network.F)
  head = 2 * network.D * network.V * G * NEW
  by_hand = scores + dense * (P + G * NEW) + head
  places = made.objective.row_tokens(made.data) * G
  assert places == P + G * NEW
  np.testing.assert_allclose(SHARED.forward_flops(network, made.data, None) * places, by_hand)


@pytest.mark.slow
def test_groups_stay_together_from_rollout_to_rollout(place, tmp_path):  # noqa: F811
  """In every minibatch, and in what is left of a rollout, which only a run that shares goes on
  from.
  """
  objective = dataclasses.replace(FAMILY, shared_prompts=True)
  with Started(rollout_config(place, objective), tmp_path) as run:
    batches = [run.rollouts.take(run.state)]
    position = json.loads(json.dumps(run.rollouts.state()))
    batches += [run.rollouts.take(run.state) for _ in range(3)]
    again = Rollouts(run.stage, run.config.objective, run.config.data, range(8))
    again.restore(position)
    np.testing.assert_array_equal(again.take(None).tokens, batches[1].tokens)
    for then in ({}, {'objective.group': 2}):
      other = {name: x for name, x in position.items() if name != 'objective.group'} | then
      with pytest.raises(ValueError, match='objective.group: .* then, 4 now'):
        again.restore(other)
    Rollouts(run.stage, FAMILY, run.config.data, range(8)).restore(position)
    run.state, metrics, _ = run.step(run.state, jax.device_put(batches[0]))
  assert abs(metrics['log_ratio']) < 1e-5
  for batch in batches:
    begins = batch.last.argmax(1) - batch.lengths.sum(1).astype(int) + 1
    prompts = [tuple(batch.tokens[row, : begin + 1]) for row, begin in enumerate(begins)]
    assert all(len(set(prompts[first : first + 4])) == 1 for first in (0, 4))
  assert len({tuple(batch.tokens.ravel()) for batch in batches}) > 1


def test_where_prompts_cannot_be_shared_it_is_said():
  with pytest.raises(NotImplementedError, match='shared_prompts=True with .*grpo_seq2seq'):
    GRPOSeq2Seq(reward=('none.py',), shared_prompts=True)
  group = 'a group of objective.group=4, of objective.shared_prompts=True'
  with pytest.raises(ValueError, match=f'does not fall into whole records of 4 rows .{group}'):
    config(SHARED, data={'batch_size': 6})
  sizes = dict.fromkeys(('data', 'fsdp', 'expert', 'tensor', 'context', 'stage'), 1)
  with pytest.raises(ValueError, match=f', 4 of which are {group}, .* multiple of 16'):
    config(SHARED).check_mesh(sizes | {'fsdp': 4})
  with pytest.raises(NotImplementedError, match='mesh.context=2 splits rows, .* set it to False'):
    config(SHARED).check_mesh(sizes | {'context': 2})
  odd = dataclasses.replace(SHARED, max_new_tokens=7)
  with pytest.raises(ValueError, match='4 answers are 37 tokens, .* over mesh.tensor=2'):
    config(odd).check_mesh(sizes | {'tensor': 2})
  with pytest.raises(ValueError, match='2 sequences that a model reads .*microbatches=4'):
    config(SHARED).check_mesh(sizes | {'stage': 4})
