"""Do signals ask once and act twice, and does a process restart itself once at most?"""
import os
import signal
import subprocess
import sys

import jax
import pytest

from parallel import hosts


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_acts(number):
  acted = []
  before = signal.signal(number, lambda *_: acted.append(number))
  try:
    with hosts.StopSignal() as stop:
      assert stop.name == ''
      os.kill(os.getpid(), number)
      assert stop.name == number.name and not acted
      os.kill(os.getpid(), number)
      assert acted == [number]
    with hosts.StopSignal():
      pass
    os.kill(os.getpid(), number)
    assert acted == [number] * 2, 'the handler from before is back'
  finally:
    signal.signal(number, before)


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
  environment = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'} | {'PYTHONPATH': os.getcwd()}
  environment |= {'GLIBC_TUNABLES': given} if given else {}
  command = [sys.executable, str(script), 'a b', '--c=d']
  lines = subprocess.check_output(command, env=environment, text=True).splitlines()
  assert lines[:-1] == ['start'] * starts
  assert lines[-1] == f"['a b', '--c=d'] {given or hosts.TUNABLES} False"


def test_compilations_are_kept_in_a_directory_that_is_made(tmp_path, monkeypatch):
  set_to = {}
  monkeypatch.setattr(jax.config, 'update', lambda name, value: set_to.__setitem__(name, value))
  hosts.cache_compilations(tmp_path / 'a' / 'b')
  assert set_to['jax_compilation_cache_dir'] == str(tmp_path / 'a' / 'b') and (tmp_path / 'a' / 'b').is_dir()
  assert set_to['jax_persistent_cache_min_compile_time_secs'] == 0
