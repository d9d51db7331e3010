"""How does a command end that was stopped, or that the system refused something? In one line, with
the code that launchers look at, and soon, whatever its threads wait for.
"""

import errno
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading

import pytest
from absl import flags

import commands
import train
from data.config import DataConfig, SourceConfig
from tests.test_commands import ROOT, Process, Runs
from training import overrides
from training.config import Config, TrainConfig
from workdir.checkpoint import Checkpoints

# A module or a config that says that it is there, and stays. Where it slept long, or read what
# never comes, a signal just before the call would not wake it: Python looks at signals between
# calls.
WAITING = """import pathlib, time
pathlib.Path({path!r}).touch()
while True:
  time.sleep(0.01)
"""


class Ended(BaseException):
  """What the process would have ended with."""


@pytest.fixture
def end(monkeypatch, capsys):
  """(what a command raises) -> (code, what it said on stderr)."""

  def leave(code):
    raise Ended(code)

  monkeypatch.setattr(os, '_exit', leave)

  def run(error, stopped_code=0):
    def command():
      raise error

    with pytest.raises(Ended) as ended:
      commands.end(command, stopped_code)
    return ended.value.args[0], capsys.readouterr().err

  return run


def test_what_a_person_can_mend_is_one_line(end):
  full = OSError(errno.ENOSPC, 'No space left on device', 'runs/x')
  assert end(full) == (
    1,
    'error: runs/x: No space left on device; the disk is full: make room and run the same command '
    'again\n',
  )
  assert end(SystemExit('error: no')) == (1, 'error: no\n')
  assert end(FileNotFoundError('x does not exist; train it')) == (
    1,
    'error: x does not exist; train it\n',
  )
  assert end(FloatingPointError('step 2: nan')) == (1, 'error: step 2: nan\n')
  code, said = end(RuntimeError('RESOURCE_EXHAUSTED: 9 GB\nof\nmany lines'))
  assert (code, said.count('\n')) == (1, 1) and 'out of memory' in said and '9 GB' in said


def test_an_interruption_is_one_line_and_has_its_code(end):
  assert end(KeyboardInterrupt()) == (130, '\ninterrupted\n')
  assert end(KeyboardInterrupt('SIGINT')) == (130, '\ninterrupted\n')
  assert end(KeyboardInterrupt('SIGTERM')) == (143, '\ninterrupted by SIGTERM\n')
  assert end(KeyboardInterrupt('SIGTERM'), 75) == (75, '\ninterrupted by SIGTERM\n')


def test_what_is_our_fault_is_said_to_be(end):
  code, said = end(TypeError('unhashable'))
  assert code == 1 and said.startswith('Traceback') and 'TypeError: unhashable\n' in said
  assert said.endswith(
    'error: this is a fault of the program, not of what was asked of it; please report it\n'
  )


def test_other_codes_and_good_ends_are_left_alone():
  assert commands.end(lambda: None) is None
  with pytest.raises(SystemExit) as ended:
    commands.end(lambda: sys.exit(75))
  assert ended.value.code == 75


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  return Runs(tmp_path_factory.mktemp('endings'))


@pytest.fixture
def waiting(tmp_path):
  """(command line) -> a process that waits where it reads what was written to `waiting.source`."""
  there = tmp_path / 'there'

  def start(*command):
    process = Process(tmp_path, *command)
    assert process.until(there.exists), process.end()
    return process

  start.source = WAITING.format(path=str(there))
  return start


@pytest.mark.parametrize(
  'number, flags, code',
  [
    (signal.SIGTERM, ['--stopped_code=75'], 75),
    (signal.SIGHUP, ['--stopped_code', '75'], 75),
    (signal.SIGINT, [], 130),
  ],
  ids=str,
)
def test_a_signal_before_the_first_step_has_the_code_of_a_stop(
  waiting, tmp_path, number, flags, code
):
  """While the config is read: everything up to the first step goes the same way."""
  (tmp_path / 'config.py').write_text(waiting.source)
  workdir = f'--workdir={tmp_path / "run"}'
  process = waiting('train.py', f'--config={tmp_path / "config.py"}', workdir, *flags)
  process.process.send_signal(number)
  done = process.end()
  by = '' if number == signal.SIGINT else f' by {number.name}'
  assert (done.code, done.error.strip()) == (code, f'interrupted{by}')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'command, code',
  [
    (['train.py', '--stopped_code=75'], 75),
    (['generate.py'], 143),
    (['plan.py'], 143),
    (['convert.py'], 143),
  ],
  ids=lambda x: x[0] if isinstance(x, list) else str(x),
)
def test_a_signal_while_modules_are_loaded_is_one_line(
  waiting, tmp_path, monkeypatch, command, code
):
  (tmp_path / 'jax.py').write_text(waiting.source)
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  # The directory of the script comes first, which has no jax.
  process = waiting(*command)
  process.process.send_signal(signal.SIGTERM)
  done = process.end()
  assert (done.code, done.error) == (code, '\ninterrupted by SIGTERM\n')


# A compilation holds the main thread where no Python runs, and libtpu has handlers of its own.
COMPILING = """import ctypes, faulthandler, pathlib, signal
for number in (signal.SIGTERM, signal.SIGINT):
  faulthandler.register(number, chain=False)
pathlib.Path({path!r}).touch()
ctypes.CDLL(None).sleep(30)
"""


@pytest.mark.parametrize(
  'number, code, said',
  [(signal.SIGTERM, 143, 'interrupted by SIGTERM'), (signal.SIGINT, 130, 'interrupted')],
  ids=str,
)
def test_a_plan_that_is_killed_while_it_compiles_is_one_line(
  waiting, tmp_path, monkeypatch, number, code, said
):
  (tmp_path / 'jax.py').write_text(COMPILING.format(path=str(tmp_path / 'there')))
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  process = waiting('plan.py')
  process.process.send_signal(number)
  done = process.end()
  assert (done.code, done.error) == (code, f'\n{said}\n')


@pytest.mark.slow
def test_a_save_that_the_disk_refuses_ends_the_run_and_what_was_saved_stays(runs, tmp_path):
  """Files may be as large here as all but a checkpoint's largest; orbax says it in 300 lines, and
  its threads, which wait, are not waited for.
  """
  assert runs.train(tmp_path, '--config.train.steps=6').code == 0
  before = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # processes inherit it
  try:
    done = runs.train(tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert done.code == 1
  (line,) = [line for line in done.error.splitlines() if not line.startswith('attention: ')]
  assert re.fullmatch(
    rf'error: {re.escape(str(tmp_path))}/checkpoints/00000008: File too large; .*ulimit.*', line
  )
  left = {path.name for path in (tmp_path / 'checkpoints').iterdir()}
  assert {*before} <= left and not {'00000008', '00000008.json'} & left
  assert Checkpoints(tmp_path).latest() == 6


UNWINDING = """
import sys, threading
import commands
commands.LEAVING = 0.1
def command():
  try:
    raise commands.unanswered('the disk does not answer')
  finally:
    if sys.argv[1] == 'waits':
      threading.Event().wait()
commands.end(command)
"""


@pytest.mark.parametrize('unwinding', ['waits', 'does not wait'])
def test_a_disk_that_was_given_up_is_not_waited_for_on_the_way_out(unwinding):
  done = subprocess.run(
    [sys.executable, '-c', UNWINDING, unwinding],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (done.returncode, done.stderr, done.stdout) == (
    1,
    'error: the disk does not answer\n',
    '',
  )


def test_who_is_no_command_is_not_ended(monkeypatch):
  monkeypatch.setattr(commands, 'LEAVING', 0.0)
  monkeypatch.setattr(os, '_exit', pytest.fail)
  before = threading.active_count()
  assert str(commands.unanswered('x')) == 'x' and threading.active_count() == before


@pytest.mark.slow
def test_a_save_that_the_disk_never_ends_ends_the_run(runs, tmp_path):
  """In the record's place is a pipe that nobody reads."""
  process = runs.start(tmp_path, '--config.train.save_timeout=1', hold='step 1/')
  assert process.until(lambda: 'step 1/' in process.out())
  (tmp_path / 'checkpoints').mkdir(exist_ok=True)
  name = f'00000004.json.{socket.gethostname()}-{process.process.pid}.tmp'
  os.mkfifo(tmp_path / 'checkpoints' / name)
  process.release()
  done = process.end()
  said = done.error.splitlines()[-1]
  assert done.code == 1 and 'Traceback' not in done.error, done
  assert said.startswith(f'error: checkpoint 4 in {tmp_path}/checkpoints is not written after 1 s')
  (tmp_path / 'checkpoints' / name).unlink()
  assert Checkpoints(tmp_path).latest() is None
  assert runs.train(tmp_path, '--config.train.steps=4').code == 0


def test_places_that_are_files_or_cannot_be_are_said_in_one_line(tmp_path):
  (tmp_path / 'file').touch()
  there, other = 'a file is where a directory should be', tmp_path / 'run'
  disk = {'offload_optimizer': 'disk', 'spill_dir': f'{tmp_path}/file/x'}
  for workdir, changes, said in (
    (tmp_path / 'file', {}, f'{tmp_path}/file: File exists; {there}'),
    (tmp_path / 'file' / 'run', {}, f'{tmp_path}/file/run: Not a directory; {there}'),
    (tmp_path / ('x' * 300), {}, 'File name too long; give a shorter path'),
    (other, {'data': DataConfig(cache_dir=f'{tmp_path}/file')}, f'/file: File exists; {there}'),
    (other, {'train': TrainConfig(**disk)}, f'/file/x: Not a directory; {there}'),
  ):
    changes = {'data': DataConfig(cache_dir=str(tmp_path / 'cache')), **changes}
    with pytest.raises(SystemExit) as ended:
      train.run(Config(**changes), workdir)
    assert ended.value.code.startswith('error: ') and said in ended.value.code
    assert '\n' not in ended.value.code
  assert sorted(path.name for path in tmp_path.iterdir()) == ['cache', 'file']


@pytest.mark.parametrize(
  'text, said',
  [
    ('def get_config(:', r'config\.py:1: invalid syntax'),
    ('import nowhere_at_all', r"config\.py:1: ModuleNotFoundError: .*'nowhere_at_all'"),
    ('def get_config():\n  return widht', r"config\.py:2: NameError: name 'widht'"),
    (
      'from model.config import ModelConfig\n\n\ndef get_config():\n  return ModelConfig(widht=3)',
      r"config\.py:5: TypeError: .*'widht'",
    ),
    (
      'from model.config import ModelConfig\n\n\ndef get_config():\n  return ModelConfig(width=-1)',
      r'config\.py:5: model\.width=-1',
    ),
    ('def get_config():\n  return open("nowhere")', r"No such file or directory: 'nowhere'"),
    ('def get_config():\n  return 3', r'get_config\(\) of .*config\.py returned int'),
  ],
  ids=['syntax', 'import', 'name', 'field', 'limit', 'file', 'value'],
)
def test_a_config_file_that_fails_is_said_with_its_line(tmp_path, monkeypatch, text, said):
  (tmp_path / 'config.py').write_text(text)
  monkeypatch.setattr(sys, 'argv', ['train.py', f'--config={tmp_path / "config.py"}'])
  values = flags.FlagValues()
  overrides.define_flag(values)
  with pytest.raises(flags.IllegalFlagValueError, match=said):
    values(sys.argv)


@pytest.mark.costly
@pytest.mark.parametrize(
  'command, said',
  [
    (['train.py', '--config=configs/tiny.py', '--workdir=hdfs://b/run'], '--workdir=hdfs://b/run'),
    (['generate.py', '--workdir=ftp://b/run'], '--workdir=ftp://b/run'),
    (['convert.py', 'export', '--workdir=runs/x', '--to=gs://b/x'], 'to=gs://b/x'),
  ],
  ids=['train', 'generate', 'convert'],
)
def test_addresses_are_refused_before_anything_is_made(tmp_path, command, said):
  done = Process(tmp_path, *command).end()
  assert done.code == 1 and f'error: {said} is an address' in done.error.splitlines()[-1]
  assert 'Traceback' not in done.error and not done.out
  assert not (ROOT / 'gs:').exists() and not (ROOT / 'hdfs:').exists()


def test_addresses_in_a_config_are_refused(tmp_path):
  for changes in (
    {'data': DataConfig(cache_dir='hdfs://b/cache')},
    {'train': TrainConfig(offload_optimizer='disk', spill_dir='s3:/b')},
    {'data': DataConfig(sources=(SourceConfig(kind='text', path='https://x.org/a.txt'),))},
  ):
    with pytest.raises(SystemExit, match=r'error: (data|train)\..* is an address .*mount it'):
      train.run(Config(**changes), tmp_path / 'run')
  assert not [*tmp_path.iterdir()]


@pytest.mark.costly
@pytest.mark.parametrize('value, said', [('1', True), ('true', True), ('0', False)])
@pytest.mark.parametrize('imported', [True, False], ids=['before', 'after'])
def test_numbers_of_64_bits_are_not_heeded(value, said, imported):
  """Whether JAX is imported before the command begins, or by it."""
  script = f"""
import commands
{'import jax' if imported else ''}
def command():
  import jax.numpy as jnp
  print(jnp.arange(3).dtype, jnp.ones(3).dtype)
commands.end(command)
"""
  done = subprocess.run(
    [sys.executable, '-c', script],
    env=os.environ | {'JAX_ENABLE_X64': value, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.stdout == 'int32 float32\n'
  assert (f'JAX_ENABLE_X64={value} is not heeded' in done.stderr) == said
