"""Is a Config refused where it is impossible, rebuilt from flags and JSON exactly, and compared as
the run's identity demands?
"""

import dataclasses
import json
import pathlib
import shutil
import sys
import types
import typing

import pytest
from absl import flags
from hypothesis import given, settings, strategies as st
from toy import Toy

import files
from data import tokenizers
from data.config import ANONYMISED_KINDS, CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from kernels.blocks import Blocks
from model import execution
from model.config import CHOICES, ModelConfig, MoEConfig, RopeConfig
from model.execution import ExecutionConfig
from objectives import kinds
from objectives.next_token import NextToken
from parallel.mesh import AXES
from parallel.pipeline import PipelineConfig
from tests.training.conftest import tiny
from training import config as configs, overrides
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig
from workdir import seals

SIZES = dict.fromkeys(AXES, 1)


def nested(**parts) -> dict:
  """The dict of `tiny` with fields replaced by values of any type."""
  values = configs.to_dict(tiny())
  for name, changes in parts.items():
    values[name] |= changes
  return values


# What is impossible, with what the message must hold: the field and its value, the limit, what to
# do.
IMPOSSIBLE = {
  'heads by kv_heads': (
    {'model': {'heads': 4, 'kv_heads': 3}},
    ('model.heads=4', 'model.kv_heads=3', '[1, 2, 4]'),
  ),
  'width by heads': (
    {'model': {'width': 33}},
    ('model.width=33', 'model.heads=4', 'set model.head_width'),
  ),
  'length beyond the model': (
    {'data': {'sequence_length': 17}},
    ('data.sequence_length=17', 'model.max_length=16', 'raise it'),
  ),
  'batch by accumulation': (
    {'train': {'accumulation': 3}},
    ('data.batch_size=8', 'train.accumulation=3', 'a multiple'),
  ),
  'warm-up as long as the run': (
    {'optimizer': {'warmup_steps': 6}},
    ('optimizer.warmup_steps=6', '6 steps', 'fewer warm-up'),
  ),
  'warm-up and decay': (
    {'optimizer': {'schedule': 'wsd', 'decay_fraction': 0.5, 'warmup_steps': 4}},
    ('optimizer.warmup_steps=4', '3 steps', '6 steps', 'decay_fraction'),
  ),
  'patience without evaluations': (
    {'train': {'patience': 2}},
    ('train.patience=2', 'train.eval_every=0', 'set train.eval_every'),
  ),
  'patience with a part of the validation': (
    {'train': {'patience': 2, 'best': 'lowest validation_loss/code'}},
    ('train.patience=2', 'train.eval_every=0', 'set train.eval_every'),
  ),
  'no steps': ({'train': {'steps': 0}}, ('train.steps=0', 'train.epochs=0', 'set the other')),
  'no number': ({'objective': {'z_loss': float('nan')}}, ('objective.z_loss=nan', 'at least 0')),
  'seed beyond 32 bits': ({'train': {'seed': 2**32}}, ('train.seed=4294967296', 'below 2**32')),
  'unknown choice': (
    {'train': {'nonfinite': 'skipp'}},
    ("train.nonfinite='skipp'", "did you mean 'skip'?", 'stop'),
  ),
  'unknown optimizer': (
    {'optimizer': {'name': 'adanw'}},
    ("optimizer.name='adanw'", "did you mean 'adamw'?"),
  ),
  'a setting nobody reads': (
    {'optimizer': {'momentum': 0.9}},
    ('optimizer.momentum=0.9', "'adamw'", 'muon, sgd'),
  ),
  'two open axes': ({'mesh': {'fsdp': -1}}, ("['data', 'fsdp']", 'only one')),
  'a field that is not there': (
    {'model': {'widht': 3}},
    ("config.model has no field 'widht'", "did you mean 'width'?", 'layers'),
  ),
  'text for a number': (
    {'model': {'width': '64'}},
    ("config.model.width='64'", 'is str', 'must be int'),
  ),
  'a fraction for a number': (
    {'train': {'steps': 1e4}},
    ('config.train.steps=10000.0', 'is float', 'must be int'),
  ),
  'truth for a number': (
    {'train': {'steps': True}},
    ('config.train.steps=True', 'is bool', 'must be int'),
  ),
  'a number for truth': (
    {'model': {'gated': 1}},
    ('config.model.gated=1', 'is int', 'must be bool'),
  ),
  'text for a tuple': (
    {'data': {'sources': 'stdlib'}},
    ("config.data.sources='stdlib'", 'must be a list'),
  ),
}


@pytest.mark.parametrize('case', IMPOSSIBLE)
def test_impossible_configs_are_refused(case):
  changes, said = IMPOSSIBLE[case]
  with pytest.raises(ValueError) as error:
    configs.from_dict(Config, nested(**changes))
  for part in said:
    assert part in str(error.value)
  assert configs.from_dict(Config, nested()) == tiny()


def test_a_mesh_that_cannot_split_the_arrays_is_refused():
  config = tiny()
  config.check_mesh(SIZES | {'data': 2, 'fsdp': 4, 'tensor': 2})
  for sizes, said in (
    (
      {'data': 2, 'fsdp': 8},
      ('microbatch of 8', 'batch_size=8', '16 devices', 'data 2 x fsdp 8', 'a multiple'),
    ),
    ({'data': 2, 'expert': 8}, ('microbatch of 8', '16 devices', 'data 2 x fsdp 1 x expert 8')),
    ({'tensor': 3}, ('model.heads=4', 'mesh.tensor=3')),
  ):
    with pytest.raises(ValueError) as error:
      config.check_mesh(SIZES | sizes)
    for part in said:
      assert part in str(error.value)
  config.check_mesh(SIZES | {'tensor': 4})  # 2 key/value heads, copied
  with pytest.raises(
    ValueError, match=r'model\.kv_heads=3 and mesh\.tensor=2: one has to be a multiple of the other'
  ):
    tiny(model={'heads': 6, 'kv_heads': 3, 'head_width': 8}).check_mesh(SIZES | {'tensor': 2})
  with pytest.raises(
    ValueError,
    match=r'data\.sequence_length=14 does not split over mesh\.tensor=4, which share the '
    'residual stream',
  ):
    tiny(data={'sequence_length': 14}).check_mesh(SIZES | {'tensor': 4})
  config.check_mesh(SIZES | {'stage': 2, 'fsdp': 4})
  for sizes, said in (
    (
      {'stage': 2, 'fsdp': 8},
      (
        '8 sequences',
        'batch_size=8',
        '8 devices',
        'model.execution.pipeline.microbatches=2',
        'a multiple',
      ),
    ),
    ({'stage': 4}, ('model.layers: 2 layers', 'mesh.stage=4', 'a multiple')),
    (
      {'stage': 2, 'tensor': 16},
      ('model.vocabulary=264', 'mesh.tensor=16 x mesh.stage=2', 'a multiple'),
    ),
  ):
    with pytest.raises(ValueError) as error:
      config.check_mesh(SIZES | sizes)
    for part in said:
      assert part in str(error.value)
  with pytest.raises(ValueError, match=r'model\.width=36 does not split over mesh\.fsdp=8'):
    tiny(model={'width': 36, 'head_width': 8}).check_mesh(SIZES | {'fsdp': 8})
  with pytest.raises(
    ValueError,
    match=r'model\.width=36 does not split over mesh\.fsdp=2 x mesh\.expert=4; make it a multiple',
  ):
    tiny(model={'width': 36, 'head_width': 8}).check_mesh(SIZES | {'fsdp': 2, 'expert': 4})
  with pytest.raises(ValueError, match=r'model\.moe\.experts=6 does not split over mesh\.expert=4'):
    tiny(model={'moe': MoEConfig(experts=6)}).check_mesh(SIZES | {'expert': 4})
  with pytest.raises(ValueError, match='microbatch of 4 sequences.*train.accumulation=2'):
    tiny(train={'accumulation': 2}).check_mesh(SIZES | {'data': 8})


def test_rows_that_do_not_split_are_refused():
  config = tiny(model={'width': 32})
  config.check_mesh(SIZES | {'context': 4, 'tensor': 2})
  for model, sizes, said in (
    (
      {},
      {'context': 16},
      ('data.sequence_length=16', '32 chunks', 'mesh.context=16', "'ring'", 'a multiple'),
    ),
    (
      {'execution': ExecutionConfig(context='ulysses')},
      {'context': 8},
      ("'ulysses' splits heads: 4", 'mesh.context=8', "'ulysses_ring'"),
    ),
    (
      {'execution': ExecutionConfig(context='ulysses_ring')},
      {'context': 2, 'tensor': 2},
      ('1 key heads', 'mesh.context=2', "'ring'"),
    ),
    (
      {'width': 36, 'head_width': 8},
      {'context': 4, 'fsdp': 2},
      ('model.width=36', 'mesh.fsdp=2 x mesh.context=4'),
    ),
  ):
    with pytest.raises(ValueError) as error:
      tiny(model={'width': 32} | model).check_mesh(SIZES | sizes)
    for part in said:
      assert part in str(error.value)
  with pytest.raises(
    NotImplementedError,
    match=r"'xla' gives no log-sum-exp .*\['reference', 'blocked', 'pallas_tpu', 'pallas_gpu'\]",
  ):
    tiny(model={'execution': ExecutionConfig(attention='xla')}).check_mesh(SIZES | {'context': 2})
  tiny(model={'execution': ExecutionConfig(attention='xla', context='ulysses')}).check_mesh(
    SIZES | {'context': 2}
  )


def test_open_sizes_come_from_the_data():
  open_sizes = tiny(model={'vocabulary': 0, 'max_length': 0}).resolve(300)
  assert (open_sizes.model.vocabulary, open_sizes.model.max_length) == (300, 16)
  assert tiny().resolve(259) == tiny()
  with pytest.raises(
    ValueError, match=r'model\.vocabulary=264 is smaller than the tokenizer\'s 265; set it to 0'
  ):
    tiny().resolve(265)
  # So many epochs as were written: in binary 1.1 x 100 is more than 110.
  made = tiny(train={'steps': 0, 'epochs': 1.1}, data={'batch_size': 10})
  assert made.resolve(259, rows=100).train.steps == 11


def leaves(cls, known: frozenset = frozenset()) -> int:
  """Fields in all; those of a dataclass that several fields hold count once."""
  total = 0
  for hint in typing.get_type_hints(cls).values():
    inner = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
    total += leaves(inner, known) if inner and inner not in known else 1
    known |= {inner}
  return total


def test_the_whole_config_stays_under_182_fields():
  assert 60 < leaves(Config) < 182


TEXT = st.text(max_size=8)
SOURCES = (
  st.builds(SourceConfig, kind=st.just('text'), path=TEXT.filter(bool), weight=st.floats(1e-3, 1e3))
  | st.builds(
    SourceConfig,
    kind=st.sampled_from(['jsonl', 'csv']),
    path=TEXT.filter(bool),
    text_field=TEXT.filter(bool),
  )
  | st.just(SourceConfig())
)
CLEAN = st.builds(
  CleanConfig,
  anonymise=st.lists(st.sampled_from(ANONYMISED_KINDS), unique=True).map(tuple),
  near_duplicates=st.just(0.0) | st.floats(0.5, 1),
  exact_duplicates=st.booleans(),
)
DATA = st.builds(
  DataConfig,
  sources=st.lists(SOURCES, min_size=1, max_size=3).map(tuple),
  clean=CLEAN,
  seed=st.integers(0, 2**32 - 1),
  tokenizer=st.builds(TokenizerConfig, kind=st.sampled_from(['byte', 'char'])),
  sequence_length=st.integers(1, 99),
  validation_fraction=st.floats(0.01, 0.99),
)
NEEDS_MORE = (
  'clamped_silu',
  'relative',
  'pallas_gpu',
)  # of a gate, of an attention backend, of a dtype


def any_of(choices):
  return {
    name: st.sampled_from([x for x in known if x not in NEEDS_MORE])
    for name, known in choices.items()
  }


MODEL = st.builds(
  ModelConfig,
  layers=st.integers(1, 99),
  kv_heads=st.sampled_from([0, 1, 2, 4]),
  gated=st.booleans(),
  rope=st.one_of(
    st.builds(RopeConfig, base=st.floats(1, 1e9)),
    st.builds(
      RopeConfig, base=st.floats(1, 1e9), factor=st.floats(1, 99), scaling=st.just('linear')
    ),
  ),
  execution=st.builds(ExecutionConfig, **any_of(execution.CHOICES)),
  **any_of(CHOICES),
)
OPTIMIZER = st.builds(
  OptimizerConfig,
  learning_rate=st.floats(1e-30, 1e3),
  b1=st.just(-1.0) | st.floats(0, 0.999),
  weight_decay=st.floats(0, 1),
)
TRAIN = st.builds(TrainConfig, steps=st.integers(1, 10**9), seed=st.integers(0, 2**32 - 1))
OBJECTIVE = st.builds(NextToken, z_loss=st.floats(0, 1))
ANY = st.builds(
  Config, model=MODEL, data=DATA, optimizer=OPTIMIZER, train=TRAIN, objective=OBJECTIVE
)


@settings(max_examples=50)
@given(ANY)
def test_to_json_and_back_is_the_identity(config):
  back = configs.from_dict(Config, json.loads(json.dumps(configs.to_dict(config))))
  assert back == config and hash(back) == hash(config)
  assert not configs.differences(config, back)


def test_to_disk_and_back(tmp_path):
  configs.save(tiny(), tmp_path / 'run')
  assert configs.load(tmp_path / 'run') == tiny()
  assert [path.name for path in (tmp_path / 'run').iterdir()] == [configs.FILE]
  with pytest.raises(FileNotFoundError, match='not the directory of a run; train one'):
    configs.load(tmp_path)
  (tmp_path / 'run' / configs.FILE).write_text('{"model": {"widht": 3}}')
  with pytest.raises(
    ValueError, match=r"config\.json: config\.model has no field 'widht'; did you mean 'width'"
  ):
    configs.load(tmp_path / 'run')


def test_differences_are_those_that_change_the_model_or_the_data_order():
  same = (
    {
      'train': {
        'steps': 9,
        'log_every': 3,
        'eval_every': 2,
        'keep_last': 9,
        'accumulation': 2,
        'nonfinite': 'skip',
      }
    },
    {'optimizer': {'learning_rate': 1.0, 'schedule': 'linear', 'b1': 0.5}},
    {'mesh': {'fsdp': 2}},
    {'data': {'cache_dir': 'elsewhere'}},
    {'model': {'execution': ExecutionConfig(remat='full', attention='xla')}},
    {
      'model': {
        'execution': ExecutionConfig(
          attention='pallas_tpu', attention_blocks=Blocks(forward_keys=256)
        )
      }
    },
  )
  for changes in same:
    assert not configs.differences(tiny(), tiny(**changes)), changes
  other = {
    'model.width: 32 -> 64': {'model': {'width': 64}},
    'train.seed: 0 -> 1': {'train': {'seed': 1}},
    'data.batch_size: 8 -> 4': {'data': {'batch_size': 4}},
    'data.clean.near_duplicates: 0.0 -> 0.9': {'data': {'clean': CleanConfig(near_duplicates=0.9)}},
    "optimizer.name: 'adamw' -> 'lion'": {'optimizer': {'name': 'lion'}},
    "data.sources.0.path: 'nowhere' -> 'here'": {
      'data': {'sources': (SourceConfig(kind='text', path='here'),)}
    },
  }
  for line, changes in other.items():
    assert configs.differences(tiny(), tiny(**changes)) == [line]
  two = SourceConfig(kind='text', path='nowhere'), SourceConfig(weight=0.5)
  assert "data.sources.1.weight: None -> 0.5" in configs.differences(
    tiny(), tiny(data={'sources': two})
  )


def test_a_run_of_another_model_is_refused_and_nothing_is_written(tmp_path):
  seals.check_unchanged(tiny(), tmp_path)  # a fresh directory
  configs.save(tiny(), tmp_path)
  before = (tmp_path / configs.FILE).read_bytes()
  seals.check_unchanged(tiny(train={'steps': 99}), tmp_path)
  other = tiny(model={'width': 64}, data={'seed': 3})
  with pytest.raises(ValueError) as error:
    seals.check_unchanged(other, tmp_path)
  for part in (
    str(tmp_path),
    '\n  data.seed: 0 -> 3',
    '\n  model.width: 32 -> 64',
    '--workdir',
    '--allow_config_change',
  ):
    assert part in str(error.value)
  seals.check_unchanged(other, tmp_path, allow_change=True)
  assert (tmp_path / configs.FILE).read_bytes() == before


@pytest.fixture
def parse(tmp_path, monkeypatch):
  """Parses a command line with --config=FILE, whose get_config() returns what is given, as train.py
  does.
  """

  def of(*arguments, returns='tiny()'):
    path = tmp_path / 'config_file.py'
    path.write_text(f'from conftest import tiny\n\ndef get_config():\n  return {returns}\n')
    monkeypatch.setattr(sys, 'argv', ['train.py', f'--config={path}', *arguments])
    values = flags.FlagValues()
    holder = overrides.define_flag(values)
    values(sys.argv)
    return overrides.from_flag(holder.value)

  return of


def test_flags_override_any_field(parse):
  assert parse() == tiny()
  config = parse(
    '--config.model.width=64',
    '--config.train.steps=7',
    '--config.optimizer.b1=0.5',
    '--config.optimizer.schedule=linear',
    '--config.data.sources[0].path=there/*.txt',
    '--config.data.sources[0].weight=2',
    '--config.model.gated=false',
    "--config.data.clean.anonymise=('email', 'ip')",
    '--config.data.clean.near_duplicates=0.8',
    '--config.mesh.fsdp=4',
    '--config.model.execution.attention=pallas_tpu',
    '--config.model.execution.attention_blocks.forward_queries=512',
  )
  assert config == tiny(
    model={
      'width': 64,
      'gated': False,
      'execution': ExecutionConfig(
        attention='pallas_tpu', attention_blocks=Blocks(forward_queries=512)
      ),
    },
    train={'steps': 7},
    optimizer={'b1': 0.5, 'schedule': 'linear'},
    mesh={'fsdp': 4},
    data={
      'sources': (SourceConfig(kind='text', path='there/*.txt', weight=2.0),),
      'clean': CleanConfig(anonymise=('email', 'ip'), near_duplicates=0.8),
    },
  )


def test_overrides_are_of_the_model_that_a_run_begins_with(parse, tmp_path):
  """Also to a value that is a field's default; what the file sets replaces the run's, too."""
  run = tiny(
    model={
      'execution': ExecutionConfig(dtype='bfloat16', remat='full'),
      'qk_norm': True,
      'rope': RopeConfig(base=5.0, scaling='linear', factor=2.0),
    }
  )
  configs.save(run, tmp_path / 'run')
  tokenizers.ByteTokenizer().save(tmp_path / 'run' / 'tokenizer')
  returns = (
    "__import__('dataclasses').replace(tiny(), "
    "model=type(tiny().model)().with_execution(remat='dots'))"
  )
  run = dataclasses.replace(run, model=dataclasses.replace(run.model, max_length=99))
  configs.save(run, tmp_path / 'run')
  long = returns.replace(
    "model=", "data=__import__('dataclasses').replace(tiny().data, sequence_length=128), model="
  )
  with pytest.raises(ValueError, match='data.sequence_length=128 passes model.max_length=99'):
    parse(f'--config.init={tmp_path}/run', returns=long)
  # What the file and the run disagree about, an override can mend.
  assert (
    parse(
      f'--config.init={tmp_path}/run', '--config.data.sequence_length=64', returns=long
    ).data.sequence_length
    == 64
  )
  found = parse(
    f'--config.init={tmp_path}/run',
    '--config.model.execution.dtype=float32',
    '--config.model.rope.factor=1.0',
    returns=returns,
  )
  assert found.model == dataclasses.replace(
    run.model.with_execution(remat='dots', dtype='float32'),
    rope=RopeConfig(base=5.0, scaling='linear'),
  )
  assert found.init == f'{tmp_path}/run'
  for argument, said in (
    ('--config.init=nowhere', 'nowhere is not the directory of a run'),
    ('--config.init', 'write it as --config.init='),
  ):
    with pytest.raises((ValueError, flags.Error), match=said):
      parse(argument, 'x')


def test_sources_are_added_where_there_are_none(parse):
  flags_ = [
    f'--config.data.validation[{i}].{field}'
    for i in range(2)
    for field in ('kind=text', f'path={i}.txt')
  ]
  given = parse(*flags_, '--config.data.validation_fraction=0')
  assert [(of.kind, of.path) for of in given.data.validation] == [
    ('text', '0.txt'),
    ('text', '1.txt'),
  ]
  assert parse().data.validation == ()


def test_an_override_to_no_items_is_possible(parse):
  assert parse('--config.data.clean.anonymise=()').data.clean.anonymise == ()


@pytest.mark.parametrize(
  'argument, said',
  [
    ('--config.modle.width=64', "config has no field 'modle'; did you mean 'model'?"),
    ('--config.model.widht=64', "config.model has no field 'widht'; did you mean 'width'?"),
    (
      '--config.data.sources[0].pth=x',
      r"config.data.sources\[0\] has no field 'pth'; did you mean 'path'?",
    ),
    ('--config.data.sources[3].path=x', 'config.data.sources has no item 3; it holds 1'),
    ('--config.model[0]=x', "config.model has no item 0; it holds no list"),
    ('--config.model.width.x=1', "config.model.width is a value, it has no field 'x'"),
    ('--config.model.width=x', "config.model.width"),
    ('--config.train.steps=2.5', "config.train.steps"),
    (
      '--config.model.execution.attention_blocks.forward_quries=512',
      "config.model.execution.attention_blocks has no field 'forward_quries'; did you mean "
      "'forward_queries'?",
    ),
    ("--config.data.clean.anonymise=('emial',)", "did you mean 'email'?"),
    ('--config.model.kv_heads=3', r'model.kv_heads=3; kv_heads must be one of \[1, 2, 4\]'),
    ('--config.train.z_loss=0.1', 'config.train.z_loss is config.objective.z_loss now'),
    ('--config.objective.kind=nxt_token', "did you mean 'next_token'?"),
    ('--config.objective.kind', 'write it as --config.objective.kind=NAME'),
    (
      '--config.objective.z_los=1',
      "config.objective has no field 'z_los'; did you mean 'z_loss'?",
    ),
  ],
)
def test_a_wrong_override_is_an_error(parse, argument, said):
  with pytest.raises((ValueError, flags.Error), match=said):
    parse(argument)


def test_the_kind_of_the_objective_decides_its_fields(parse, monkeypatch):
  monkeypatch.setitem(kinds.KINDS, 'toy', 'toy.Toy')
  assert parse('--config.objective.z_loss=0.5').objective == NextToken(z_loss=0.5)
  config = parse('--config.objective.reference=there', '--config.objective.kind=toy')
  assert config.objective == Toy(reference='there')
  assert configs.from_dict(Config, json.loads(json.dumps(configs.to_dict(config)))) == config
  assert configs.differences(tiny(), config) == ["objective.kind: 'next_token' -> 'toy'"]
  said = (
    "config.objective.reference is a field of .*toy, not of objective.kind='next_token', whose "
    'fields are: z_loss'
  )
  with pytest.raises((ValueError, flags.Error), match=said):
    parse('--config.objective.reference=there')
  with pytest.raises(ValueError, match=said):
    configs.from_dict(Config, nested(objective={'reference': 'there'}))
  with pytest.raises(ValueError, match="objective.kind='toy' cannot have the fields of 'next_tok"):
    NextToken(kind='toy')


def test_a_config_of_before_a_field_moved_is_read(tmp_path):
  configs.save(tiny(), tmp_path)
  values = json.loads((tmp_path / configs.FILE).read_text())
  del values[files.SEAL]
  del values['objective'], values['train']['trained'], values['train']['frozen']
  values['train']['z_loss'] = 0.25
  (tmp_path / configs.FILE).write_text(json.dumps(values))
  expected = dataclasses.replace(tiny(), objective=NextToken(z_loss=0.25))
  assert configs.load(tmp_path) == expected and not configs.differences(tiny(), expected)


def test_spilled_state_is_at_home_where_that_is_asked(monkeypatch):
  monkeypatch.setenv('HOME', '/somebody')
  made = tiny(train={'offload_optimizer': 'disk', 'spill_dir': '~/scratch'})
  assert made.train.spill_dir == '/somebody/scratch'


def test_a_config_of_before_a_tokenizers_settings_were_looked_at_is_read(tmp_path):
  """Of bytes, with settings that only one that is trained has."""
  configs.save(tiny(), tmp_path)
  values = json.loads((tmp_path / configs.FILE).read_text())
  del values[files.SEAL]
  values['data']['tokenizer'] |= {'algorithm': 'unigram', 'training_bytes': 10**6}
  (tmp_path / configs.FILE).write_text(json.dumps(values))
  assert configs.load(tmp_path) == tiny()


EXECUTION = {
  'dtype',
  'parameter_dtype',
  'attention',
  'attention_blocks',
  'context',
  'remat',
  'remat_save',
  'remat_offload',
  'pipeline',
  'scan',
}


def kept(old, new):
  """`new` without the fields that the config has gained since `old` was written."""
  if isinstance(old, dict):
    return {name: kept(value, new[name]) for name, value in old.items()}
  if isinstance(old, list):
    return [kept(*pair) for pair in zip(old, new, strict=True)]
  return new


def test_a_config_of_before_execution_had_a_part_of_its_own_is_read(tmp_path):
  """A file as it was written then, with every field of every part, most of them not at their
  default.
  """
  shutil.copy(
    pathlib.Path(__file__).parent / 'config_before_execution.json', tmp_path / 'config.json'
  )
  old = json.loads((tmp_path / 'config.json').read_text())
  assert EXECUTION < old['model'].keys()

  config = configs.load(tmp_path)
  execution_then = {name: old['model'].pop(name) for name in EXECUTION}
  old['model']['execution'] = execution_then
  assert kept(old, json.loads(json.dumps(configs.to_dict(config)))) == old
  assert config.model.execution == ExecutionConfig(
    dtype='bfloat16',
    parameter_dtype='bfloat16',
    attention='pallas_tpu',
    attention_blocks=Blocks(
      forward_queries=512,
      forward_keys=512,
      backward_queries=512,
      backward_keys=256,
      deterministic=True,
    ),
    context='ulysses',
    remat='full',
    remat_save=('query', 'up'),
    remat_offload=('block',),
    pipeline=PipelineConfig(schedule='circular', microbatches=4, repeats=2),
    scan=False,
  )
  # A run of then goes on.
  seals.check_unchanged(config, tmp_path)


@pytest.mark.parametrize('name', sorted(EXECUTION))
def test_where_a_field_of_execution_has_gone_is_said(parse, name):
  with pytest.raises(
    (ValueError, flags.Error), match=f'config.model.{name} is config.model.execution.{name} now'
  ):
    parse(f'--config.model.{name}=x')
  with pytest.raises(TypeError, match=f'model.{name} is model.execution.{name} now: .*{name}=...'):
    ModelConfig(**{name: 'x'})
  with pytest.raises(TypeError, match=f'model.{name} is model.execution.{name} now'):
    dataclasses.replace(tiny().model, **{name: 'x'})


def test_what_a_checkpoint_depends_on_of_execution_may_not_change():
  for name, value, said in (
    ('dtype', 'bfloat16', "model.execution.dtype: 'float32' -> 'bfloat16'"),
    ('parameter_dtype', 'bfloat16', "model.execution.parameter_dtype: 'float32' -> 'bfloat16'"),
    ('scan', False, 'model.execution.scan: True -> False'),
  ):
    changed = tiny(model={'execution': ExecutionConfig(**{name: value})})
    assert configs.differences(tiny(), changed) == [said]


def test_a_file_must_return_a_config(parse):
  with pytest.raises(
    (ValueError, flags.Error), match='returned dict; it must return a training.config.Config'
  ):
    parse(returns="{'model': 1}")


def test_a_file_that_is_not_there_is_named_with_the_nearest(parse, tmp_path):
  parse()
  with pytest.raises(
    (ValueError, flags.Error), match="/config_fil.py' is unknown; did you mean '.*/config_file.py'"
  ):
    parse(f'--config={tmp_path}/config_fil.py')


def test_the_convention_of_field_types():
  """Only types that flags and JSON carry: numbers, text, truth, tuples of those, optionals, other
  configs.
  """

  def check(hint, path):
    if dataclasses.is_dataclass(hint):
      for name, inner in typing.get_type_hints(hint).items():
        check(inner, f'{path}.{name}')
    elif typing.get_origin(hint) in (tuple, types.UnionType):
      for inner in typing.get_args(hint):
        check(inner, path)
    else:
      assert hint in (int, float, bool, str, type(None), Ellipsis), f'{path}: {hint}'

  check(Config, 'config')
