"""How does a process meet its host and the other processes?
Allocator and compilation cache; who waits for whom, and when all stop.

Imports nothing heavy: what concerns the allocator has to happen before anything large is loaded.
One process starts no service and waits for no one: of the functions below that concern several,
each then does nothing, or just what it was given to do.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import commands
import files
import names

# XLA's CPU buffers are large and short-lived. With 4 KiB pages, handed back to the kernel after
# each use, a train step spends up to half of its time in page faults (docs/measured.md has the
# figures).
TUNABLES = 'glibc.malloc.hugetlb=1'

MEETING_TIMEOUT = 300  # seconds
HEARTBEAT_TIMEOUT = 100  # seconds
BARRIER_TIMEOUT = 7 * 24 * 3600  # seconds; a process that is lost ends the wait far sooner
LOOKS, LOOK_SECONDS = 30, 2  # NFS may show a new file only after a minute

T = TypeVar('T')


def use_huge_pages() -> None:
  """Restarts the process, once, with glibc's allocator asking for huge pages;
  call it before anything heavy is imported.

  glibc reads GLIBC_TUNABLES when a process starts, so it cannot be set later.
  A value that the user has set is respected.
  """
  if (
    sys.platform == 'linux'
    and platform.libc_ver()[0] == 'glibc'
    and 'GLIBC_TUNABLES' not in os.environ
  ):
    os.environ['GLIBC_TUNABLES'] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cache_compilations(directory: str | os.PathLike) -> None:
  """Keeps compiled programs on disk, for every program however small: a second run starts without
  compiling. Where JAX_COMPILATION_CACHE_DIR says so, there; where nothing can be written, nowhere.
  """
  import jax

  path = pathlib.Path(os.environ.get('JAX_COMPILATION_CACHE_DIR') or files.kept(directory))
  try:
    path.mkdir(parents=True, exist_ok=True)
    files.check_writable(path / 'written')
  except OSError as error:
    print(
      f'NOTE: programs are compiled anew every time: {error}; '
      'JAX_COMPILATION_CACHE_DIR names another directory'
    )
    return
  jax.config.update('jax_compilation_cache_dir', str(path.absolute()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)


def connect(
  coordinator: str = '',
  processes: int = 0,
  process: int = -1,
  heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
  meeting_timeout: int = MEETING_TIMEOUT,
):
  """Meets the other processes, if there are others.
  Returns a context in which an error ends them too.

  Without a coordinator, jax looks for the others where it knows how: Slurm, Open MPI, TPU pods,
  Kubernetes. A process that is lost, or leaves with an error, ends all within heartbeat_timeout of
  its last sign of life, by an abort whose message gives its number.

  Args:
    coordinator: host:port of process 0, as the others reach it.
    processes: how many there are.
    process: which one this is.
    heartbeat_timeout: seconds without a sign of life after which a process counts as lost.
    meeting_timeout: seconds that each waits for all.
  Raises ValueError for some of the first three without the others, for values that cannot be, and
  for processes that have not come in time.
  """
  import jax

  given = {
    '--coordinator=HOST:PORT': coordinator != '',
    '--processes=N': processes != 0,
    '--process=I': process != -1,
  }
  if any(given.values()):
    if not all(given.values()):
      raise ValueError(
        f'{" and ".join(flag for flag in given if not given[flag])} missing: several processes '
        f'need {", ".join(given)}; one process needs none of them'
      )
    _check_place(coordinator, processes, process)
    print(
      f'process {process} of {processes} meets the others at {coordinator}, within '
      f'{meeting_timeout} s or not at all',
      flush=True,
    )
    # jax gives up with an abort that does not say for whom it waited.
    names.imported('parallel.meeting.meet')(coordinator, processes, process, meeting_timeout)
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      cluster_detection_method='deactivate',
      initialization_timeout=meeting_timeout,
      heartbeat_timeout_seconds=heartbeat_timeout,
    )
  elif not _alone():
    try:
      jax.distributed.initialize(
        initialization_timeout=meeting_timeout, heartbeat_timeout_seconds=heartbeat_timeout
      )
    except ValueError as error:
      if 'coordinator_address' not in str(error):  # what jax misses where it finds no cluster
        raise
      if 'JOB_COMPLETION_INDEX' in os.environ:
        raise ValueError(
          'this is a pod of an indexed Job, whose other pods jax finds with the package kubernetes '
          f'only; install jax[k8s], or give {", ".join(given)}'
        ) from error

  if count() > 1:
    print(f'{_who()}: {jax.local_device_count()} of {jax.device_count()} devices', flush=True)
  return _together(heartbeat_timeout)


def _check_place(coordinator: str, processes: int, process: int) -> None:
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal():
    raise ValueError(
      f'--coordinator={coordinator} is not HOST:PORT; '
      'give the address of process 0 and a free port there'
    )
  if not 0 < int(port) < 2**16:
    raise ValueError(f'--coordinator={coordinator}: port {port} is none of 1 to {2**16 - 1}')
  if not 0 <= process < processes:
    raise ValueError(
      f'--process={process} is none of --processes={processes}; give 0 to {processes - 1}'
    )


def _alone() -> bool:
  """Whether the environment is known to be that of one process,
  where jax's own search would go wrong.
  """
  # jax would show the only task of a step just one of its devices.
  if os.environ.get('SLURM_NTASKS') == '1':
    return True
  # jax knows the pods of Jobs and of TPU slices, and fails in others, such as a notebook's.
  marks = (
    'JOB_COMPLETION_INDEX',
    'TPU_WORKER_HOSTNAMES',
    'TPU_PROCESS_ADDRESSES',
    'TPU_PROCESS_ADDRESSES_PATH',
  )
  return 'KUBERNETES_SERVICE_HOST' in os.environ and not any(mark in os.environ for mark in marks)


@contextlib.contextmanager
def _together(heartbeat_timeout: int) -> Iterator[None]:
  try:
    yield
  except BaseException as error:
    if count() > 1:
      _leave(error, heartbeat_timeout)
    raise


def _who() -> str:
  import jax

  return f'process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}'


def _leave(error: BaseException, heartbeat_timeout: int) -> None:
  """Ends this process without the barrier of an orderly exit,
  at which it would wait for others that wait for it.
  """
  say = functools.partial(print, file=sys.stderr, flush=True)
  own = (SystemExit, KeyboardInterrupt, FloatingPointError, OSError)
  if isinstance(error, KeyboardInterrupt):
    say(f'interrupted by {error}' if str(error) else 'interrupted')
  elif isinstance(error, own):
    say(error if isinstance(error, SystemExit) else f'error: {commands.said(error)}')
  else:
    traceback.print_exception(error)

  if isinstance(error, own):
    say(f'{_who()} leaves because of this error, and with it all others')
  else:
    # When a process is lost, the collectives of the others fail, often before it is known which one
    # it was.
    say(
      f'{_who()} failed. If it was because another one is lost, that one will be named within '
      f'{heartbeat_timeout} s'
    )
    time.sleep(heartbeat_timeout + 5)
    say(f'{_who()} leaves: no other one was lost, so the error is its own')
  sys.stdout.flush()
  os._exit(commands.interrupted(error, stopped_code()) or 1)


def count() -> int:
  """How many processes there are."""
  import jax

  return jax.process_count() if jax.distributed.is_initialized() else 1


def barrier(name: str) -> None:
  """Returns once every process has called it with this name.
  No device takes part, so that any thread may wait.
  """
  if count() > 1:
    import orbax.checkpoint as ocp

    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=BARRIER_TIMEOUT * 1000)


def first_alone(function: Callable[[], T], name: str) -> T:
  """The function's result in every process; process 0 calls it before the others do,
  so that they find what it wrote.

  name: of the barrier.
  """
  import jax

  if count() == 1:
    return function()
  if jax.process_index() != 0:
    barrier(name)
    return function()
  result = function()
  barrier(name)
  return result


def from_first(function: Callable[[], int | None]) -> int | None:
  """What the function gives in process 0, an int >= 0 or None, in every process;
  the others do not call it.
  """
  if count() == 1:
    return function()
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  answer = function() if jax.process_index() == 0 else None
  barrier('the first has found it')  # not on the devices, whose collectives have timeouts
  answer = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if answer is None else answer)))
  return None if answer < 0 else answer


def differing(value: str) -> list[int]:
  """The processes whose value is not that of process 0, in every process."""
  if count() == 1:
    return []
  import numpy as np
  from jax.experimental import multihost_utils

  digests = multihost_utils.process_allgather(
    np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
  )
  return np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()


def check_same(what: str, value: str) -> None:
  """Raises ValueError, in every process, where not all have the same value."""
  others = differing(value)
  if others:
    raise ValueError(
      f'{what} of processes {others} are not those of process 0; '
      'start all with the same command on the same files'
    )


def check_shared(path: str | os.PathLike) -> None:
  """Raises ValueError, in every process, where not all see the file
  that process 0 has just written.
  """
  path = files.place(path)
  barrier(f'wrote {path.name}')
  for look in range(LOOKS):
    others = differing(str(int(path.stat().st_mtime)) if path.exists() else '')
    if not others:
      return
    time.sleep(LOOK_SECONDS)
  raise ValueError(
    f'processes {others} do not see {path} as process 0 wrote it; give a --workdir on a file '
    'system that all of them share'
  )


class RowShards:
  """Which rows of a global batch this process reads, and how they become global arrays.

  Attributes: rows, ascending: those that its devices hold. Two processes may hold the same ones, or
    neighbouring ones by turns: it is the mesh that decides.
  """

  def __init__(self, sharding, shape: tuple[int, int]):
    """sharding: of arrays of this shape, [B, T]."""
    self._sharding, self._shape = sharding, shape
    slices = {
      index[0].indices(shape[0])
      for index in sharding.addressable_devices_indices_map(shape).values()
    }
    self.rows = sorted({row for part in slices for row in range(*part)})

  def __call__(self, batch):
    """A pytree of numpy arrays [rows of this process, T] as one of global jax.Arrays [B, T].

    What has another shape behind its rows, or none, is split by rows alone.
    """
    import jax

    at = {row: i for i, row in enumerate(self.rows)}

    def put(x):
      shape, sharding = (self._shape[0], *x.shape[1:]), self._sharding
      if shape != self._shape:
        rows_only = jax.sharding.PartitionSpec(*sharding.spec[:1])
        sharding = jax.NamedSharding(sharding.mesh, rows_only)

      def shard(index):
        start, stop, _ = index[0].indices(shape[0])
        return x[(slice(at[start], at[start] + stop - start), *index[1:])]

      return jax.make_array_from_callback(shape, sharding, shard)

    return jax.tree.map(put, batch)


# What asks a process to stop: a scheduler, a person, a terminal that is gone.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def stopped_code() -> int:
  """The flag --stopped_code as it stands on the command line, which a signal does not wait to be
  parsed; 0 where it does not.
  """
  given = re.findall(r'(?<= )--?stopped_code[= ](\d+)(?= )', ' '.join(['', *sys.argv[1:], '']))
  return int(given[-1]) if given else 0


def leave_at_signals() -> None:
  """Until `heed_interrupts`, what asks to stop ends the process, in one line: while modules are
  loaded there is nothing to lose, and an exception would be theirs to pass on.
  """

  for number in heeded(STOPPING):
    signal.signal(number, lambda number, _: leave_by(number))


def leave_by(number: int) -> None:
  """Ends the process as one that this signal has ended, in one line."""
  by = '' if number == signal.SIGINT else f' by {signal.Signals(number).name}'
  os.write(2, f'\ninterrupted{by}\n'.encode())
  os._exit(stopped_code() or 128 + number)


def heeded(numbers) -> list[signal.Signals]:
  """Those that are not ignored, as Ctrl-C is by a job in the background, and SIGHUP under nohup."""
  return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def heed_interrupts(numbers: Sequence[signal.Signals] = (signal.SIGINT,)) -> None:
  """From here on, Ctrl-C, or what `numbers` names, raises KeyboardInterrupt with its name.

  Where it comes within a callback of the garbage collector (jax has one), of a weak reference or in
  a __del__, Python drops what is raised: it is raised again a little later, until somebody has it.
  """
  waiting, pass_on = [], sys.unraisablehook

  def act(number, _):
    if number != signal.SIGALRM:
      waiting[:] = [signal.Signals(number).name]
    raise KeyboardInterrupt(*waiting)

  def dropped(unraisable):
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
      signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
      pass_on(unraisable)

  sys.unraisablehook = dropped
  for number in (*heeded(numbers), signal.SIGALRM):
    signal.signal(number, act)


class StopSignal:
  """Turns SIGTERM, SIGINT and SIGHUP into a request that the training loop reads between steps;
  a second one acts at once.

  With several processes, one that is asked asks all, and they agree on a step;
  jax's runtime, which sees to that, takes the SIGTERM.

  Attributes: name of the signal that came, or ''.
  """

  def __init__(self):
    self.name = ''

  def __enter__(self) -> 'StopSignal':
    numbers = [number for number in STOPPING if count() == 1 or number != signal.SIGTERM]
    self._old = {number: signal.signal(number, self._note) for number in heeded(numbers)}
    return self

  def __exit__(self, *_) -> None:
    self._restore()

  def after(self, step: int) -> str:
    """The signal because of which all processes stop after this step, or ''.
    To be called after every step.
    """
    if count() > 1:
      from jax.experimental import multihost_utils

      if multihost_utils.reached_preemption_sync_point(step):
        self.name = signal.SIGTERM.name
    return self.name

  def _note(self, number, _) -> None:
    self._restore()
    if count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self.name = signal.Signals(number).name

  def _restore(self) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)
