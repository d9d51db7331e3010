"""Is what lies in a run's directory believed only where it is what the checkpoints say?

Each case changes one file of a finished run of four steps, as a slip or a disk would.
"""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

import convert
import files
import train
from data import generation
from data.extra import extended
from data.generation import GENERATION
from data.tokenizers import ByteTokenizer
from tests.training.conftest import on, run_here
from training import config as configs
from workdir import metrics, seals
from workdir.checkpoint import Checkpoints
from workdir.open import check_own, config_of, open_run
from workdir.untrained import write_run


def four(corpus, steps: int = 4, **parts):
  train = {'steps': steps, 'save_every': 2, 'eval_every': 0} | parts.pop('train', {})
  return on(corpus, train=train, **parts)


@pytest.fixture(scope='module')
def finished(corpus, tmp_path_factory):
  """The directory of a run of four steps."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  run_here(four(corpus), workdir)
  return workdir


@pytest.fixture
def run(finished, tmp_path):
  """A copy of it."""
  return shutil.copytree(finished, tmp_path / 'run')


@pytest.fixture(scope='module')
def longer(corpus, finished, tmp_path_factory):
  """The losses and totals of the run when it goes on to six steps, untouched."""
  workdir = shutil.copytree(finished, tmp_path_factory.mktemp('longer') / 'run')
  run_here(four(corpus, 6), workdir)
  lines = metrics.read_metrics(workdir / metrics.FILE)
  return [line['loss'] for line in lines], lines[-1]['tokens']


def edit(path, old: str, new: str):
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new, 1))


@pytest.mark.slow
def test_a_digit_of_config_json_is_seen_and_the_command_that_is_named_seals_it(run, capsys):
  edit(run / configs.FILE, '"norm_epsilon": 1e-05', '"norm_epsilon": 1e-06')
  for opened in (open_run, configs.load, config_of):
    with pytest.raises(ValueError, match='config.json was changed .* convert.py seal --workdir'):
      opened(run)
  convert.main(['seal', '--workdir', str(run)])
  assert 'model.norm_epsilon: 1e-05 -> 1e-06' in capsys.readouterr().out
  assert open_run(run).config.model.norm_epsilon == 1e-6


def test_a_config_json_of_another_run_is_seen(run, corpus, tmp_path):
  """It is whole and sealed, and of a model of the same shapes."""
  other = four(corpus, model={'norm_epsilon': 1e-3})
  configs.save(other, run)
  with pytest.raises(ValueError, match='not of the model .*norm_epsilon: 1e-05 -> 0.001'):
    open_run(run)
  with pytest.raises(SystemExit, match='norm_epsilon'):
    convert.main(['export', '--workdir', str(run), '--to', str(tmp_path / 'out')])
  # Training goes by what the checkpoint says.
  with pytest.raises(SystemExit, match='norm_epsilon: 1e-05 -> 0.001'):
    run_here(dataclasses.replace(other, train=four(corpus, 6).train), run)


def test_without_config_json_the_checkpoint_says_what_the_model_was(run, corpus):
  (run / configs.FILE).unlink()
  with pytest.raises(SystemExit, match='model.norm_epsilon: 1e-05 -> 0.001'):
    run_here(four(corpus, 6, model={'norm_epsilon': 1e-3}), run)
  with pytest.raises(FileNotFoundError, match='convert.py seal'):
    open_run(run)
  convert.main(['seal', '--workdir', str(run)])
  assert open_run(run).config.model == configs.of(Checkpoints(run).record(4)['config'], '').model


@pytest.mark.slow
@pytest.mark.parametrize('damage', ['cut', 'deleted', 'one bit'])
def test_metrics_that_are_not_what_was_written_are_put_aside(run, corpus, longer, capsys, damage):
  path = run / metrics.FILE
  content = path.read_bytes()
  if damage == 'cut':
    path.write_bytes(b''.join(content.splitlines(keepends=True)[:2]))
  elif damage == 'deleted':
    path.unlink()
  else:
    path.write_bytes(content.replace(b'"loss": 4', b'"loss": 0', 1))
    assert path.read_bytes() != content

  # A run that is at its end says so, and does not fail over a report.
  report = (run / 'report.md').read_bytes()
  run_here(four(corpus), run)
  assert 'nothing to do' in (said := capsys.readouterr().out) and 'there is no report' in said
  assert (run / 'report.md').read_bytes() == report

  run_here(four(corpus, 6), run)
  said = capsys.readouterr().out
  assert re.search(r'WARNING: .*metrics.jsonl (is missing|has|was changed)', said)
  aside = run / 'metrics.damaged-1'
  assert aside.exists() == (damage != 'deleted')
  lines = metrics.read_metrics(path)
  losses, tokens = longer
  assert [line['step'] for line in lines] == [4, 5, 6]
  assert [line['loss'] for line in lines[1:]] == losses[4:] and lines[-1]['tokens'] == tokens


@pytest.mark.slow
def test_what_was_written_after_the_checkpoint_changes_nothing(run, corpus, longer, capsys):
  with open(run / metrics.FILE, 'a') as file:
    file.write('{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
  run_here(four(corpus, 6), run)
  assert 'WARNING' not in capsys.readouterr().out
  assert [line['loss'] for line in metrics.read_metrics(run / metrics.FILE)] == longer[0]


def test_a_checkpoint_under_another_step_is_damaged(run):
  """As `cp -r` would have it, record and all."""
  where = Checkpoints(run).directory
  shutil.copytree(where / '00000004', where / '00000009')
  shutil.copy(where / '00000004.json', where / '00000009.json')
  said = []
  checkpoints = Checkpoints(run, log=said.append)
  assert checkpoints.latest() == 4
  assert 'it is of step 4, under another name' in said[0]


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_named(run, corpus, tmp_path):
  run_here(four(corpus, 6), tmp_path / 'other')
  for name in ('00000006', '00000006.json'):
    source, target = tmp_path / 'other' / 'checkpoints' / name, run / 'checkpoints' / name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
  with pytest.raises(ValueError, match=r'different runs: \[2, 4\] of run .*, \[6\] of run .*move'):
    Checkpoints(run).latest()


def test_another_tokenizer_in_the_directory_is_seen(run):
  path = next(path for path in (run / 'tokenizer').iterdir() if path.is_file())
  path.write_bytes(path.read_bytes() + b' ')
  with pytest.raises(ValueError, match='tokenizer was changed since checkpoint 4'):
    open_run(run)


def test_other_ends_of_texts_are_seen_and_may_be_meant(run):
  (run / GENERATION).write_text('{"eos_token_id": [3]}')
  with pytest.raises(ValueError, match='generation_config.json was changed since checkpoint 4'):
    open_run(run)
  before = Checkpoints(run).reference(4)
  for _ in range(2):
    convert.main(['seal', '--workdir', str(run)])
    assert open_run(run).tokenizer.generation == {'eos_token_id': [3]}
    # Whoever lies on it, or refers to it, finds it as it was.
    assert Checkpoints(run).reference(4) == before
    Checkpoints(run).check(before)
  # But where its model computes something else, though that is meant, too.
  config = Checkpoints(run).record(4)['config']
  for name, value, same in (('execution', {'scan': False}, True), ('rope_theta', 7.0, False)):
    changed = config | {'model': config['model'] | {name: value}}
    Checkpoints(run).amend(4, {'config': changed})
    assert (Checkpoints(run).reference(4) == before) == same, name
  with pytest.raises(ValueError, match='its digest was 0000'):
    Checkpoints(run).check(before | {'digest': '0000'})


@pytest.mark.parametrize('name', ['tokenizer', GENERATION, configs.FILE])
def test_a_run_begins_with_nothing_that_was_changed(run, corpus, tmp_path, name):
  if name == configs.FILE:
    configs.save(four(corpus, model={'norm_epsilon': 1e-3}), run)
  else:
    path = run / name / 'tokenizer.json' if name == 'tokenizer' else run / name
    path.write_text(path.read_text() + ' ' if path.exists() else '{"eos_token_id": [3]}')
  said = 'not of the model' if name == configs.FILE else f'{name} was changed since checkpoint 4'
  with pytest.raises(SystemExit, match=said):
    run_here(dataclasses.replace(four(corpus), init=str(run)), tmp_path / 'tuned')
  assert not (tmp_path / 'tuned' / configs.FILE).exists()


def test_a_run_goes_on_with_the_ends_that_it_had(run, corpus):
  (run / GENERATION).write_text('{"eos_token_id": [3]}')
  before = (run / 'config.json').read_bytes()
  with pytest.raises(SystemExit, match='generation_config.json was changed since checkpoint 4'):
    run_here(four(corpus, 6), run)
  assert (run / 'config.json').read_bytes() == before


def test_ends_come_from_the_run_that_one_begins_with_once(corpus, tmp_path):
  """What is edited in its own directory, and sealed, stays."""
  base, run = tmp_path / 'base', tmp_path / 'run'
  files.replace(base / GENERATION, '{"eos_token_id": [3]}')
  config = dataclasses.replace(on(corpus), init=str(base))
  train.claim(run, config, ByteTokenizer(), {}, print)
  assert generation.read(run) == {'eos_token_id': [3]}
  (run / GENERATION).write_text('{"eos_token_id": [3, 4]}')
  train.claim(run, config, ByteTokenizer(), {'step': 2}, print)
  assert generation.read(run) == {'eos_token_id': [3, 4]}


def test_an_import_that_is_trained_on_is_of_its_new_tokenizer(corpus, tmp_path):
  """Also before the first checkpoint, where the process may end."""
  ByteTokenizer().save(tmp_path / 'tokenizer')
  write_run(tmp_path, on(corpus), {'model': {'x': np.zeros(2)}}, print)
  checkpoints = Checkpoints(tmp_path)
  before = checkpoints.reference(0)
  check_own(checkpoints.record(0), tmp_path)
  longer = extended(ByteTokenizer(), ['<extra_id_0>'])
  train.claim(tmp_path, on(corpus), longer, checkpoints.record(0), print)
  check_own(checkpoints.record(0), tmp_path)
  assert checkpoints.reference(0) == before
  (tmp_path / GENERATION).write_text('{}')
  with pytest.raises(ValueError, match='generation_config.json was changed since checkpoint 0'):
    check_own(checkpoints.record(0), tmp_path)


def test_a_line_behind_the_checkpoint_that_is_none_is_named(run, corpus):
  with open(run / metrics.FILE, 'a') as file:
    file.write('x\n')
  with pytest.raises(SystemExit, match="metrics.jsonl, line .* is not a line of metrics: 'x'; rem"):
    run_here(four(corpus, 6), run)


def test_other_files_under_the_same_key_are_seen(run, corpus):
  """An index of a prepared corpus that was edited: bytes of the held-out text."""
  config = four(corpus, 6)
  key = Checkpoints(run).record(4)['data']['key'].partition('-')[0]
  index = corpus / 'cache' / key / 'index.json'
  before = index.read_bytes()
  try:
    edit(index, '"bytes": ', '"bytes": 1')
    with pytest.raises(SystemExit, match='index.json was changed since it was written'):
      run_here(config, run)
  finally:
    index.write_bytes(before)
  checkpoints = Checkpoints(run)
  data = checkpoints.record(4)['data']
  checkpoints.amend(4, {'data': data | {'files': 'another'}})
  with pytest.raises(SystemExit, match="files: 'another' then"):
    run_here(config, run)


def test_a_run_of_before_the_seals_goes_on_and_says_so_once(run, corpus, longer, capsys):
  checkpoints = Checkpoints(run)
  for step in checkpoints.steps():
    path = checkpoints.directory / f'{step:08d}.json'
    record = checkpoints.record(step)
    del record['run'], record['config'], record['data']['files']
    path.unlink()
    checkpoints._write_record(step, record)
  values = json.loads((run / configs.FILE).read_text())
  del values['sha256']
  (run / configs.FILE).write_text(json.dumps(values))
  run_here(four(corpus, 6), run)
  assert [line['loss'] for line in metrics.read_metrics(run / metrics.FILE)] == longer[0]
  assert capsys.readouterr().out.count('is of an older version') == 1
  assert json.loads((run / configs.FILE).read_text())['sha256']
  assert Checkpoints(run).record(6)['run']['id']


def test_ids_that_no_text_has_may_be_left_out(tmp_path):
  """A T5 of bytes has sentinels behind them, and is tuned on records by the bytes."""
  plain = ByteTokenizer()
  pretrained = extended(plain, ['<extra_id_0>', '<extra_id_1>'])
  seals.keep_tokenizer(pretrained, tmp_path)
  for known in (plain, pretrained):
    seals.check_inherited(str(tmp_path), known)
  with pytest.raises(ValueError, match=r'\(byte, 260 ids\) is not that of .* \(byte, 261 ids\)'):
    seals.check_inherited(str(tmp_path), extended(plain, ['<mask>']))
  other = tmp_path / 'plain'
  seals.keep_tokenizer(plain, other)
  with pytest.raises(ValueError, match=r'\(byte, 261 ids\) is not that of .* \(byte, 259 ids\)'):
    seals.check_inherited(str(other), pretrained)
