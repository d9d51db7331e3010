"""Does plan.py --search go on where a candidate cannot be planned, and say what it compared?"""

import dataclasses

import jax
import pytest

import plan
from analysis import tables
from parallel import compiler
from parallel.mesh import MeshConfig
from tests.test_plan import fake, tiny


def refusing(wanted, error):
  """plan.make_plan that raises for those candidates, and plans the others."""

  def make_plan(config, devices):
    if wanted(config):
      raise error
    return fake(config, peak=1e9, seconds=float(config.mesh.tensor))

  return make_plan


@pytest.fixture
def chip(monkeypatch):
  monkeypatch.setattr(plan, 'chip_of', lambda _: fake(tiny(), peak=1).chip)
  monkeypatch.setattr(plan.enough, 'state_bytes', lambda *_: {'parameters': 1})


@pytest.mark.parametrize(
  'error',
  [
    jax.errors.JaxRuntimeError('INTERNAL: RET_CHECK failure in a pass\nand a stack'),
    ValueError('no bandwidth between slices is tabled'),
    NotImplementedError('no such mask in parts'),
  ],
  ids=lambda error: type(error).__name__,
)
def test_a_candidate_that_cannot_be_planned_loses_itself_alone(error, chip, monkeypatch, capsys):
  monkeypatch.setattr(plan, 'make_plan', refusing(lambda c: c.mesh.fsdp == 4, error))
  said = []
  plans = plan.search(tiny(), jax.devices(), said.append)
  refused = [made for made in plans if made.refused]
  assert refused and all(made.config.mesh.fsdp == 4 and not made.fits for made in refused)
  assert plans[0].fits and plans[-len(refused) :] == refused
  first = str(error).splitlines()[0]
  assert any(line.endswith(f': cannot be planned: {first}') for line in said)
  tables.ranking(tiny(), plans)
  assert 'cannot be planned' in capsys.readouterr().out


def test_where_nothing_can_be_planned_the_reason_is_the_error(chip, monkeypatch):
  """Before policies and microbatches are tried in vain."""
  tried = []
  wanted = refusing(lambda c: tried.append(c.model.execution.remat) or True, ValueError('no xla_x'))
  monkeypatch.setattr(plan, 'make_plan', wanted)
  with pytest.raises(ValueError, match='all are refused; the first cannot be planned: no xla_x'):
    plan.search(tiny(), jax.devices(), lambda _: None)
  assert set(tried) == {tiny().model.execution.remat}


def test_a_ranking_says_that_options_differ(monkeypatch, capsys):
  monkeypatch.setattr(compiler, 'BEST', {('v5e', 'fsdp'): 'vmem'})

  def ranked(*meshes):
    configs = [dataclasses.replace(tiny(), mesh=MeshConfig(**sizes)) for sizes in meshes]
    tables.ranking(tiny(), [fake(config, peak=1) for config in configs])
    return ' '.join(capsys.readouterr().out.split())

  fsdp, tensor = {'data': 1, 'fsdp': 8}, {'data': 1, 'fsdp': 4, 'tensor': 2}
  words = 'Not all are compiled with the same options'
  said = ranked(fsdp, tensor)
  assert words in said and ' vmem ' in said and ' none ' in said
  assert words not in ranked(fsdp, fsdp) and words not in ranked(tensor, {'data': 8})
