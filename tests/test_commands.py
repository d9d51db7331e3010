"""Do the commands that people type behave? Real processes of train.py and generate.py:
stopped, killed, misused, asked for text.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from typing import IO

import jax
import numpy as np
import pytest

from data.tokenizers import ByteTokenizer
from tests.test_docs import ON_TUNED, python_commands
from training import disk
from workdir.checkpoint import SPILLED, Checkpoints

ROOT = pathlib.Path(__file__).parents[1]
SAVE_EVERY = 4
PATIENCE = 300  # seconds after which a process counts as hung
CONFIG = f'''
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config():
  return Config(
      model=ModelConfig(vocabulary=260, width=32, layers=2, heads=4, kv_heads=2, feed_forward=64),
      data=DataConfig(
          sources=(SourceConfig(kind='text', path='DIRECTORY/text.txt'),),
          clean=CleanConfig(near_duplicates=0.0),
          tokenizer=TokenizerConfig(kind='byte'),
          sequence_length=32,
          batch_size=8,
          split='tail',
          cache_dir='DIRECTORY/cache',
      ),
      optimizer=OptimizerConfig(learning_rate=0.01, schedule='constant'),
      train=TrainConfig(
          steps=40, log_every=1, save_every={SAVE_EVERY}, eval_every=10, eval_batches=1
      ),
  )
'''


# Read by every Python that starts with its directory in PYTHONPATH: whoever prints HOLD then waits
# for the file RELEASE, so that what a test does meanwhile comes neither too early nor too late.
HOLDING = """
import builtins, os, pathlib, time
shown = builtins.print

def held(*values, **how):
  shown(*values, **how)
  if os.environ['HOLD'] in ' '.join(map(str, values)):
    while not pathlib.Path(os.environ['RELEASE']).exists():
      time.sleep(0.01)

if os.environ.get('HOLD'):
  builtins.print = held
"""


@dataclasses.dataclass
class Finished:
  code: int
  out: str
  error: str


@contextlib.contextmanager
def signals_as_at_a_terminal():
  """What is started meanwhile heeds SIGHUP and SIGINT, though these tests may run under nohup or in
  the background, where both are ignored and children inherit that. Nor does Python know what a
  library has done: libtpu, once loaded, ignores SIGHUP.
  """
  before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGHUP, signal.SIGINT)}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


class Process:
  """A command in the background; its output goes to a file.

  hold: where it prints this, it waits for `release`. terminal: what goes to stderr stands between
  what goes to stdout, as on a screen. stdin: nothing, where it is not given.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *command: str,
    hold: str = '',
    terminal: bool = False,
    stdin: IO | int | None = None,
  ):
    self.path = directory / f'output-{time.monotonic_ns()}'
    # XLA_FLAGS asks for eight devices
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    environment |= {
      'JAX_PLATFORMS': 'cpu',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'PYTHONFAULTHANDLER': '1',
    }
    if hold:
      (directory / 'sitecustomize.py').write_text(HOLDING)
      environment |= {
        'HOLD': hold,
        'RELEASE': f'{self.path}.release',
        'PYTHONPATH': str(directory),
      }
    with (
      open(self.path, 'w') as out,
      open(f'{self.path}.error', 'w') as error,
      signals_as_at_a_terminal(),
    ):
      self.process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=out,
        stderr=out if terminal else error,
        env=environment,
      )

  def out(self) -> str:
    return self.path.read_text()

  def until(self, condition) -> bool:
    """Waits for the condition; False where the process ended first."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
      if self.process.poll() is not None or time.monotonic() > give_up:
        return False
      time.sleep(0.0005)
    return True

  def release(self) -> None:
    pathlib.Path(f'{self.path}.release').touch()

  def end(self) -> Finished:
    try:
      code = self.process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
      # The error output then tells where every thread hangs
      self.process.send_signal(signal.SIGABRT)
      code = self.process.wait()
    return Finished(code, self.out(), pathlib.Path(f'{self.path}.error').read_text())


class Runs:
  """train.py and generate.py with a config file on a small text."""

  def __init__(self, directory: pathlib.Path):
    self.directory = directory
    draw = random.Random(5)
    words = [''.join(draw.choices('abcdefghijklmnop', k=draw.randint(2, 7))) for _ in range(80)]
    (directory / 'text.txt').write_text(' '.join(draw.choices(words, k=4000)))
    (directory / 'small.py').write_text(CONFIG.replace('DIRECTORY', str(directory)))

  def start(self, workdir: pathlib.Path, *flags: str, hold: str = '') -> Process:
    return Process(
      self.directory,
      'train.py',
      f'--config={self.directory / "small.py"}',
      f'--workdir={workdir}',
      *flags,
      hold=hold,
    )

  def train(self, workdir: pathlib.Path, *flags: str) -> Finished:
    return self.start(workdir, *flags).end()

  def generate(
    self,
    workdir: pathlib.Path,
    *flags: str,
    terminal: bool = False,
    stdin: IO | int | None = None,
  ) -> Finished:
    command = 'generate.py', f'--workdir={workdir}', *flags
    return Process(self.directory, *command, terminal=terminal, stdin=stdin).end()


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  return Runs(tmp_path_factory.mktemp('runs'))


@pytest.fixture(scope='module')
def whole(runs):
  """The directory of a run of 40 steps that nothing interrupted."""
  workdir = runs.directory / 'whole'
  done = runs.train(workdir)
  assert done.code == 0, done.error
  assert 'step 40/40' in done.out and 'Held-out bits per byte' in done.out
  return workdir


def arrays(workdir, step) -> dict[str, np.ndarray]:
  import orbax.checkpoint as ocp

  checkpoints = Checkpoints(workdir)
  assert not checkpoints.problems(step)
  record, directory = checkpoints.record(step), checkpoints.directory / f'{step:08d}'
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  spilled = {
    name: np.asarray(
      disk.stored(
        directory / SPILLED / name,
        jax.ShapeDtypeStruct(*record['leaves'][name], sharding=here),
        parts,
      )
    )
    for name, parts in record['spilled'].items()
  }
  request = {name: 0 for name in record['leaves'] if name not in spilled}
  with ocp.PyTreeCheckpointer() as reader:
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), request)
    return (
      reader.restore(directory, args=ocp.args.PyTreeRestore(item=request, restore_args=arguments))
      | spilled
    )


def assert_same_end(workdir, whole, step=40):
  """Parameters, optimizer, position in the data and every logged loss are those
  of the uninterrupted run.
  """
  a, b = arrays(workdir, step), arrays(whole, step)
  assert a.keys() == b.keys()
  assert not [
    name for name in a if a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes()
  ]
  assert Checkpoints(workdir).record(step)['data'] == Checkpoints(whole).record(step)['data']
  assert (
    Checkpoints(workdir).record(step)['progress'] == Checkpoints(whole).record(step)['progress']
  )
  assert losses(workdir) == losses(whole) and len(losses(workdir)) == step


def losses(workdir) -> list[tuple[int, str]]:
  return re.findall(r'"step": (\d+).*?"loss": ([\d.e-]+)', (workdir / 'metrics.jsonl').read_text())


def checkpoint_of(out: str) -> int:
  """Where the process says that it goes on."""
  found = re.search(r'going on from checkpoint (\d+)', out)
  return int(found[1]) if found else 0


def assert_plain(done: Finished, *said: str):
  """Failed with a message and without a traceback."""
  assert done.code not in (0, -signal.SIGSEGV, -signal.SIGABRT)
  assert 'Traceback' not in done.error + done.out
  for part in said:
    assert part in done.error, done.error


def test_an_unknown_field_names_the_nearest(tmp_path):
  done = Process(
    tmp_path,
    'train.py',
    '--config=configs/tiny.py',
    f'--workdir={tmp_path / "run"}',
    '--config.modle.width=64',
  ).end()
  assert_plain(done, "no field 'modle'; did you mean 'model'?")
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_impossible_wishes_end_in_one_line(runs, whole, tmp_path):
  """In one go: what a config, a mesh and a directory can get wrong each goes
  through the same door.
  """
  before = {path: path.read_bytes() for path in whole.rglob('*') if path.is_file()}
  done = runs.train(whole, '--config.model.width=64', '--config.train.steps=50')
  assert_plain(done, 'error: ', 'model.width: 32 -> 64', 'Use another --workdir')
  assert {path: path.read_bytes() for path in whole.rglob('*') if path.is_file()} == before
  done = runs.train(tmp_path, '--config.mesh.fsdp=2')
  assert_plain(done, 'error: ', 'change one of them')


@pytest.mark.parametrize('numbers', [(signal.SIGTERM, signal.SIGINT)], ids=['SIGTERM, then SIGINT'])
@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(runs, whole, tmp_path, numbers):
  last = 0
  for number, step in zip(numbers, (6, 17), strict=True):
    process = runs.start(tmp_path, hold=f'step {step}/40')
    assert process.until(lambda: f'step {step}/40' in process.out())
    if number == signal.SIGTERM:
      holder = f'{tmp_path} is in use by process {process.process.pid} on '
      refused = runs.train(tmp_path)
      assert_plain(refused, 'error: ', holder, 'or give another --workdir')
    process.process.send_signal(number)
    process.release()
    done = process.end()
    assert done.code == 0, done.error
    assert 'Traceback' not in done.error
    stopped = re.search(
      rf'stopped after step (\d+): {signal.Signals(number).name}; '
      'the same command goes on from there',
      done.out,
    )
    assert stopped and int(stopped[1]) >= step
    assert Checkpoints(tmp_path).latest() == int(stopped[1])
    assert checkpoint_of(done.out) == last
    last = int(stopped[1])
    assert f'| Steps | {last} |' in (tmp_path / 'report.md').read_text()
  done = runs.train(tmp_path)
  assert done.code == 0 and checkpoint_of(done.out) == last
  assert_same_end(tmp_path, whole)


def unfinished(directory: pathlib.Path) -> set[tuple[str, int]]:
  """Checkpoints that have no record yet: names,
  and inodes to tell a second attempt from what the first one left.
  """
  if not directory.exists():
    return set()
  entries = list(os.scandir(directory))
  names = {entry.name for entry in entries}
  return {
    (entry.name, entry.inode())
    for entry in entries
    if '.json' not in entry.name and f'{entry.name}.json' not in names
  }


def kill_and_restart(runs, workdir, kinds, draw, steps, *flags) -> list[dict]:
  """Kills a process of training for each kind of moment, restarted each time,
  then lets one finish; what each kill cost.
  """
  seen = []
  checkpoints = Checkpoints(workdir, log=lambda _: None)
  flags = f'--config.train.steps={steps}', *flags

  def begun():
    return max([0, *checkpoints.steps()])

  for kind in kinds:
    left = unfinished(checkpoints.directory)

    def writing():
      return unfinished(checkpoints.directory) - left

    process = runs.start(workdir, *flags)
    if kind == 'start':
      time.sleep(draw.uniform(0.0, 3.0))
    else:
      first = begun()
      alive = process.until(lambda: f'step {first + 1}/' in process.out())
      target = first + draw.randint(2, steps // (len(kinds) + 3))
      alive = alive and process.until(lambda: f'step {target}/' in process.out())
      if kind == 'save':
        alive = alive and process.until(writing)
      else:
        time.sleep(draw.uniform(0.0, 0.02))
      assert alive, process.end()
    process.process.kill()
    done = process.end()
    assert done.code == -signal.SIGKILL, 'the run ended before it was killed: give it more steps'
    shown = [int(step) for step in re.findall(rf'step (\d+)/{steps}', done.out)]
    seen.append(
      {
        'kind': kind,
        'writing': bool(writing()),
        'lost': max(shown) - begun() if shown else 0,
        'checkpoint': begun(),
      }
    )
  done = runs.train(workdir, *flags)
  assert done.code == 0, done.error
  assert checkpoint_of(done.out) == seen[-1]['checkpoint']
  return seen


def assert_little_was_lost(seen):
  """A save is asynchronous: when the process dies, the last one may not be complete,
  but the one before it is.
  """
  assert all(0 <= kill['lost'] <= 2 * SAVE_EVERY for kill in seen), seen
  assert any(kill['writing'] or kill['lost'] for kill in seen), seen
  assert [kill['checkpoint'] for kill in seen] == sorted(kill['checkpoint'] for kill in seen), seen


@pytest.mark.slow
@pytest.mark.long
def test_two_kills_change_nothing(runs, whole, tmp_path):
  seen = kill_and_restart(runs, tmp_path, ('step', 'save'), random.Random(1), 40)
  assert_little_was_lost(seen)
  assert_same_end(tmp_path, whole)
  assert not unfinished(tmp_path / 'checkpoints')


@pytest.mark.slow
@pytest.mark.long
def test_two_kills_of_an_adapter_change_nothing(runs, whole, tmp_path):
  flags = f'--config.init={whole}', '--config.adapter.kind=lora', '--config.adapter.rank=2'
  flags += ('--config.adapter.dropout=0.1',)
  straight = tmp_path / 'straight'
  assert runs.train(straight, *flags).code == 0
  seen = kill_and_restart(runs, tmp_path / 'killed', ('step', 'save'), random.Random(1), 40, *flags)
  assert_little_was_lost(seen)
  assert_same_end(tmp_path / 'killed', straight)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('flags', [(), ('--config.train.offload_optimizer=disk',)], ids=str)
def test_twelve_kills_change_nothing(runs, tmp_path, flags):
  steps, draw = 200, random.Random(2)
  whole = tmp_path / 'whole'
  assert runs.train(whole, f'--config.train.steps={steps}', *flags).code == 0
  kinds = ['start'] * 3 + ['step'] * 5 + ['save'] * 4
  draw.shuffle(kinds)
  seen = kill_and_restart(runs, tmp_path / 'killed', kinds, draw, steps, *flags)
  print(*seen, sep='\n')
  assert_little_was_lost(seen)
  assert any(kill['writing'] for kill in seen)
  assert_same_end(tmp_path / 'killed', whole, steps)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(runs, whole, tmp_path):
  workdir = tmp_path / 'run'
  subprocess.run(['cp', '-r', str(whole), str(workdir)], check=True)
  path = max(
    (workdir / 'checkpoints' / '00000040').rglob('*'),
    key=lambda p: p.stat().st_size if p.is_file() else -1,
  )
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)
  done = runs.train(workdir)
  assert done.code == 0, done.error
  assert (
    'WARNING: checkpoint 40 is damaged' in done.out
    and str(path) in done.out
    and checkpoint_of(done.out) == 36
  )
  assert_same_end(workdir, whole)


@pytest.mark.slow
def test_generate_writes_prompt_and_text_and_repeats_itself_by_seed(runs, whole):
  flags = ('--prompt=abc d', '--prompt=', '--max_new_tokens=12', '--temperature=0.9')
  first = runs.generate(whole, *flags, '--seed=1')
  again = runs.generate(whole, *flags, '--seed=1', terminal=True)
  assert first.code == again.code == 0, first.error
  assert first.out.startswith('abc d') and len(first.out) > len('abc d\n\n') + 10
  # On a screen what is logged comes before the text, not in its midst.
  assert again.out == first.error + first.out and 'attention:' in first.error


@pytest.mark.slow
@pytest.mark.long
def test_drafts_are_timed_and_write_the_same(runs, whole, tmp_path):
  done = Process(
    runs.directory,
    '-m',
    'benchmarks.speculation',
    f'--workdir={whole}',
    '--documents=1',
    '--prompt_tokens=12',
    '--max_new_tokens=20',
    f'--json={tmp_path / "found.json"}',
  ).end()
  assert done.code == 0 and '1 held-out documents, 12 + 20 tokens each' in done.out, done.error
  found = json.loads((tmp_path / 'found.json').read_text())['results']
  assert (
    found['plain']['drafted'] == 0 < found['early exit 1']['drafted']
    and 'early exit 2' not in found
  )


@pytest.mark.slow
def test_generate_says_what_is_wrong(runs, whole, tmp_path):
  assert_plain(
    runs.generate(tmp_path / 'nowhere'),
    'error: ',
    'config.json does not exist',
    'train.py --workdir',
  )
  assert_plain(
    runs.generate(whole, '--prompt=' + 'a' * 40),
    'error: ',
    'a prompt of 41 tokens',
    'model.max_length=32',
    'shorten',
  )
  assert_plain(
    runs.generate(whole, '--checkpoint=7'), 'error: ', "checkpoint='7' is unknown", '36', '40'
  )


@pytest.mark.slow
def test_ctrl_c_ends_generate_in_one_line(runs, whole, tmp_path):
  def ended(process, then):
    process.process.send_signal(signal.SIGINT)
    then()
    done = process.end()
    assert (
      done.code == 130
      and done.error.endswith('interrupted\n')
      and 'Traceback' not in done.error + done.out
    ), done
    return done.out

  prompts = [f'{i:02} ' for i in range(90)]
  process = Process(
    runs.directory,
    'generate.py',
    f'--workdir={whole}',
    *(f'--prompt={prompt}' for prompt in prompts),
    '--chunk=1',
    '--max_new_tokens=28',
    '--logit_bias=2:-inf',
    hold=prompts[1],
  )
  assert process.until(lambda: f'\n{prompts[1]}' in process.out())
  out = ended(process, process.release)
  assert out.startswith(prompts[0]) and f'\n{prompts[-1]}' not in out, (
    'it went on to the next prompt'
  )
  os.mkfifo(tmp_path / 'prompts')  # which has a writer only when the command waits for one
  process = Process(
    runs.directory, 'generate.py', f'--workdir={whole}', f'--prompts={tmp_path / "prompts"}'
  )
  writer = []

  def open_():
    with contextlib.suppress(OSError):
      writer.append(os.open(tmp_path / 'prompts', os.O_WRONLY | os.O_NONBLOCK))
    return writer

  assert process.until(open_)
  # Python hears a signal that comes just before it begins to read when the read ends.
  assert ended(process, lambda: os.close(writer[0])) == ''


# The command as the leader of a session whose terminal is stdin, and with that for all it shows.
TERMINAL = '''
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.dup2(0, 1), os.dup2(0, 2)
os.execv(sys.executable, [sys.executable, 'generate.py', *sys.argv[1:]])
'''
GENERATE_EACH = '''
import json, os, sys
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=3'
from absl import flags
import generate
load = generate.Generator.load
loaded = {}
def load_once(*given, **how):
  asked = repr((given, how))
  return loaded.get(asked) or loaded.setdefault(asked, load(*given, **how))
generate.Generator.load = load_once
for line in json.loads(sys.argv[1]):
  flags.FLAGS.unparse_flags()
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  flags.FLAGS(['generate.py', *line])
  try:
    generate.main(['generate.py'])
  except SystemExit as end:
    print(end.code)
  print('=====')
'''


@pytest.fixture(scope='module')
def said(runs, whole):
  """What generate.py prints for each of several lots of flags, in one process."""

  def run(*lots):
    flags = [[f'--workdir={whole}', *lot] for lot in lots]
    done = Process(runs.directory, '-c', GENERATE_EACH, json.dumps(flags)).end()
    assert done.code == 0, done.error
    return done.out.split('=====\n')[:-1]

  return run


def assert_said(found, words):
  for one, expected in zip(found, words, strict=True):
    assert one.startswith('error: ') and one.count('\n') == 1 and re.search(expected, one), (
      one,
      expected,
    )


@pytest.mark.slow
def test_lines_of_prompts_that_cannot_be_are_said_with_their_place(said, tmp_path):
  lines = {
    rb'{"prompt": "a\ud800b"}': r"a text has '\\ud800' at 1, half of a surrogate pair.*; "
    'take it out',
    b'{"prompt": [1.7, 5]}': r'the prompt \[1.7, 5\] is neither a text nor ids, '
    r'whole numbers in \[0, 259\)',
    b'{"prompt": ["a", "b"]}': r"the prompt \['a', 'b'\] is neither a text nor ids",
    b'[]': 'a prompt has no ids; give at least one',
    b'[5, 259]': r'the id 259; this model has ids in \[0, 259\)',
    b'{"promt": "x"}': "key='promt' is unknown; did you mean 'prompt'",
    b'{"prompt": "x", "messages": [{"role": "user"}]}': 'both of "prompt" and "messages"; give one',
    b'{"prompt": null}': 'neither of "prompt" and "messages"; give one',
    b'{"messages": "x"}': "messages='x' must be a list of objects",
    b'{"messages": [{"role": "user", "content": "x"}]}': 'no chat template',
    b'7': "'7' is neither a text nor an object",
    b'"caf\xe9"': 'not UTF-8 .*; save the file as UTF-8',
    b'"a': 'not JSON',
    b'[' * 100_000: 'not JSON',
    b'9' * 5000: 'Exceeds the limit',
  }
  for index, line in enumerate(lines):
    (tmp_path / f'{index}.jsonl').write_bytes(b'\xef\xbb\xbf"fine"\n\n' + line + b'\n')
  found = said(*([f'--prompts={tmp_path}/{index}.jsonl'] for index in range(len(lines))))
  assert_said(
    found,
    [
      re.escape(f'{tmp_path}/{index}.jsonl:3: ') + '.*' + words
      for index, words in enumerate(lines.values())
    ],
  )


@pytest.mark.slow
@pytest.mark.long
def test_the_pages_commands_of_generation_run(said, tmp_path):
  """With this run in the place of runs/tiny; --chat needs a model with a template, --interactive a
  terminal.
  """
  (tmp_path / 'in.jsonl').write_text('"def f("\n{"prompt": "x"}\n')
  (tmp_path / 'examples.jsonl').write_text('{"prompt": "a", "text": "b"}\n' * 2)
  typed = [line for name, line in python_commands() if name == 'generate.py']
  # What asks runs that the pages have tuned is of test_typed.
  typed = [line for line in typed if not ON_TUNED & {*line}]
  lots = []
  for line in typed:
    line = [part for part in line if not part.startswith('--workdir')]
    if not {'--chat', '--interactive'} & {*line}:
      lots.append(
        [re.sub('(in|out|examples)[.]jsonl', rf'{tmp_path}/\g<0>', part) for part in line]
      )
  assert len(lots) >= 4 and ['--prompt', 'def main('] in lots
  for lot, out in zip(lots, said(*lots), strict=True):
    assert out and 'error' not in out, (lot, out)
  written = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert len(written) == 2 * 4
  # 128 new tokens by default, and 32 positions.
  ended = [one for one in written if one['finish'] == 'length']
  assert ended and all('model.max_length=32' in one['note'] for one in ended)


@pytest.mark.slow
@pytest.mark.long
def test_the_pages_examples_from_python_run(runs, whole):
  page = (ROOT / 'docs' / 'generation.md').read_text()
  blocks = re.findall(r'^```python\n(.*?)^```', page, re.M | re.S)
  assert len(blocks) == 3
  code = '\n'.join(blocks).replace('runs/tiny', str(whole)).replace('capacity=128', 'capacity=32')
  done = Process(runs.directory, '-c', code).end()
  assert done.code == 0 and done.out, done.error


@pytest.mark.slow
@pytest.mark.long
def test_the_end_of_the_context_is_said(runs, whole):
  for flags in (['--stream', '--temperature=0', '--lookup=2'], ['--beams=2']):
    done = runs.generate(whole, '--prompt=def f(', '--logit_bias=2:-inf', *flags)
    assert done.code == 0, done.error
    assert 'NOTE: ' in done.error and 'model.max_length=32' in done.error, (flags, done.error)
    assert 'max_new_tokens=128' in done.error and done.out.startswith('def f(')


@pytest.mark.slow
def test_a_mesh_that_does_not_split_the_model_is_said(said):
  assert_said(
    said(['--mesh=data=1,tensor=3']),
    [r'model\.vocabulary=260 does not split over mesh\.tensor=3.*; make .*, or an axis smaller'],
  )


@pytest.mark.slow
def test_flags_that_cannot_be_are_said(said, tmp_path):
  (tmp_path / 'chat.jsonl').write_text('{"messages": [{"role": "user", "content": "x"}]}')
  (tmp_path / 'file').touch()
  lots = {
    (f'--prompts={tmp_path}',): 'Is a directory; give a file',
    (f'--prompts={tmp_path}/none',): 'No such file or directory; give a file',
    (f'--schema={tmp_path}',): 'Is a directory; give a file of JSON',
    (
      f'--output={tmp_path}',
      '--prompt=' + 'a' * 99,
    ): f'--output={tmp_path}: Is a directory; give a file that can be written',
    (
      f'--output={tmp_path}/file/out',
      '--prompt=' + 'a' * 99,
    ): '--output=.*; give a file that can be written',
    (f'--prompts={tmp_path}/chat.jsonl', '--score'): 'chat.jsonl:1: messages with --score',
    (
      '--score',
      '--beams=2',
      '--bench',
      '--chat',
      '--stream',
    ): '--score with --chat, --stream, --bench, --beams: it generates nothing',
    (
      '--stream',
      '--logprobs=3',
    ): '--stream with --logprobs: it prints text alone.* give --nostream',
    ('--batch_size=2', '--bench', '--prompt=a'): '--bench with --batch_size',
    ('--batch_size=2', '--stream', '--prompt=a'): '--stream with --batch_size',
    ('--shots=2',): '--shots=2 without --examples; give a file',
    ('--interactive',): '--interactive is a conversation at a terminal',
    ('--interactive', '--chat'): 'give one of the two',
    ('--prompts=-',): 'stdin holds no prompt',
    (f'--examples={tmp_path}/file',): 'file holds no example',
    ('--draft_tokens=9',): 'draft_tokens=9, but nothing drafts; give draft, lookup or early_exit',
    ('--logprobs=260', '--max_new_tokens=2'): 'logprobs=260 must be at most 259',
    (
      '--mesh=stage=2',
      '--early_exit=1',
      '--max_new_tokens=2',
    ): 'early_exit=1 on a mesh with stages.*; use lookup',
  }
  assert_said(said(*lots), lots.values())
  assert sorted(path.name for path in tmp_path.iterdir()) == ['chat.jsonl', 'file']


@pytest.mark.slow
def test_a_conversation_at_a_terminal(runs, whole, tmp_path):
  """Ctrl-C is what a person types: the terminal makes the signal."""
  master, slave = pty.openpty()
  process = Process(
    runs.directory,
    '-c',
    TERMINAL,
    f'--workdir={whole}',
    '--interactive',
    '--max_new_tokens=20',
    f'--logit_bias={ByteTokenizer().encode("z")[0]}:99',
    '--chunk=1',
    hold='z',
    stdin=slave,
  )
  os.close(slave)
  shown = []

  def comes(words, seconds):
    give_up = time.monotonic() + seconds
    while words not in ''.join(shown) and time.monotonic() < give_up:
      if select.select([master], [], [], 0.1)[0]:
        shown.append(os.read(master, 1000).decode())
    _, said, rest = ''.join(shown).partition(words)
    shown[:] = [rest] if said else shown
    return said

  def until(words):
    assert comes(words, PATIENCE), (words, shown)

  def interrupt(words):
    # A signal between readline's prompt and its waiting is heeded at the next key only.
    time.sleep(1)
    type_('\x03')
    if not comes(words, 20):
      type_('\x03')
      until(words)

  def type_(text):
    os.write(master, text.encode())

  until('ends the conversation')
  until('> ')
  type_('abc d\n')
  until('z')
  interrupt('(stopped; what is written stays')
  process.release()
  until('> ')
  type_(' e\n')
  until('zzz')
  until('> ')
  type_(f'/save {tmp_path}/text\n')
  until('(wrote 2 turns')
  until('> ')
  type_('/nosuch\n')
  until("error: command='/nosuch' is unknown")
  until('> ')
  interrupt('Ctrl-C again')
  until('> ')
  type_('/undo\n')
  until('left: 1 turn)')
  until('> ')
  interrupt('Ctrl-C again')
  until('> ')
  interrupt('\n')
  done = process.end()
  os.close(master)
  assert done.code == 0 and 'Traceback' not in ''.join(shown) + done.error, (shown, done)
  assert (tmp_path / 'text').read_text() == f'abc dz e{"z" * 20}'


@pytest.mark.slow
def test_a_pipe_is_a_prompt_and_batches_are_written_as_they_come(runs, whole, tmp_path):
  (tmp_path / 'hi').write_text('abc\n')
  with open(tmp_path / 'hi') as stdin:
    piped = runs.generate(whole, '--max_new_tokens=4', '--seed=1', stdin=stdin)
  given = runs.generate(whole, '--max_new_tokens=4', '--seed=1', '--prompt=abc')
  assert piped.code == 0 and piped.out == given.out and piped.out.startswith('abc')

  (tmp_path / 'in').write_text(''.join(f'"{i:02}"\n' for i in range(400)))
  process = Process(
    runs.directory,
    'generate.py',
    f'--workdir={whole}',
    f'--prompts={tmp_path / "in"}',
    f'--output={tmp_path / "out"}',
    '--batch_size=2',
    '--max_new_tokens=20',
  )

  def two_lines():
    return (tmp_path / 'out').exists() and (tmp_path / 'out').read_bytes().count(b'\n') >= 2

  # A signal in the middle of a line takes this line back: of two the first stays.
  assert process.until(two_lines)
  process.process.send_signal(signal.SIGINT)
  done = process.end()
  assert done.code == 130 and 'Traceback' not in done.error, done
  lines = (tmp_path / 'out').read_bytes().decode().split('\n')
  written = [json.loads(line)['prompt'] for line in lines[:-1]]
  assert lines[-1] == '' and written == [f'{i:02}' for i in range(len(written))] and written


@pytest.mark.slow
def test_what_is_asked_is_written(said, tmp_path):
  (tmp_path / 'in.jsonl').write_text(
    '"a\u2028b\x85c"\r\n{"prompt": "x", "messages": null}\n[5, 6, 7]', encoding='utf-8', newline=''
  )
  source, seed = (
    f'--prompts={tmp_path}/in.jsonl',
    ('--prompt=a', '--prompt=b', f'--seed={2**32 - 1}', '--max_new_tokens=4'),
  )
  found = said(
    (source, '--max_new_tokens=2', f'--output={tmp_path}/out.jsonl'),
    (source, '--score', f'--output={tmp_path}/scores.jsonl'),
    seed,
    (*seed, '--nostream'),
    ('--prompt=aaaaaaaa', '--lookup=1', '--draft_tokens=3', '--max_new_tokens=9', '--bench'),
  )

  def read(name):
    return [json.loads(line) for line in (tmp_path / name).read_bytes().split(b'\n')[:-1]]

  assert (
    [one['prompt'] for one in read('out.jsonl')]
    == [one['prompt'] for one in read('scores.jsonl')]
    == ['a\u2028b\x85c', 'x', [5, 6, 7]]
  )
  assert all(
    len(one['logprobs']) == len(one['ids']) - 1 and max(one['logprobs']) < 0
    for one in read('scores.jsonl')
  )
  assert found[2] == found[3], 'also behind the last seed'
  assert (
    'drafted tokens kept' in found[4] and 'without drafts ' in found[4] and 'error' not in found[4]
  ), found
