"""Is training on every product of mesh axes training on one device?

And do devices agree on which collective comes next?
"""

import dataclasses
import functools
import itertools
import re

import jax
import laws
import numpy as np
import pytest
from test_meshes import CONFIG, batch

from data.config import DataConfig
from model import params, transformer
from model.config import MoEConfig
from model.execution import ExecutionConfig
from parallel import axes as ax
from parallel.mesh import AXES, MeshConfig, make_mesh
from parallel.pipeline import PipelineConfig
from training import state as states
from training.config import Config
from training.optimizer import OptimizerConfig, make_optimizer
from training.step import make_step

full = functools.partial(ExecutionConfig, remat='full')
DENSE = dataclasses.replace(CONFIG, layers=4, max_length=8, execution=full())
MOE = dataclasses.replace(
  DENSE,
  layers=2,
  biases='none',
  moe=MoEConfig(experts=4, per_token=2, feed_forward=8, balance_loss=0.1, z_loss=0.01),
)
CIRCULAR, F1B1 = PipelineConfig(schedule='circular', repeats=2), PipelineConfig(schedule='1f1b')
HEAVY = OptimizerConfig(name='sgd', learning_rate=0.01, clip_norm=0.0)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
COLLECTIVE = re.compile(
  r'[ )](all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\('
)


@functools.cache
def three_steps(model, devices, sizes):
  """The program; loss, parameters, momentum (the gradient, at first) after one step and three."""
  config = Config(
    model=model,
    data=DataConfig(sequence_length=8, batch_size=8),
    optimizer=HEAVY,
    mesh=MeshConfig(**{'data': 1} | dict(sizes)),
  )
  with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:devices])):
    optimizer = make_optimizer(
      HEAVY,
      200,
      params.specs({'policy': jax.eval_shape(functools.partial(transformer.init, model, 0))}),
    )
    state = jax.jit(functools.partial(states.init, config, optimizer))()
    state = dataclasses.replace(state, models=laws.randomised(state.models))
    rows = jax.NamedSharding(jax.sharding.get_mesh(), ax.spec('batch', 'length'))
    given = jax.tree.map(lambda x: jax.device_put(x, rows), batch())
    step, steps = make_step(config, optimizer).lower(state, given).compile(), []
    for _ in range(3):
      state, metrics, _ = step(state, given)
      steps.append(
        jax.tree.map(
          np.asarray,
          {'loss': metrics['loss']}
          | params.named_leaves((state.models['policy'], state.optimizer)),
        )
      )
  return step.as_text(), (steps[0], steps[-1])


def unordered(program):
  """Pairs of a loop with collectives and one, or a loop, behind it that does not depend on it.

  XLA's CPU starts collectives in the order of the scheduled program, but does not wait for a
  loop's: those behind it then wait for some devices while the loop waits for others, in as many
  threads as there are devices. Only data orders what a barrier does not.
  """
  holds, pairs = {}, []
  for text in re.split(r'\n(?=%|ENTRY )', program)[
    1:
  ]:  # a computation comes before those that call it
    behind, loops, some = {}, [], False
    for name, rest in re.findall(r'\n +(?:ROOT )?%(\S+) = (.*)', text):
      rest = rest.split(', metadata=')[0]
      called = any(holds.get(used) for used in re.findall(r'%([\w.-]+)', rest))
      after = set().union(*(behind.get(used, ()) for used in re.findall(r'%([\w.-]+)', rest)))
      if called or COLLECTIVE.search(rest):
        pairs += [(loop, name) for loop in loops if loop not in after]
        some = True
      if called:
        loops.append(name)
        after.add(name)
      behind[name] = after
    holds[re.match(r'(?:ENTRY )?%([\w.-]+)', text)[1]] = some
  return pairs


def check(model, sizes):
  program, steps = three_steps(model, 8, tuple(sizes.items()))
  alone = three_steps(model.with_execution(pipeline=PipelineConfig()), 1, ())[1]
  for actual, expected in zip(steps, alone, strict=True):
    for name, wanted in expected.items():
      np.testing.assert_allclose(
        actual[name], wanted, atol=1e-5 * max(1e-3, np.abs(wanted).max()), err_msg=name
      )
  return program


@pytest.mark.parametrize(
  'axes',
  list(itertools.combinations(AXES, 3)),
  ids='-'.join,
)
@pytest.mark.slow
def test_three_axes_are_one_device(axes):
  assert not unordered(check(DENSE, dict.fromkeys(axes, 2)))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'axes', [axes for axes in itertools.combinations(AXES, 3) if 'expert' in axes], ids='-'.join
)
def test_three_axes_with_experts_are_one_device(axes):
  check(MOE, dict.fromkeys(axes, 2))


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [{'tensor': 4, axis: 2} for axis in AXES[1:-1]], ids=str)
def test_more_tensor_shards_than_keys_are_one_device(sizes):
  check(DENSE, sizes)


@pytest.mark.long
@pytest.mark.parametrize(
  'changes, sizes',
  [
    slow({'execution': full(pipeline=F1B1)}, {'stage': 2, 'context': 2, 'fsdp': 2}),
    slow({'execution': full(pipeline=F1B1, context='gather')}, {'stage': 2, 'context': 4}),
    slow(
      {'execution': full(pipeline=CIRCULAR, context='ulysses')},
      {'stage': 2, 'context': 2, 'tensor': 2},
    ),
    slow({'execution': ExecutionConfig(context='ulysses_ring')}, {'stage': 2, 'context': 4}),
    slow({'window': 3, 'execution': ExecutionConfig()}, {'stage': 2, 'context': 2, 'fsdp': 2}),
    slow({}, {'stage': 2, 'context': 2, 'fsdp': 2, 'zero': 1}),
    slow({'execution': full(pipeline=F1B1)}, {'stage': 2, 'context': 2, 'fsdp': 2, 'zero': 2}),
  ],
  ids=str,
)
def test_ways_to_pipeline_split_rows_are_one_device(changes, sizes):
  assert not unordered(check(dataclasses.replace(DENSE, **changes), sizes))
