"""Do signals ask once and act twice, does a process restart itself once at most,
and is a lone process left alone?
"""

import gc
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from data.batch import Batch
from parallel import axes, hosts, meeting
from parallel.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks_and_the_second_acts(number):
  acted = []
  before = signal.signal(number, lambda *_: acted.append(number))
  try:
    with hosts.StopSignal() as stop:
      assert stop.name == stop.after(0) == ''
      os.kill(os.getpid(), number)
      assert stop.name == stop.after(1) == number.name and not acted
      os.kill(os.getpid(), number)
      assert acted == [number]
    with hosts.StopSignal():
      pass
    os.kill(os.getpid(), number)
    assert acted == [number] * 2, 'the handler from before is back'
  finally:
    signal.signal(number, before)


def test_ctrl_c_within_a_callback_of_the_garbage_collector_is_not_lost():
  came, hook = [], sys.unraisablehook

  def callback(phase, _):
    if not came:
      came.append(phase)
      signal.raise_signal(signal.SIGINT)

  before = (
    signal.signal(signal.SIGINT, signal.default_int_handler),
    signal.getsignal(signal.SIGALRM),
  )
  gc.callbacks.append(callback)
  try:
    hosts.heed_interrupts()
    with pytest.raises(KeyboardInterrupt):
      gc.collect()
      time.sleep(10)
    assert came == ['start']
  finally:
    gc.callbacks.remove(callback)
    sys.unraisablehook = hook
    for number, handler in zip((signal.SIGINT, signal.SIGALRM), before):
      signal.signal(number, handler)


SCRIPT = '''
import os, sys
print('start', flush=True)
from parallel import hosts
hosts.use_huge_pages()
print(sys.argv[1:], os.environ['GLIBC_TUNABLES'], 'jax' in sys.modules)
'''


@pytest.mark.parametrize('given, starts', [(None, 2), ('glibc.malloc.arena_max=2', 1)])
def test_huge_pages_restart_once_with_the_same_arguments(given, starts, tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(SCRIPT)
  environment = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'} | {
    'PYTHONPATH': os.getcwd()
  }
  environment |= {'GLIBC_TUNABLES': given} if given else {}
  command = [sys.executable, str(script), 'a b', '--c=d']
  lines = subprocess.check_output(command, env=environment, text=True).splitlines()
  assert lines[:-1] == ['start'] * starts
  assert lines[-1] == f"['a b', '--c=d'] {given or hosts.TUNABLES} False"


def test_compilations_are_kept_in_a_directory_that_is_made(tmp_path, monkeypatch):
  set_to = {}
  monkeypatch.setattr(jax.config, 'update', lambda name, value: set_to.__setitem__(name, value))
  hosts.cache_compilations(tmp_path / 'a' / 'b')
  assert (
    set_to['jax_compilation_cache_dir'] == str(tmp_path / 'a' / 'b')
    and (tmp_path / 'a' / 'b').is_dir()
  )
  assert set_to['jax_persistent_cache_min_compile_time_secs'] == 0


def test_where_nothing_can_be_written_programs_are_not_kept_and_it_is_said(
  tmp_path, monkeypatch, capsys
):
  """As in an image whose file system is read-only; a variable of jax's names another place."""
  set_to = {}
  monkeypatch.setattr(jax.config, 'update', lambda name, value: set_to.__setitem__(name, value))
  (tmp_path / 'file').touch()
  hosts.cache_compilations(tmp_path / 'file' / 'xla')
  assert not set_to and 'are compiled anew every time' in capsys.readouterr().out
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'kept'))
  hosts.cache_compilations(tmp_path / 'file' / 'xla')
  assert set_to['jax_compilation_cache_dir'] == str(tmp_path / 'kept')


@pytest.fixture
def initialized(monkeypatch) -> list:
  """The calls of jax.distributed.initialize, which finds no cluster."""
  calls = []

  def initialize(*arguments, **options):
    calls.append((arguments, options))
    if not arguments:
      raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  for name in (
    'SLURM_NTASKS',
    'KUBERNETES_SERVICE_HOST',
    'JOB_COMPLETION_INDEX',
    'TPU_WORKER_HOSTNAMES',
    'TPU_PROCESS_ADDRESSES',
    'TPU_PROCESS_ADDRESSES_PATH',
  ):
    monkeypatch.delenv(name, raising=False)
  return calls


@pytest.mark.parametrize(
  'given, said',
  [
    ({'coordinator': 'a:1'}, '--processes=N and --process=I missing: several processes need'),
    ({'processes': 2, 'process': 0}, '--coordinator=HOST:PORT missing'),
    ({'coordinator': 'a', 'processes': 2, 'process': 0}, '--coordinator=a is not HOST:PORT'),
    ({'coordinator': 'a:b', 'processes': 2, 'process': 0}, '--coordinator=a:b is not HOST:PORT'),
    ({'coordinator': 'a:70000', 'processes': 2, 'process': 0}, 'port 70000 is none of 1 to 65535'),
    (
      {'coordinator': 'a:1', 'processes': 2, 'process': 2},
      '--process=2 is none of --processes=2; give 0 to 1',
    ),
    (
      {'coordinator': 'a:1', 'processes': -2, 'process': 0},
      '--process=0 is none of --processes=-2',
    ),
  ],
  ids=str,
)
def test_half_an_introduction_is_refused(initialized, given, said):
  with pytest.raises(ValueError) as error:
    hosts.connect(**given)
  assert said in str(error.value) and not initialized


def test_an_introduction_is_passed_on(initialized, capsys, monkeypatch):
  met = []
  monkeypatch.setattr(meeting, 'meet', lambda *arguments: met.append(arguments))
  with hosts.connect('a:1', 3, 2, 17, 70):
    pass
  [(arguments, options)] = initialized
  assert arguments == ('a:1', 3, 2) and options['heartbeat_timeout_seconds'] == 17
  assert met == [('a:1', 3, 2, 70)] and options['initialization_timeout'] == 70
  assert 'process 2 of 3 meets the others at a:1' in capsys.readouterr().out


@pytest.mark.parametrize(
  'environment, searched',
  [
    ({}, 1),
    ({'SLURM_NTASKS': '1'}, 0),
    ({'SLURM_NTASKS': '16'}, 1),
    ({'KUBERNETES_SERVICE_HOST': 'x'}, 0),
    ({'KUBERNETES_SERVICE_HOST': 'x', 'TPU_WORKER_HOSTNAMES': 'a,b'}, 1),
  ],
  ids=str,
)
def test_a_lone_process_is_left_alone(initialized, monkeypatch, environment, searched):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ZeroDivisionError), hosts.connect():
    1 / 0
  assert len(initialized) == searched and hosts.count() == 1


def test_a_pod_of_a_job_that_finds_no_other_is_told_why(initialized, monkeypatch):
  monkeypatch.setenv('KUBERNETES_SERVICE_HOST', 'x')
  monkeypatch.setenv('JOB_COMPLETION_INDEX', '0')
  with pytest.raises(
    ValueError, match='a pod of an indexed Job.*install jax.k8s., or give --coordinator=HOST:PORT'
  ):
    hosts.connect()


def test_what_concerns_several_costs_one_nothing(monkeypatch, tmp_path):
  monkeypatch.delattr('jax.experimental.multihost_utils.process_allgather')
  hosts.barrier('nobody else comes')
  hosts.check_same('anything', 'x')
  hosts.check_shared(tmp_path / 'nothing')
  assert hosts.first_alone(lambda: 'value', 'name') == 'value'
  assert [hosts.from_first(lambda: x) for x in (None, 0, 7)] == [None, 0, 7]


class HalfHere:
  """The sharding of a mesh of which only some devices are of this process."""

  def __init__(self, sharding, devices):
    self.sharding, self.devices = sharding, devices

  def addressable_devices_indices_map(self, shape):
    found = self.sharding.addressable_devices_indices_map(shape)
    return {device: found[device] for device in self.devices}


@pytest.mark.parametrize(
  'sizes, here, rows',
  [
    ({'data': 8}, range(4), range(8)),
    ({'data': 8}, (1, 6), [2, 3, 12, 13]),
    ({'fsdp': 4, 'tensor': 2}, range(4), range(8)),
    ({'data': 1, 'tensor': 8}, range(4), range(16)),
    ({'data': 2, 'fsdp': 4}, (7,), [14, 15]),
  ],
  ids=str,
)
def test_a_process_reads_the_rows_that_its_devices_hold(sizes, here, rows):
  mesh = make_mesh(MeshConfig(**sizes))
  sharding = jax.NamedSharding(mesh, axes.spec('batch', 'length'))
  assert hosts.RowShards(
    HalfHere(sharding, [jax.devices()[i] for i in here]), (16, 4)
  ).rows == list(rows)


@pytest.mark.parametrize(
  'spec',
  [('data', None), (('data', 'tensor'), None), ('data', 'tensor'), (None, ('data', 'tensor'))],
  ids=str,
)
def test_rows_become_the_global_batch_in_their_order(spec):
  sharding = jax.NamedSharding(make_mesh(MeshConfig(data=4, tensor=2)), jax.P(*spec))
  put = hosts.RowShards(sharding, (8, 8))
  batch = jax.tree.map(
    lambda x, i: np.arange(64, dtype=x.dtype).reshape(8, 8) + i,
    Batch.empty(8, 8),
    Batch(*range(5)),
  )
  placed = put(batch)
  for x, original in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
    assert x.sharding == sharding and np.array_equal(x, original)
