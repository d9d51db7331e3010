"""Are several processes one? Real ones of train.py on this machine:
the same numbers, checkpoints for any number, and a common end.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import sys
import time

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from test_commands import (
  PATIENCE,
  Finished,
  Process,
  Runs,
  arrays,
  assert_same_end,
  checkpoint_of,
  losses,
)

from workdir.checkpoint import Checkpoints

HEARTBEAT = 10  # seconds of silence after which a process is lost
SMALL = ('--config.model.layers=1', '--config.train.steps=8')
LONG = ('--config.model.layers=1', '--config.train.steps=60')


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


@contextlib.contextmanager
def environment(**values):
  """Variables for the processes started within."""
  old = {name: os.environ.get(name) for name in values}
  os.environ.update(values)
  try:
    yield
  finally:
    for name, value in old.items():
      os.environ.pop(name) if value is None else os.environ.update({name: value})


class Group:
  """One run by several processes, each with `flags` and those of its own."""

  def __init__(
    self,
    runs: Runs,
    workdir: pathlib.Path,
    count: int,
    *flags: str,
    own: dict[int, tuple[str, ...]] | None = None,
  ):
    meet = (
      f'--coordinator=localhost:{free_port()}',
      f'--processes={count}',
      f'--heartbeat_timeout={HEARTBEAT}',
    )
    self.processes = [
      runs.start(workdir, *meet, f'--process={i}', *flags, *(own or {}).get(i, ()))
      for i in range(count)
    ]

  def until_step(self, step: int) -> None:
    assert self.processes[0].until(lambda: f'step {step}/' in self.processes[0].out()), self.end()

  def send(self, process: int, number: int) -> None:
    self.processes[process].process.send_signal(number)

  def end(self) -> list[Finished]:
    return [process.end() for process in self.processes]


def train(runs, workdir, count, *flags) -> str:
  """Trains to the end; what process 0 said."""
  done = Group(runs, workdir, count, *flags).end()
  assert [process.code for process in done] == [0] * count, done
  assert not [process.error for process in done if 'Traceback' in process.error]
  return done[0].out


def train_alone(runs, workdir, devices, *flags) -> str:
  """Trains to the end in one process with so many devices."""
  process = runs.start(workdir, *flags, devices=devices)
  done = process.end()
  assert done.code == 0, done.error
  return done.out


class DevicesRuns(Runs):
  def start(self, workdir, *flags, devices=1):
    # The other half of what makes a process: how many devices it has.
    with environment(JAX_NUM_CPU_DEVICES=str(devices)):
      return super().start(workdir, *flags)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  return DevicesRuns(tmp_path_factory.mktemp('runs'))


MEETING = f'''
import json, pathlib, sys, time
from parallel import hosts
coordinator, process, path = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
with hosts.connect(coordinator, 2, process, {HEARTBEAT}):
  def write():
    time.sleep(0.5)
    found = path.read_text() if path.exists() else ''
    path.write_text(f'{{found}}{{process}}')
    return found
  found = hosts.first_alone(write, 'write')
  seen = [hosts.from_first(answer) for answer in (lambda: 7, lambda: None, lambda: process)]
  hosts.check_same('path', str(path))
  print(json.dumps([found, seen, hosts.differing(str(process))]))
  try:
    hosts.check_same('numbers', str(process))
  except ValueError as error:
    sys.exit(f'error: {{error}}')
'''


def test_two_processes_wait_and_agree(tmp_path):
  (tmp_path / 'meeting.py').write_text(MEETING)
  coordinator = f'localhost:{free_port()}'
  with environment(PYTHONPATH=str(pathlib.Path(__file__).parents[2])):
    processes = [
      Process(tmp_path, str(tmp_path / 'meeting.py'), coordinator, str(i), str(tmp_path / 'file'))
      for i in range(2)
    ]
  done = [process.end() for process in processes]
  for process, found in zip(done, ('', '0')):
    assert json.loads(process.out.splitlines()[-1]) == [found, [7, None, 0], [1]], done
  assert done[0].code == 1 and done[1].code != 0
  assert (
    'error: numbers of processes [1] are not those of process 0' in done[0].error + done[1].error
  )


WRITING = f'''
import contextlib, json, sys
import jax
from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from model import transformer
from model.config import ModelConfig
from parallel import hosts
from parallel.mesh import MeshConfig, make_mesh
coordinator, process = sys.argv[1], int(sys.argv[2])
alone = contextlib.nullcontext()
with hosts.connect(coordinator, 2, process, {HEARTBEAT}) if coordinator else alone:
  mesh = make_mesh(MeshConfig(data=1, context=2))
  with jax.set_mesh(mesh):
    config = ModelConfig(
      vocabulary=264,
      width=16,
      layers=2,
      heads=2,
      feed_forward=24,
      max_length=64,
      window=8,
      global_every=2,
      init_scale=1.0,
    )
    model = jax.jit(transformer.init, static_argnums=(0, 1))(config, 0)
  generator = Generator(model, ByteTokenizer(), mesh)
  completions = generator(['def main(', 'x'], max_new_tokens=12, temperature=0.0)
  print(json.dumps([completion.ids for completion in completions]))
'''


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
  """The slots of a cache are half one's, half the other's."""
  (tmp_path / 'writing.py').write_text(WRITING)
  coordinator = f'localhost:{free_port()}'

  def start(coordinator, i):
    return Process(tmp_path, str(tmp_path / 'writing.py'), coordinator, str(i))

  with environment(PYTHONPATH=str(pathlib.Path(__file__).parents[2])):
    processes = [start(coordinator, i) for i in range(2)]
    with environment(JAX_NUM_CPU_DEVICES='2'):
      processes.append(start('', 0))
  done = [process.end() for process in processes]
  assert [process.code for process in done] == [0, 0, 0], done
  one, other, alone = (json.loads(process.out.splitlines()[-1]) for process in done)
  assert one == other == alone and [len(ids) for ids in alone] == [12, 12]


@pytest.mark.slow
def test_a_process_that_never_comes_is_named_by_all_others(runs, tmp_path):
  """In one line, before JAX waits for it."""
  meet = (f'--coordinator=localhost:{free_port()}', '--processes=3', '--meeting_timeout=8')
  done = [
    process.end()
    for process in [runs.start(tmp_path / 'run', *meet, f'--process={i}') for i in (0, 2)]
  ]
  for i, process in zip((0, 2), done, strict=True):
    assert process.code == 1 and 'Traceback' not in process.error, process
    assert f'process {i} of 3 has waited 8 s' in process.error
    assert 'process(es) [1] have not come; start all' in process.error
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_that_slurm_introduces_are_one_bit_for_bit(runs, tmp_path):
  """Two terms have one sum, in whatever order: no tolerance is needed."""
  one, two = tmp_path / 'one', tmp_path / 'two'
  slurm = {
    'SLURM_JOB_ID': '7',
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': '2',
    'JAX_COORDINATOR_PORT': str(free_port()),
  }
  processes = []
  for i in '01':
    with environment(**slurm, SLURM_PROCID=i, SLURM_LOCALID=i):
      processes.append(runs.start(two, *SMALL))
  done = [process.end() for process in processes]
  assert [process.code for process in done] == [0, 0], done
  train_alone(runs, one, 2, *SMALL)
  assert_same_end(two, one, 8)
  for i, process in enumerate(done):
    assert f'process {i} of 2 on' in process.out and '1 of 2 devices' in process.out
  assert (
    done[0].out.count('step 8/8') == 1 and 'data: wrote' in done[0].out and 'wrote ' in done[0].out
  )
  assert 'step' not in done[1].out and 'data:' not in done[1].out, 'the first one speaks for all'
  assert Checkpoints(two).steps() == Checkpoints(one).steps()


def assert_close_end(a, b, steps, tolerance=1e-5):
  """Equal but for the order of the sums over processes: four f32 terms have several."""
  one, other = arrays(a, steps), arrays(b, steps)
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_allclose(one[name], other[name], rtol=0, atol=tolerance, err_msg=name)
  assert Checkpoints(a).record(steps)['data'] == Checkpoints(b).record(steps)['data']
  assert [step for step, _ in losses(a)] == [step for step, _ in losses(b)]
  np.testing.assert_allclose(
    *[[float(loss) for _, loss in losses(x)] for x in (a, b)], rtol=tolerance
  )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'mesh',
  [
    ('--config.mesh.fsdp=2', '--config.mesh.tensor=2', '--config.model.vocabulary=260'),
    ('--config.mesh.fsdp=4',),
    (),
  ],
  ids=str,
)
def test_four_processes_are_one(runs, tmp_path, mesh):
  train(runs, tmp_path / 'four', 4, *SMALL, *mesh)
  train_alone(runs, tmp_path / 'one', 4, *SMALL, *mesh)
  assert_close_end(tmp_path / 'four', tmp_path / 'one', 8)


@pytest.mark.slow
@pytest.mark.long
def test_what_two_processes_wrote_is_read_by_any_number(runs, tmp_path):
  whole = tmp_path / 'whole'
  train_alone(runs, whole, 1, *SMALL)
  workdir = tmp_path / 'run'
  for count, steps in ((2, 2), (1, 4), (4, 6), (2, 8)):
    flags = (
      SMALL[0],
      f'--config.train.steps={steps}',
      '--config.mesh.data=1',
      '--config.mesh.fsdp=-1',
    )
    out = (
      train(runs, workdir, count, *flags) if count > 1 else train_alone(runs, workdir, 1, *flags)
    )
    assert checkpoint_of(out) == steps - 2
  assert_close_end(workdir, whole, 8)


@pytest.fixture(scope='module')
def whole(runs):
  """The directory of a run that nothing interrupted."""
  train_alone(runs, runs.directory / 'whole', 2, *LONG)
  return runs.directory / 'whole'


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_stops_all_after_the_same_step(runs, whole, tmp_path, number):
  group = Group(runs, tmp_path, 2, *LONG, '--stopped_code=75')
  group.until_step(5)
  group.send(1, number)
  done = group.end()
  assert [process.code for process in done] == [75, 75], done
  stopped = int(
    re.search(
      r'stopped after step (\d+): SIGTERM; the same command goes on from there', done[0].out
    )[1]
  )
  assert Checkpoints(tmp_path).latest() == stopped < 60
  assert checkpoint_of(train(runs, tmp_path, 2, *LONG)) == stopped
  assert_same_end(tmp_path, whole, 60)


@pytest.mark.slow
@pytest.mark.parametrize(
  'lost, then', [*(pytest.param(lost, 2, marks=pytest.mark.long) for lost in (1, 0)), (1, 1)]
)
def test_a_lost_process_ends_the_others_and_the_run_goes_on(runs, whole, tmp_path, lost, then):
  group = Group(runs, tmp_path, 2, *LONG)
  group.until_step(9)
  group.send(lost, signal.SIGKILL)
  began = time.monotonic()
  done = group.end()
  assert time.monotonic() - began < PATIENCE / 2, 'it did not end, but was ended'
  assert done[lost].code == -signal.SIGKILL and done[1 - lost].code not in (0, -signal.SIGKILL)
  error = done[1 - lost].error
  assert f'process {1 - lost} of 2 on' in error
  assert re.search(
    r'(stopped sending heartbeats\):\s+1|Task 1 heartbeat timeout)'
    if lost
    else 'leader task was preempted/died',
    error,
  ), error
  if then == 2:
    assert checkpoint_of(train(runs, tmp_path, 2, *LONG)) in (4, 8, 12)
    assert_same_end(tmp_path, whole, 60)
  else:
    assert checkpoint_of(train_alone(runs, tmp_path, 1, *LONG)) in (4, 8, 12)
    assert_close_end(tmp_path, whole, 60, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
  'own, said',
  [
    (('--config.train.seed=1',), 'config and data of processes [1] are not those of process 0'),
    pytest.param(('--workdir=ELSEWHERE',), 'processes [1] do not see', marks=pytest.mark.long),
  ],
  ids=['config', 'workdir'],
)
def test_processes_that_differ_are_told_so(runs, tmp_path, own, said):
  own = {1: tuple(flag.replace('ELSEWHERE', str(tmp_path / 'elsewhere')) for flag in own)}
  done = Group(runs, tmp_path / 'run', 2, *SMALL, own=own).end()
  assert all(process.code not in (0, None) for process in done)
  assert any(
    said in process.error and 'leaves because of this error' in process.error for process in done
  ), done
  assert not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  'flags, code, said',
  [
    (('--config.optimizer.learning_rate=1e30',), 1, 'error: step 2: '),
    (
      (
        '--config.train.eval_every=1',
        '--config.train.patience=1',
        '--config.optimizer.learning_rate=3.0',
      ),
      0,
      'train.patience=1',
    ),
  ],
  ids=['not finite', 'patience'],
)
def test_all_stop_for_the_same_reason(runs, tmp_path, flags, code, said):
  done = Group(runs, tmp_path, 2, *LONG, *flags).end()
  assert (done[0].code, done[1].code != 0) == (code, bool(code)), done
  assert said in done[0].out + done[0].error


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_write_and_judge_as_one(runs):
  """The same answers with the same rewards, which one of them keeps."""
  prompts, reward = runs.directory / 'prompts.jsonl', runs.directory / 'wanted.py'
  rows = [{'prompt': f'{"pqr"[: 1 + i % 3]}{i}', 'wanted': 'abcdefghijklm'} for i in range(12)]
  prompts.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  reward.write_text(
    'def reward(text, record):\n  return sum(c in record["wanted"] for c in text) / 7 - 0.1\n'
  )
  flags = (
    '--config.objective.kind=ppo',
    f'--config.objective.reward={reward}',
    '--config.objective.critic=shared',
    '--config.objective.minibatches=2',
    '--config.objective.max_new_tokens=6',
    '--config.data.sources[0].kind=jsonl',
    f'--config.data.sources[0].path={prompts}',
    '--config.data.sources[0].format=prompt',
    '--config.data.clean.anonymise=()',
    '--config.data.clean.near_duplicates=0.0',
    '--config.data.split=hash',
    '--config.data.validation_fraction=0.3',
    '--config.data.tokenizer.kind=byte',
    '--config.data.tokenizer.vocabulary=0',
    '--config.mesh.data=-1',
    '--config.model.layers=1',
    '--config.train.steps=6',
    '--config.train.eval_every=3',
  )
  alone, together = runs.directory / 'wrote_alone', runs.directory / 'wrote_together'
  train_alone(runs, alone, 2, *flags)
  train(runs, together, 2, *flags)
  ours, theirs = ([float(loss) for _, loss in losses(of)] for of in (alone, together))
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
  lines = [
    [json.loads(line) | {'seconds': 0} for line in (of / 'rollouts.jsonl').read_text().splitlines()]
    for of in (alone, together)
  ]
  assert len(lines[0]) == 1 and lines[0] == lines[1]
