"""Does what is 0 stay so while a model is trained, with its moments, as much of it as the schedule
says, on any mesh, in any parts of the optimizer's state, and after a kill?
"""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import Trainer, assert_same, host, make_batches, on, run_here, tiny

from model.adaptation import AdapterConfig
from model.params import named_leaves
from parallel.mesh import MeshConfig
from training.prune import parsed
from workdir.open import open_run

BATCHES = make_batches(4)


def trained(prune, steps=3, devices=1, **parts):
  parts |= {'optimizer': {'prune': prune} | parts.get('optimizer', {})}
  parts['train'] = {'steps': 8} | parts.get('train', {})
  trainer = Trainer(tiny(**parts), devices)
  return trainer, trainer.run(BATCHES[:steps])


def zeros(tree) -> dict[str, np.ndarray]:
  """Where matrices of blocks are 0, by the name behind the last dictionary's."""
  leaves = named_leaves(tree)
  return {n: np.asarray(x) == 0 for n, x in leaves.items() if '.blocks.' in n and x.ndim > 2}


def shares(trainer):
  """Of each matrix, layer by layer."""
  return {name: x.reshape(len(x), -1).mean(1) for name, x in zeros(trainer.state.models).items()}


def test_the_schedule_is_cubic_and_moments_go_with_numbers():
  """After updates 1, 2, 3 of 4: 1 - (3/4)^3, 1 - (2/4)^3, 1 - (1/4)^3 of what is to go."""
  trainer = Trainer(tiny(optimizer={'prune': '0.5:end=4:every=1'}, train={'steps': 8}))
  before = None
  for step, left in ((1, 27 / 64), (2, 8 / 64), (3, 1 / 64), (4, 0)):
    trainer.step(BATCHES[step - 1])
    now = zeros(trainer.state.models)
    for name, x in now.items():
      size = x[0].size
      goes = round(round(0.5 * size) * (1 - left))
      assert (abs(x.reshape(len(x), -1).sum(1) - goes) <= (0 if left == 0 else 1)).all(), name
      assert before is None or (x | ~before[name]).all(), 'what is gone stays so'
    before = now
  moments = named_leaves(trainer.state.optimizer)
  seen = 0
  for name, x in moments.items():
    for of, gone in before.items():
      if name.endswith(of):
        assert (np.asarray(x)[gone] == 0).all() and (np.asarray(x)[~gone] != 0).mean() > 0.9
        seen += 1
  assert seen == 2 * len(before) > 10


def test_kept_is_training_of_what_is_left():
  """The update of what is not 0 is Adam's of it alone; tables and norms are not looked at."""
  plain, masked = (
    Trainer(tiny(optimizer={'prune': prune, 'clip_norm': 0.0})) for prune in ('', 'kept')
  )

  def emptied(path, x):
    name = jax.tree_util.keystr(path)
    return x.at[..., ::2].set(0) if 'down' in name and x.ndim > 2 else x

  for trainer in (plain, masked):
    with jax.set_mesh(trainer.mesh):
      models = jax.tree_util.tree_map_with_path(emptied, trainer.state.models)
    trainer.state = dataclasses.replace(trainer.state, models=models)
    trainer.step(BATCHES[0])
  for name, x in host(masked.state.models).items():
    other, gone = host(plain.state.models)[name], np.zeros(x.shape, bool)
    if 'down' in name and x.ndim > 2:
      gone[..., ::2] = True
      assert (x[gone] == 0).all() and (other[gone] != 0).any()
    np.testing.assert_array_equal(x[~gone], other[~gone], err_msg=name)


@pytest.mark.parametrize(
  'parts, devices',
  [
    ({'mesh': MeshConfig(data=2, fsdp=2, tensor=2)}, 8),
    ({'train': {'accumulation': 2}}, 1),
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


@pytest.mark.slow
def test_a_run_goes_on_and_is_begun_with(corpus, tmp_path):
  """In two parts as in one, bit for bit; in other parts of the optimizer's state, too."""
  parts = {'optimizer': {'prune': '0.5:end=4:every=1'}}
  run_here(on(corpus, train={'steps': 6, 'save_every': 3}, **parts), tmp_path / 'whole')
  config = on(corpus, train={'steps': 6, 'save_every': 3}, **parts)
  run_here(
    dataclasses.replace(config, train=dataclasses.replace(config.train, steps=6, keep_last=9)),
    tmp_path / 'a',
  )
  assert_same(open_run(tmp_path / 'whole').model, open_run(tmp_path / 'a').model)


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
  with pytest.raises(ValueError, match='an adapter has none to keep'):
    dataclasses.replace(
      tiny(optimizer={'prune': 'kept'}), adapter=AdapterConfig(kind='lora'), init='somewhere'
    )
