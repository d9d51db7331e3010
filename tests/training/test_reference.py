"""Does the command line show every field of a config, and take what it shows?"""

import ast
import collections
import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from absl import flags

from data.tokenizers import ByteTokenizer
from objectives import kinds
from parallel.mesh import make_mesh
from parallel.pipeline import PipelineConfig
from tests.training.conftest import tiny
from training import config as configs, overrides, reference
from training.program import lower_step

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def parse(monkeypatch):
  """(arguments of train.py) -> the Config."""

  def parsed(*arguments):
    among = flags.FlagValues()
    holder = overrides.define_flag(among)
    flags.DEFINE_string('workdir', '', '', flag_values=among)
    monkeypatch.setattr(overrides.app, 'parse_flags_with_usage', among)
    monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])
    overrides.parsed(sys.argv)
    return overrides.from_flag(holder.value)

  return parsed


def test_every_field_says_what_it_means():
  fields = {field.path: field for field in reference.fields()}
  assert not [path for path, field in fields.items() if not field.meaning]
  # Two by hand, and that none is missing.
  assert fields['train.steps'].type == 'int' and fields['train.steps'].default == '200'
  assert fields['mesh.fsdp'].meaning.startswith('replicas that share parameters')
  flat = configs.flat(configs.to_dict(tiny()))
  flat.pop('data.validation')  # which is empty, and shows no field of an item
  assert {path.replace('.0.', '[0].') for path in flat} - fields.keys() <= {
    path.replace('.0.', '[0].') for path in flat if '.1.' in path
  }


def test_a_configs_name_is_its_file_from_anywhere(parse, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  whole = parse(f'--config={ROOT / "configs/tiny.py"}')
  assert parse('--config=tiny') == parse('--config=configs/tiny.py') == whole
  assert parse('--config=models/gpt2').model.L == 12
  # The person's own comes first.
  (tmp_path / 'configs').mkdir()
  own = (ROOT / 'configs/tiny.py').read_text().replace('def get_config', 'def other')
  own += '\n\ndef get_config():\n  import dataclasses\n\n'
  own += '  return dataclasses.replace(other(), init="")\n'
  (tmp_path / 'configs' / 'mine.py').write_text(own)
  assert parse('--config=mine') == whole
  with pytest.raises(flags.Error, match="'tinny' is unknown; did you mean 'tiny'"):
    parse('--config=tinny')


def test_a_run_goes_on_by_its_directory_alone(parse, tmp_path):
  config = tiny(train={'steps': 7}, optimizer={'learning_rate': 0.5})
  tmp_path = tmp_path / 'of two words'
  configs.save(config, tmp_path)
  assert parse(f'--workdir={tmp_path}') == config
  longer = parse('--workdir', str(tmp_path), '--config.train.steps=9')
  assert longer == tiny(train={'steps': 9}, optimizer={'learning_rate': 0.5})
  with pytest.raises(flags.Error, match='has begun'):
    parse(f'--workdir={tmp_path}', '--config.init=somewhere')
  # Another config is not passed over.
  assert parse(f'--workdir={tmp_path}', '--config=tiny') == parse('--config=tiny')


def test_several_values_come_by_commas_and_sources_by_number(parse):
  config = parse(
    '--config=tiny',
    '--config.train.trained=*norm*,*.bias',
    '--config.model.execution.remat=full',
    '--config.model.execution.remat_save=query,up',
    '--config.data.sources[1].kind=text',
    '--config.data.sources[1].path=a,b.txt',
    '--config.data.sources[2].path=c.txt',
    '--config.data.sources[2].kind=text',
  )
  assert config.train.trained == ('*norm*', '*.bias')
  assert config.model.execution.remat_save == ('query', 'up')
  assert [source.path for source in config.data.sources[1:]] == ['a,b.txt', 'c.txt']
  with pytest.raises(flags.Error, match='no item 3'):
    parse('--config=tiny', '--config.data.sources[3].path=c.txt')


def test_numbers_come_by_commas_too(parse, tmp_path):
  configs.save(tiny(model={'max_length': 2048}), tmp_path)
  ByteTokenizer().save(tmp_path / 'tokenizer')
  judged = ('--config=grpo', f'--config.init={tmp_path}', '--config.objective.reward=a.py,b.py')
  config = parse(*judged, '--config.objective.reward_weights=1,0.5')
  assert config.objective.reward_weights == (1.0, 0.5)
  with pytest.raises(ValueError, match="reward_weights.0.='1' is str, must be float"):
    parse(*judged, '--config.objective.reward_weights=1,x')
  several = [field for field in reference.fields() if field.type.endswith('by commas')]
  assert len({field.path for field in several}) > 10
  for field in several:
    value = ast.literal_eval(overrides._as_tuple(f'--config.{field.path}=1,2').partition('=')[2])
    assert len(value) == 2 and {reference.BY_COMMAS.format(type(x).__name__) for x in value} == {
      field.type
    }, field.path


def test_of_json_a_runs_own_config_alone_is_read(parse, tmp_path):
  configs.save(tiny(), tmp_path)
  other = tmp_path / 'wide.json'
  other.write_text((tmp_path / configs.FILE).read_text().replace('"width": 32', '"width": 64'))
  with pytest.raises(flags.Error, match=r"wide\.json: of JSON only a run's own config\.json"):
    parse(f'--config={other}')
  assert parse(f'--config={tmp_path / configs.FILE}') == tiny()


@pytest.mark.costly
@pytest.mark.parametrize(
  'flag, shown', [('--config=list', 'models/llama3_8b'), ('--config.help', 'learning_rate (float')]
)
def test_what_there_is_is_listed(flag, shown):
  done = subprocess.run(
    [sys.executable, 'train.py', flag],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0 and shown in done.stdout and not done.stderr


def test_a_run_reads_no_more_fields_than_a_person_can_know():
  """150 of a run whose model has neither experts, latent attention, stages nor an adapter; the
  table of what is read where (reference.read_by) holds by the tests below.
  """
  for kind in kinds.KINDS:
    config = dataclasses.replace(tiny(model={'max_length': 0}), objective=kinds.of(kind)())
    assert 60 < len(reference.read_by(config)) <= 150, kind


def changed(section, names):
  """The part of a config with other values in these fields."""
  others = {bool: lambda x: not x, int: lambda x: x + 2, float: lambda x: x + 0.5}
  known = {'router': 'sigmoid', 'dispatch': 'capacity', 'balance_over': 'batch'}
  values = {name: getattr(section, name) for name in names}
  return {name: known.get(name) or others[type(x)](x) for name, x in values.items()}


def test_what_is_not_read_changes_no_program():
  """Of the model all at once; what is off of an adapter and an optimizer is refused where it is
  set, each by itself.
  """
  config = tiny()
  unread = configs.flat(configs.to_dict(config)).keys() - {*reference.read_by(config)}
  by_section = collections.defaultdict(list)
  for path in unread:
    section, _, name = path.rpartition('.')
    by_section[section].append(name)
  model = config.model
  parts = {
    part: dataclasses.replace(getattr(model, part), **changed(getattr(model, part), names))
    for part in ('rope', 'latent', 'moe')
    for names in [by_section.pop(f'model.{part}')]
  }
  parts |= changed(model, by_section.pop('model'))
  assert by_section.pop('model.execution') == ['experts']
  assert {*by_section.pop('model.execution.pipeline')} == {'schedule', 'microbatches', 'repeats'}
  pipeline = PipelineConfig(schedule='circular', microbatches=4, repeats=2)
  parts['execution'] = dataclasses.replace(model.execution, experts='blocked', pipeline=pipeline)
  adapter = dataclasses.replace(config.adapter, rank=3, alpha=1.0, stabilised=True, targets=('no',))
  other = dataclasses.replace(config, model=dataclasses.replace(model, **parts), adapter=adapter)
  assert other.model.moe.per_token != model.moe.per_token and len(parts) == 6

  mesh = make_mesh(config.mesh, jax.devices()[:1])
  read = dataclasses.replace(config, model=dataclasses.replace(model, norm_epsilon=1e-3))
  text, same, differs = (lower_step(each, mesh)[0].as_text() for each in (config, other, read))
  assert text == same and text != differs

  for name in by_section.pop('optimizer'):
    with pytest.raises(ValueError, match=f'optimizer.{name}=0.5 would not be read'):
      dataclasses.replace(config.optimizer, **{name: 0.5})
  tokenizer = config.data.tokenizer
  others = {'algorithm': 'unigram', 'split_by_whitespace': False, 'training_bytes': 10**6}
  assert {*by_section.pop('data.tokenizer')} == others.keys()
  for name, value in others.items():
    with pytest.raises(ValueError, match=f'tokenizer.{name}=.* would not be read: .*leave it at'):
      dataclasses.replace(tokenizer, **{name: value})
  assert by_section.pop('train') == ['spill_dir']
  with pytest.raises(ValueError, match='train.spill_dir=.* would not be read'):
    dataclasses.replace(config.train, spill_dir='elsewhere')
  assert {*by_section} == {'adapter', 'evaluation'}
