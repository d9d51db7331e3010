"""Is a step compiled with the options that chip, mesh and config ask for, and with no others?"""

import dataclasses

import jax
import pytest

import plan
from analysis import candidates
from parallel import compiler
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import tiny
from training.config import TrainConfig
from training.program import lower_step

VMEM = 'xla_tpu_scoped_vmem_limit_kib'
FSDP, TENSOR = {'data': 1, 'fsdp': 8}, {'fsdp': 4, 'tensor': 2}


def test_a_table_is_chosen_overridden_and_switched_off(monkeypatch):
  monkeypatch.setattr(compiler, 'BEST', {('v6e', 'fsdp'): 'fused', ('v6e', 'tensor'): 'vmem'})

  def of(*entries, sizes=FSDP, kind='TPU v6 lite'):
    return compiler.chosen(entries, kind, sizes)

  fused = {option.name: option.value for option in compiler.TABLES['fused']}
  assert of('auto') == of() == ('fused', fused)
  assert of('auto', sizes=TENSOR) == ('vmem', {VMEM: '98304'})
  assert of('none') == ('none', {})
  # What was not tried is left as it comes: another chip, another mesh, no TPU.
  assert of('auto', sizes={'fsdp': 4, 'stage': 2}) == of('auto', sizes={}) == ('none', {})
  assert of('auto', kind='TPU v5') == of('auto', kind='cpu') == ('none', {})
  # One option more, another value, one less.
  assert of('auto', 'xla_x=1').options == fused | {'xla_x': '1'}
  assert of(f'{VMEM}=65536').options == fused | {VMEM: '65536'}
  assert of('auto', f'{VMEM}=').options == {k: v for k, v in fused.items() if k != VMEM}
  assert of('none', 'xla_x=a=b').options == {'xla_x': 'a=b'}


@pytest.mark.parametrize(
  'entries, said',
  [
    (('fuesd',), "train.compiler='fuesd' is unknown; did you mean 'fused'"),
    (('fused', 'vmem'), "'vmem' is neither a table in the first place nor an option"),
    (('xla_x',), "train.compiler='xla_x' is unknown"),
    (('vmem=1',), "'vmem=1' is neither"),
    (('=1',), "'=1' is neither"),
  ],
)
def test_a_config_refuses_what_is_no_option(entries, said):
  with pytest.raises(ValueError, match=said):
    TrainConfig(compiler=entries)


def test_a_table_is_for_the_chips_that_have_it():
  with pytest.raises(ValueError, match="options of XLA:TPU, and a cpu is none; use 'auto'"):
    compiler.chosen(('fused',), 'cpu', FSDP)
  with pytest.raises(ValueError, match=r"SparseCores \(v5p, v6e, tpu7x\), and a v5e has none"):
    compiler.chosen(('offloaded',), 'TPU v5 lite', FSDP)
  assert {*compiler.SPARSE} < {*compiler.GENERATIONS.values()}
  for (generation, kind), table in compiler.BEST.items():
    device = next(k for k, v in compiler.GENERATIONS.items() if v == generation)
    assert kind == compiler.kind_of({kind: 2}) and compiler.chosen((table,), device, FSDP).options


def test_a_search_tries_each_set_of_options_once(monkeypatch):
  monkeypatch.setattr(compiler, 'BEST', {('v6e', 'fsdp'): 'fused'})
  config = dataclasses.replace(tiny(), mesh=MeshConfig(data=1, fsdp=8))
  assert candidates.compilers(config, 'TPU v6 lite') == ['none', 'vmem', 'offloaded']
  assert candidates.compilers(config, 'TPU v5 lite') == ['vmem', 'fused']
  assert candidates.compilers(config, 'cpu') == []
  own = candidates.change(config, compiler='vmem')
  assert candidates.flags(config, own) == '--config.train.compiler=vmem'
  assert candidates.compilers(own, 'TPU v6 lite') == ['none', 'fused', 'offloaded']
  changed = dataclasses.replace(config.train, compiler=('fused', f'{VMEM}=1'))
  changed = dataclasses.replace(config, train=changed)
  assert candidates.compilers(changed, 'TPU v6 lite') == []
  assert candidates.flags(config, changed) == f'--config.train.compiler=fused,{VMEM}=1'


def test_on_a_cpu_a_step_has_none():
  """The options are the program's: one that XLA does not know is refused where it is compiled."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    assert compiler.options(('auto',)) == {}
    lines = []
    compiler.tell(('auto',), lines.append)
    assert lines == []
    with pytest.raises(ValueError, match="No such compile option: 'xla_no_such'; correct it, take"):
      compiler.tell(('auto', 'xla_no_such=1'), lines.append)
  config = tiny()
  wrong = dataclasses.replace(config.train, compiler=('auto', 'xla_no_such=1'))
  lowered, _ = lower_step(dataclasses.replace(config, train=wrong), mesh)
  with pytest.raises(jax.errors.JaxRuntimeError, match='xla_no_such'):
    lowered.compile()


def test_the_compiler_knows_every_option_of_the_tables(topology):
  devices = topology('v6e:2x2')
  lines = []
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, data=1), devices)):
    for table in compiler.TABLES:
      compiler.tell((table,), lines.append)
    with pytest.raises(ValueError, match="Failed to parse 'much'.*correct it"):
      compiler.tell(('none', f'{VMEM}=much'), lines.append)
  assert len(lines) == len(compiler.TABLES) and f'{VMEM}=98304' in lines[0]
  assert all(option.why for table in compiler.TABLES.values() for option in table)


def test_a_plan_refuses_what_the_compiler_does_not_know(topology):
  devices = topology('v6e:2x2')
  config = dataclasses.replace(tiny(), mesh=MeshConfig(data=1, fsdp=4))
  wrong = dataclasses.replace(config.train, compiler=('none', 'xla_tpu_no_such=1'))
  with pytest.raises(ValueError, match="No such compile option: 'xla_tpu_no_such'"):
    plan.make_plan(dataclasses.replace(config, train=wrong), devices)
