"""How does a process meet its host? Its memory allocator, its compilation cache, and the signals that ask it to stop.

Imports nothing heavy: what concerns the allocator has to happen before anything large is loaded.
"""
import os
import pathlib
import platform
import signal
import sys

# XLA's CPU buffers are large and short-lived. With 4 KiB pages, handed back to the kernel after each use, a train step spends
# up to half of its time in page faults (benchmarks/README.md has the figures).
TUNABLES = 'glibc.malloc.hugetlb=1'


def use_huge_pages() -> None:
  """Restarts the process, once, with glibc's allocator asking for huge pages; call it before anything heavy is imported.

  glibc reads GLIBC_TUNABLES when a process starts, so it cannot be set later. A value that the user has set is respected.
  """
  if sys.platform == 'linux' and platform.libc_ver()[0] == 'glibc' and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cache_compilations(directory: str | os.PathLike) -> None:
  """Keeps compiled programs on disk, for every program however small: a second run starts without compiling."""
  import jax
  path = pathlib.Path(directory).absolute()
  path.mkdir(parents=True, exist_ok=True)
  jax.config.update('jax_compilation_cache_dir', str(path))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)


class StopSignal:
  """Turns SIGTERM and SIGINT into a request that the training loop reads between steps; a second one acts at once.

  Attributes: name of the signal that came, or ''.
  """

  def __init__(self):
    self.name = ''

  def __enter__(self) -> 'StopSignal':
    self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *_) -> None:
    self._restore()

  def _note(self, number, _) -> None:
    self.name = signal.Signals(number).name
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)
