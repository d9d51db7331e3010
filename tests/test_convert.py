"""Does what a checkpoint says beside its tensors reach generation, and go out again?"""

import dataclasses
import fnmatch
import json
import pathlib
import struct
import subprocess
import sys
import types

import pytest

import convert
from data import generation, tokenizers
from data.generation import GENERATION, ends as ends_of
from decode.constrain import Constraint
from decode.defaults import model_defaults
from decode.generator import Generator
from model import checkpoint
from model.tensorfiles import INDEX
from tests.goldens import ours
from tests.model.test_model_checkpoint import LLAMA, T5, write_tokenizer
from training import config as configs
from workdir.seals import ORIGIN

ROOT = pathlib.Path(__file__).parents[1]
SAYS = {'do_sample': True, 'temperature': 0.25, 'top_p': 0.5, 'typical_p': 0.7}


def command(*arguments):
  convert.main([str(argument) for argument in arguments])


def written(directory, name):
  return json.loads((directory / name).read_text())


def build(directory, ends=None, says=None):
  """A checkpoint of transformers whose tokenizer ends a text with 256."""
  ours.build(LLAMA | {'vocab_size': 300}, directory)
  write_tokenizer(directory)
  if ends is not None:
    path = directory / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'eos_token_id': ends}))
  if says is not None:
    (directory / GENERATION).write_text(json.dumps(says))


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """A directory with hf/ and run/, whose texts end at 256, 7 and 9."""
  directory = tmp_path_factory.mktemp('ends')
  build(directory / 'hf', [256, 7], SAYS | {'eos_token_id': [9, 100_000]})
  command('import', '--from', directory / 'hf', '--workdir', directory / 'run')
  return directory


@pytest.mark.slow
def test_all_end_ids_of_a_checkpoint_end_a_text(imported):
  generator = Generator.load(imported / 'run')
  assert ends_of(generator.tokenizer) == (256, 7, 9)
  session = generator.session(40).append('def f(')
  for end in (256, 7, 9):
    options = {'max_new_tokens': 3, 'temperature': 0.0, 'logit_bias': {end: 99.0}}
    for completion in (generator('def f(', **options)[0], session.fork()(**options)):
      assert (completion.finish, completion.ids) == ('stop', [end])
  # Where a text may end it may end with each of them, and nowhere else.
  constraint = Constraint(generator.tokenizer, regex='a+')
  after = constraint.next[:, constraint.classes[list(ends_of(generator.tokenizer))]]
  assert (after >= 0).any() and (after[0] < 0).all() and (after == after[:, :1]).all()


@pytest.mark.slow
def test_end_ids_go_wherever_the_model_goes_and_out_again(imported, tmp_path):
  import train

  config = dataclasses.replace(configs.load(imported / 'run'), init=str(imported / 'run'))
  tokenizer = tokenizers.load(imported / 'run' / 'tokenizer')
  train.claim(tmp_path / 'tuned', config, tokenizer, {}, print)
  for name in (GENERATION, ORIGIN):
    assert (tmp_path / 'tuned' / name).read_bytes() == (imported / 'run' / name).read_bytes()

  command('export', '--workdir', imported / 'run', '--to', tmp_path / 'out')
  assert written(tmp_path / 'out', 'config.json')['eos_token_id'] == [256, 7, 9]
  assert written(tmp_path / 'out', GENERATION) == SAYS | {
    'eos_token_id': [256, 7, 9],
    'bos_token_id': 256,
    'pad_token_id': 256,
  }
  command('import', '--from', tmp_path / 'out', '--workdir', tmp_path / 'again')
  assert generation.end_ids(generation.read(tmp_path / 'again'), 'again') == [256, 7, 9]


def test_a_checkpoint_that_says_nothing_more_changes_nothing(tmp_path):
  build(tmp_path / 'hf')
  command('import', '--from', tmp_path / 'hf', '--workdir', tmp_path / 'run')
  assert not (tmp_path / 'run' / GENERATION).exists()
  command('export', '--workdir', tmp_path / 'run', '--to', tmp_path / 'out')
  assert written(tmp_path / 'out', 'config.json')['eos_token_id'] == 256


@pytest.mark.parametrize('ends', ['</s>', [1, True], [-1], {'a': 1}, 2.0])
def test_an_end_that_is_no_id_is_refused(tmp_path, ends):
  build(tmp_path / 'hf', says={'eos_token_id': ends})
  with pytest.raises(
    SystemExit, match='error: eos_token_id=.*generation_config.json must be an id'
  ):
    command('import', '--from', tmp_path / 'hf', '--workdir', tmp_path / 'run')


def test_defaults_of_the_model_are_those_of_transformers():
  assert model_defaults({}) == ({'temperature': 0.0}, [])
  assert model_defaults({'temperature': 0.6, 'top_k': 5}) == ({'temperature': 0.0}, [])
  options, left = model_defaults(SAYS | {'top_k': None, 'num_beams': 1, 'eos_token_id': [1]})
  assert options == {'temperature': 0.25, 'top_p': 0.5} and left == ['typical_p=0.7']
  # One text may stand for a list; True and 1 are only nothing where they are of that setting.
  options, left = model_defaults(
    {'stop_strings': 'Human:', 'renormalize_logits': True, 'min_new_tokens': 1}
    | {'no_repeat_ngram_size': 1, 'num_beams': 1, 'typical_p': 1.0, 'remove_invalid_values': False}
  )
  assert options == {'temperature': 0.0, 'stop': ['Human:']}
  assert left == ['renormalize_logits=True', 'min_new_tokens=1', 'no_repeat_ngram_size=1']


@pytest.mark.slow
def test_defaults_of_the_model_are_taken_when_asked_for_and_printed(imported):
  done = subprocess.run(
    [sys.executable, 'generate.py', f'--workdir={imported / "run"}', '--prompt=def f(']
    + ['--defaults=model', '--top_p=0.9', '--max_new_tokens=3'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert 'defaults of the model: temperature=0.25\n' in done.stderr
  assert 'not taken: typical_p=0.7' in done.stderr and done.stdout.startswith('def f(')
  assert Generator.load(imported / 'run').defaults == {'temperature': 0.25, 'top_p': 0.5}


def without_rows(tmp_path, rows):
  """A checkpoint with so many rows, whose tokenizer has 257 ids and one of images behind them."""
  ours.build(LLAMA | {'vocab_size': rows}, tmp_path / 'hf')
  write_tokenizer(tmp_path / 'hf')
  tokenizers.load(tmp_path / 'hf').extended(['<image>']).save(tmp_path / 'hf')


@pytest.mark.slow
def test_a_control_token_that_has_no_row_stays_behind(tmp_path, capsys):
  without_rows(tmp_path, 257)
  command('import', '--from', tmp_path / 'hf', '--workdir', tmp_path / 'run')
  said = 'NOTE: the model has 257 rows, and none for the control tokens <image>'
  assert said in capsys.readouterr().out
  assert tokenizers.load(tmp_path / 'run' / 'tokenizer').vocabulary == 257
  assert configs.load(tmp_path / 'run').model.V == 257


def test_texts_whose_ids_have_no_row_are_refused_before_the_model_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, 'load', lambda *_, **__: pytest.fail('it was read'))
  without_rows(tmp_path, 256)  # the end has none, too
  refused(tmp_path, 'has 258 ids, and the model 256 rows for them: none for 256')


def refused(tmp_path, words):
  with pytest.raises(SystemExit, match=f'error: .*{words}'):
    command('import', '--from', tmp_path / 'hf', '--workdir', tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('file', ['../secret', '/etc/passwd', 'a/b', '..', 'a\\b', ''])
def test_an_index_leads_nowhere_else(tmp_path, file):
  ours.build(LLAMA, tmp_path / 'hf')
  (tmp_path / 'secret').write_text('secret')
  index = {'weight_map': {'model.norm.weight': file}}
  (tmp_path / 'hf' / INDEX).write_text(json.dumps(index))
  refused(tmp_path, 'names the file .*only names of files in its own directory')


@pytest.mark.parametrize(
  'name, content, words',
  [
    ('config.json', '[' * 100_000, 'config.json is not JSON'),
    ('config.json', '', 'config.json is not JSON that can be read'),
    ('config.json', json.dumps(LLAMA | {'hidden_size': '64'}), "look at .*hidden_size='64'"),
    ('config.json', json.dumps(LLAMA | {'rms_norm_eps': None}), 'look at .*rms_norm_eps=None'),
    (INDEX, '[' * 100_000, 'is not JSON'),
    (INDEX, '{"weight_map": {"a": 1}}', 'weight_map must give a file'),
    (INDEX, '{"weight_map": ["a"]}', 'weight_map must give a file'),
    (INDEX, '[]', 'holds list'),
    ('tokenizer.json', '', 'tokenizer.json is not JSON that can be read'),
    ('tokenizer.json', '[' * 100_000, 'tokenizer.json is not JSON'),
    ('tokenizer.model', 'IQ== 0\nIg== 1\n', 'tokenizer.model is no SentencePiece model'),
    (GENERATION, '{"a":' * 100_000, f'{GENERATION} is not JSON'),
  ],
)
def test_files_that_are_damaged_are_named(tmp_path, name, content, words):
  ours.build(LLAMA | {'vocab_size': 300}, tmp_path / 'hf')
  if name == GENERATION:
    write_tokenizer(tmp_path / 'hf')
  (tmp_path / 'hf' / name).write_text(content)
  refused(tmp_path, words)


@pytest.mark.parametrize(
  'header',
  [
    '[' * 100_000,
    '[]',
    '{"a": 1}',
    '{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]}}',
    '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": "04"}}',
  ],
)
def test_a_header_that_is_damaged_is_named(tmp_path, header):
  ours.build(LLAMA, tmp_path / 'hf')
  path = tmp_path / 'hf' / 'model.safetensors'
  path.write_bytes(struct.pack('<Q', len(header)) + header.encode())
  refused(tmp_path, 'model.safetensors is truncated or damaged')


MISTRAL = LLAMA | {'model_type': 'mistral', 'sliding_window': None, 'attention_dropout': 0.25}
GPT2 = {
  'model_type': 'gpt2',
  'vocab_size': 300,
  'n_embd': 32,
  'n_layer': 2,
  'n_head': 4,
  'n_positions': 64,
  'reorder_and_upcast_attn': True,
  'embd_pdrop': 0.0,
}


@pytest.mark.parametrize(
  'hf',
  [
    pytest.param(MISTRAL, id='mistral'),
    pytest.param(GPT2, id='gpt2', marks=pytest.mark.slow),
    pytest.param(T5, id='t5', marks=pytest.mark.slow),
  ],
)
def test_a_model_goes_out_as_what_it_came_in(tmp_path, hf):
  """A Mistral without a window is a Llama, number for number, but not for who serves it; and what
  no ModelConfig tells, as it acts on rounding or on training elsewhere, is not lost.
  """
  ours.build(hf | {'vocab_size': 300}, tmp_path / 'hf')
  command('import', '--from', tmp_path / 'hf', '--workdir', tmp_path / 'run')
  command('export', '--workdir', tmp_path / 'run', '--to', tmp_path / 'out')
  out = written(tmp_path / 'out', 'config.json')
  kept = ('model_type', 'attention_dropout', 'reorder_and_upcast_attn', 'embd_pdrop')
  assert {key: out.get(key) for key in kept} == {key: hf.get(key) for key in kept}
  if hf is MISTRAL:
    command(
      'export', '--workdir', tmp_path / 'run', '--to', tmp_path / 'llama', '--family', 'llama'
    )
    assert written(tmp_path / 'llama', 'config.json')['model_type'] == 'llama'


def test_a_name_of_the_hub_is_brought_by_its_library(imported, tmp_path, monkeypatch):
  """Its revision and no file that is not read; into where the library keeps it."""
  asked, hub = [], types.ModuleType('huggingface_hub')

  def snapshot_download(repository, **options):
    asked.append((repository, options.pop('revision')))
    ignored = options.pop('ignore_patterns')
    files = ['config.json', 'model-00001-of-00002.safetensors', 'tokenizer.model', 'README.md']
    files += ['adapter_model.safetensors', 'additional_chat_templates/tools.jinja']
    brought = len(files) - 1
    files.remove('README.md')
    files += ['README.md', 'pytorch_model.bin', 'original/model.safetensors', 'model/config.json']
    files += ['consolidated.safetensors', 'model/model.safetensors', 'original/tokenizer.model']
    wanted = [
      file
      for file in files
      if any(fnmatch.fnmatch(file, p) for p in options['allow_patterns'])
      and not any(fnmatch.fnmatch(file, p) for p in ignored)
    ]
    assert wanted == files[:brought] and options.keys() == {'allow_patterns'}
    return str(imported / 'hf')

  hub.snapshot_download = snapshot_download
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  monkeypatch.chdir(tmp_path)
  command('import', '--from', 'org/na-me.2@a1b2', '--workdir', 'run')
  assert configs.load('run').model == configs.load(imported / 'run').model
  command('import', '--from', 'org/name', '--workdir', 'other')
  assert asked == [('org/na-me.2', 'a1b2'), ('org/name', None)]
  # A path that is wrong stays one: what is there of it is no organisation.
  with pytest.raises(SystemExit, match='run/wrong'):
    command('import', '--from', 'run/wrong', '--workdir', 'third')
  assert len(asked) == 2


@pytest.mark.parametrize('installed', [True, False])
def test_without_the_hub_it_is_said_how_to_bring_a_checkpoint(installed, tmp_path, monkeypatch):
  def snapshot_download(*_, **__):
    raise ConnectionError('no route\nand more')

  hub = types.ModuleType('huggingface_hub')
  hub.snapshot_download = snapshot_download
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub if installed else None)
  monkeypatch.chdir(tmp_path)
  reason = r'\(ConnectionError: no route\)' if installed else 'pip install huggingface_hub'
  with pytest.raises(SystemExit, match=f'error: org/name is no.*{reason}.*config.json') as error:
    command('import', '--from', 'org/name', '--workdir', 'run')
  assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()
