"""Is a step compiled with the options that chip, mesh and config ask for, and with no others?"""

import dataclasses

import jax
import pytest

import plan
from analysis import candidates
from parallel import compiler
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import run_here, tiny
from training.config import TrainConfig
from training.program import lower_step

VMEM = 'xla_tpu_scoped_vmem_limit_kib'
FSDP, TENSOR = {'data': 1, 'fsdp': 8}, {'fsdp': 4, 'tensor': 2}


def test_a_table_is_chosen_overridden_and_switched_off(monkeypatch):
  monkeypatch.setattr(
    compiler, 'BEST', {('v6e', 'fsdp'): 'fused', ('v6e', 'fsdp x tensor'): 'vmem'}
  )

  def of(*entries, sizes=FSDP, kind='TPU v6 lite'):
    return compiler.chosen(entries, kind, sizes)

  fused = {option.name: option.value for option in compiler.TABLES['fused']}
  assert of('auto') == of() == ('fused', fused)
  assert of('auto', sizes=TENSOR) == ('vmem', {VMEM: '98304'})
  assert of('none') == ('none', {})
  # What was not tried is left as it comes: another chip, another mesh, no TPU.
  assert of('auto', sizes={'fsdp': 4, 'stage': 2}) == of('auto', sizes={}) == ('none', {})
  # Replicas too, as of slices, whose sums are not those of fsdp alone.
  assert of('auto', sizes={'fsdp': 4, 'data': 2}) == ('none', {})
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
  with pytest.raises(ValueError, match='SparseCores of v5p, v6e, tpu7x, not for a v5e'):
    compiler.chosen(('offloaded',), 'TPU v5 lite', FSDP)
  assert {*compiler.SPARSE} < {*compiler.GENERATIONS.values()}
  for (generation, kind), table in compiler.BEST.items():
    device = next(k for k, v in compiler.GENERATIONS.items() if v == generation)
    assert kind == compiler.kind_of(dict.fromkeys(kind.split(' x '), 2))
    assert compiler.chosen((table,), device, FSDP).options


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


def test_a_run_says_what_its_step_is_compiled_with(tmp_path, capsys):
  """Before it looks for its text, which is not there."""
  option = 'xla_backend_optimization_level=0'
  config = tiny(train={'compiler': ('none', option)}, data={'cache_dir': str(tmp_path / 'cache')})
  with pytest.raises(SystemExit, match='nowhere'):
    run_here(config, tmp_path / 'run')
  assert f'{option}: asked for by train.compiler' in capsys.readouterr().out


def test_the_compiler_knows_every_option_of_the_tables(topology):
  devices = topology('v6e:2x2')
  lines = []
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, data=1), devices)):
    for table in compiler.TABLES:
      compiler.tell((table,), lines.append)
    with pytest.raises(ValueError, match="Failed to parse 'much'.*correct it"):
      compiler.tell(('none', f'{VMEM}=much'), lines.append)
  assert len(lines) == len(compiler.TABLES)


def test_each_option_is_said_with_its_reason():
  for table, options in compiler.TABLES.items():
    head, *said = compiler.said(compiler.chosen((table,), 'TPU v6 lite', FSDP)).splitlines()
    assert repr(table) in head and '--config.train.compiler=none' in head
    assert all(option.why for option in options)
    assert said == [f'  {option.name}={option.value}: {option.why}' for option in options]
  own = compiler.chosen(('vmem', f'{VMEM}=1'), 'TPU v6 lite', FSDP)
  assert compiler.said(own).splitlines()[1:] == [f'  {VMEM}=1: asked for by train.compiler']
  assert compiler.said(compiler.chosen((), 'cpu', FSDP)) == "compiler: 'none', as it comes"


def test_a_plan_refuses_what_the_compiler_does_not_know(topology):
  devices = topology('v6e:2x2')
  config = dataclasses.replace(tiny(), mesh=MeshConfig(data=1, fsdp=4))
  wrong = dataclasses.replace(config.train, compiler=('none', 'xla_tpu_no_such=1'))
  with pytest.raises(ValueError, match="No such compile option: 'xla_tpu_no_such'"):
    plan.make_plan(dataclasses.replace(config, train=wrong), devices)
