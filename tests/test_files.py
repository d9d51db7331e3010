"""Is a file there whole or not at all, and is nothing else left beside it?"""

import errno
import fcntl
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

import files

HOLD = """
import sys, files
with files.locked(sys.argv[1], 'the run', 'wait'):
  print('in', flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
  """Another process that has the lock until its input ends."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, str(tmp_path / 'run' / 'lock')],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'in\n'
  yield process
  process.kill()
  process.communicate()


def test_the_home_directory_is_no_directory_of_that_name(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert files.place('~/runs/a') == tmp_path / 'runs' / 'a'
  assert files.place('runs/~/a') == pathlib.Path('runs/~/a')


def written(directory: pathlib.Path) -> dict[str, str]:
  return {str(x.relative_to(directory)): x.read_text() for x in directory.rglob('*') if x.is_file()}


def test_a_directory_is_there_until_another_is(tmp_path):
  def full(directory):
    directory.mkdir()
    (directory / 'a').write_text('half')
    raise OSError(errno.ENOSPC, 'full')

  def whole(directory):
    directory.mkdir()
    (directory / 'b').write_text('new')

  path = tmp_path / 'kept'
  for _ in range(2):
    files.replace_directory(path, whole)  # also where there is none
    assert written(tmp_path) == {'kept/b': 'new'}
    (path / 'a').write_text('old')
  with pytest.raises(OSError, match='full'):
    files.replace_directory(path, full)
  assert written(tmp_path) == {'kept/a': 'old', 'kept/b': 'new'}


def held(path):
  with files.locked(path, 'the run', 'wait'):
    return sorted(path.parent.iterdir())


def refusal(process):
  return (
    rf'^the run is in use by process {process} on {re.escape(socket.gethostname())}, '
    r'since \d{4}-.*; wait$'
  )


def test_one_process_alone_is_in_a_locked_place(other, tmp_path):
  path = tmp_path / 'run' / 'lock'
  for _ in range(2):
    with pytest.raises(ValueError, match=refusal(other.pid)):
      held(path)
  other.communicate('')
  assert not (tmp_path / 'run').exists(), 'what it made and left empty'
  assert held(path) == [path] and not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over(other, tmp_path):
  path = tmp_path / 'run' / 'lock'
  other.kill()
  other.wait()
  assert json.loads(path.read_text())['process'] == other.pid
  assert held(path) == [path]


def test_a_process_locks_a_place_once(tmp_path):
  with files.locked(tmp_path / 'lock', 'the run', 'wait'):
    with pytest.raises(ValueError, match='the run is in use by this process already; wait'):
      held(tmp_path / 'lock')
    assert (tmp_path / 'lock').exists()


def test_a_disk_without_locks_is_believed_about_this_machine(other, tmp_path, monkeypatch):
  def unsupported(*_):
    raise OSError(errno.ENOLCK, 'no locks')

  monkeypatch.setattr(fcntl, 'lockf', unsupported)
  path = tmp_path / 'run' / 'lock'
  with pytest.raises(ValueError, match=refusal(other.pid)):
    held(path)
  other.kill()
  other.wait()
  assert held(path) == [path]
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps({'process': os.getppid(), 'host': 'elsewhere', 'since': '?'}))
  assert held(path) == [path]


def test_what_could_not_be_written_leaves_nothing(tmp_path):
  (tmp_path / 'directory').mkdir()
  for write in (
    lambda: files.replace(tmp_path / 'directory', 'x'),
    lambda: files.check_writable(tmp_path / 'directory'),
  ):
    with pytest.raises(IsADirectoryError, match='directory'):
      write()
  with pytest.raises(UnicodeEncodeError):
    files.replace(tmp_path / 'file', '\ud800')
  assert [path.name for path in tmp_path.iterdir()] == ['directory']


def test_to_ask_whether_one_could_write_changes_nothing(tmp_path):
  files.replace(tmp_path / 'new' / 'file', 'old')
  files.check_writable(tmp_path / 'new' / 'file')
  files.check_writable(tmp_path / 'new' / 'other')
  assert [(path.name, path.read_text()) for path in (tmp_path / 'new').iterdir()] == [
    ('file', 'old')
  ]
