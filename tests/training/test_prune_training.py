"""Does what is 0 stay so while a model is trained, with its moments, as much of it as the schedule
says, on any mesh, and in any parts of the optimizer's state?
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.adaptation import AdapterConfig
from model.params import ParamSpec, named_leaves
from parallel.mesh import MeshConfig
from tests.training.conftest import Trainer, make_batches, tiny
from training.optimizer import OptimizerConfig, make_optimizer
from training.prune import parsed

BATCHES = make_batches(4)


def zeros(tree) -> dict[str, np.ndarray]:
  """Where matrices of blocks are 0, by the name behind the last dictionary's."""
  leaves = named_leaves(tree)
  return {n: np.asarray(x) == 0 for n, x in leaves.items() if '.blocks.' in n and x.ndim > 2}


def shares(trainer):
  """Of each matrix, layer by layer."""
  return {name: x.reshape(len(x), -1).mean(1) for name, x in zeros(trainer.state.models).items()}


def small(prune, **settings):
  """An optimizer of a stack of two matrices, [16 x 6] each, a router and a table; and those."""
  sizes = {'up': (2, 16, 6), 'router': (2, 16, 6)}
  draw = np.random.default_rng(0)
  block = {name: jnp.asarray(draw.normal(size=size), jnp.float32) for name, size in sizes.items()}
  parameters = {'policy': {'blocks': block, 'table': jnp.ones((4, 4))}}
  axes = 'layers', 'embed', 'feed_forward'
  of_block = {name: ParamSpec(size, axes, 'matrix', 1) for name, size in sizes.items()}
  table = ParamSpec((4, 4), ('vocab', 'embed'), 'embedding', 1)
  config = OptimizerConfig(prune=prune, schedule='constant', **settings)
  specs = {'policy': {'blocks': of_block, 'table': table}}
  optimizer = make_optimizer(config, 8, specs)

  @jax.jit
  def step(parameters, state, seed):
    leaves, structure = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    grads = [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves)]
    updates, state = optimizer.update(structure.unflatten(grads), state, parameters)
    return optax.apply_updates(parameters, updates), state

  return step, parameters, optimizer.init(parameters)


def test_the_schedule_is_cubic_and_moments_go_with_numbers():
  """After updates 1, 2, 3 of 4: 1 - (3/4)^3, 1 - (2/4)^3, 1 - (1/4)^3 of what is to go."""
  step, parameters, state = small('0.5:end=4:every=1')
  before = np.zeros((2, 16, 6), bool)
  for i, left in enumerate((27 / 64, 8 / 64, 1 / 64, 0, 0)):
    parameters, state = step(parameters, state, i)
    gone = np.asarray(parameters['policy']['blocks']['up']) == 0
    assert (gone.sum((1, 2)) == round(48 * (1 - left))).all()
    assert (gone | ~before).all(), 'what is gone stays so'
    before = gone
  moments = [x for name, x in named_leaves(state).items() if name.endswith('.blocks.up')]
  assert len(moments) == 2
  for x in moments:
    assert ((np.asarray(x) == 0) == gone).all()
  for name in ('blocks', 'table'):
    rest = parameters['policy'][name]
    assert (np.asarray(rest['router'] if name == 'blocks' else rest) != 0).all()


def test_kept_is_training_of_what_is_left():
  """The update of what is not 0 is what it would be alone."""
  (step, parameters, state), (masked, _, kept) = small(''), small('kept')
  gone = np.arange(6)[None, None] % 2 == np.zeros((2, 16, 1))
  block = parameters['policy']['blocks']
  block['up'] = block['up'] * ~gone
  for i in range(2):
    plain, state = step(parameters, state, i)
    pruned, kept = masked(parameters, kept, i)
  plain, pruned = (np.asarray(x['policy']['blocks']['up']) for x in (plain, pruned))
  assert (pruned[gone] == 0).all() and (plain[gone] != 0).all()
  np.testing.assert_array_equal(pruned[~gone], plain[~gone])


@pytest.mark.parametrize(
  'parts, devices',
  [
    pytest.param({'mesh': MeshConfig(data=2, fsdp=2, tensor=2)}, 8, marks=pytest.mark.slow),
    pytest.param({'train': {'accumulation': 2}}, 1, marks=pytest.mark.slow),
    pytest.param({'mesh': MeshConfig(fsdp=4, zero=1)}, 4, marks=pytest.mark.slow),
    pytest.param({'train': {'offload_optimizer': 'host'}}, 1, marks=pytest.mark.slow),
    pytest.param({'optimizer': {'name': 'muon'}}, 1, marks=pytest.mark.slow),
    pytest.param({'optimizer': {'name': 'adam8bit'}}, 1, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_as_much_goes_everywhere(parts, devices):
  """On a mesh, in microbatches, by layers: the counts are exact, and what goes is what went."""
  mesh = parts.get('mesh', MeshConfig())
  parts = {name: part for name, part in parts.items() if name != 'mesh'}
  config = tiny(**parts | {'optimizer': {'prune': '2:4:end=2'} | parts.get('optimizer', {})})
  config = dataclasses.replace(config, mesh=mesh)
  trainer = Trainer(config, devices)
  trainer.run(BATCHES[:2])
  found = shares(trainer)
  assert found and all((share == 0.5).all() for share in found.values())
  for name, x in zeros(trainer.state.models).items():
    assert name.endswith('.o') or (x.reshape(2, x.shape[1] // 4, 4, -1).sum(2) == 2).all(), name
  once = zeros(trainer.state.models)
  trainer.run(BATCHES[2:3])
  for name, x in zeros(trainer.state.models).items():
    np.testing.assert_array_equal(x, once[name])


def test_what_means_nothing_is_said():
  assert parsed('2:4:end=9', 20).end == 9 and parsed('0.5:row', 20).pattern.scope == 'row'
  for text, words in (
    ('0.5:end=30', 'end=30 <= 8 steps'),
    ('0.5:column', "'column' is none of row"),
    ('kept:row', 'nothing goes'),
    ('1.5', 'above 0 and below 1'),
  ):
    with pytest.raises(ValueError, match=words):
      tiny(optimizer={'prune': text}, train={'steps': 8})
  table = {'table': ParamSpec((4, 4), ('vocab', 'embed'), 'embedding', 1)}
  with pytest.raises(ValueError, match="prune='0.5': no matrix of a block is trained"):
    make_optimizer(OptimizerConfig(prune='0.5'), 8, table)
  make_optimizer(OptimizerConfig(prune='0.5'), 8, table, whole=False)
  with pytest.raises(ValueError, match='an adapter has none to keep'):
    dataclasses.replace(
      tiny(optimizer={'prune': 'kept'}), adapter=AdapterConfig(kind='lora'), init='somewhere'
    )
