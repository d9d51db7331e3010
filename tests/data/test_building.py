"""Does one process at a time build a directory of the cache, do the others wait and find it, and
does nobody wait for what is dead, whatever the disk knows of locks?
"""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading

import pytest

from data import building, cache
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.prepare import prepare
from tests.test_files import HOLD

ELSEWHERE = {'process': 7, 'host': 'elsewhere', 'since': 'noon'}


class Clock:
  """Time that passes while somebody sleeps, and what happens meanwhile: a call for each sleep."""

  def __init__(self):
    self.now, self.seconds, self.during = 0.0, building.STALE * 0.9, []

  def monotonic(self):
    return self.now

  def sleep(self, _):
    self.now += self.seconds
    assert self.now < 2 * building.WAIT, 'nobody gives up'
    if self.during:
      self.during.pop(0)()


@pytest.fixture
def clock(monkeypatch):
  made = Clock()
  monkeypatch.setattr(building, 'time', made)
  return made


@pytest.fixture
def lock(tmp_path):
  return tmp_path / '.x.lock'


@pytest.fixture
def other(lock):
  """Another process that builds x until its input ends."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, str(lock)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'in\n'
  yield process
  process.kill()
  process.communicate()


@pytest.fixture
def without_locks(monkeypatch):
  def unsupported(*_):
    raise OSError(errno.ENOLCK, 'no locks')

  monkeypatch.setattr(fcntl, 'lockf', unsupported)


def write(directory):
  (directory / cache.INDEX).write_text('mine')


def once(tmp_path, build=write):
  """What is said meanwhile."""
  lines = []
  building.once(tmp_path / 'x', build, lines.append)
  assert not (tmp_path / '.x.lock').exists() and (tmp_path / 'x' / cache.INDEX).exists()
  return lines


def waiting(tmp_path, process, host):
  return (
    rf'data: waiting, 24 h at most: {re.escape(str(tmp_path / "x"))} is in use by process '
    rf'{process} on {re.escape(host)}, since .*; end it, or give another data.cache_dir'
  )


def test_a_second_process_waits_says_for_whom_and_finds_the_result(tmp_path, clock, other):
  def finish():
    (tmp_path / 'x').mkdir()
    write(tmp_path / 'x')
    other.communicate('')

  clock.during = [lambda: None, lambda: None, finish]
  said, found = once(tmp_path, lambda _: pytest.fail('it was built twice'))
  assert re.fullmatch(waiting(tmp_path, other.pid, socket.gethostname()), said)
  assert found == f'data: {tmp_path / "x"} was finished by another process'


@pytest.mark.parametrize('end', [lambda p: p.communicate(''), lambda p: (p.kill(), p.wait())])
def test_it_takes_over_from_who_failed_or_was_killed(tmp_path, clock, other, end):
  clock.during = [lambda: end(other)]
  _, wrote = once(tmp_path)
  assert wrote == f'data: wrote {tmp_path / "x"}' and clock.now == clock.seconds


def test_a_process_that_lives_is_waited_for_within_a_bound(tmp_path, clock, other, lock):
  """However long it shows no sign of life: that it does, the system knows."""
  with pytest.raises(ValueError, match=rf'waited 24 h in vain: .* process {other.pid} on .*; end'):
    once(tmp_path)
  assert clock.now >= building.WAIT > building.STALE
  assert json.loads(lock.read_text())['process'] == other.pid


@pytest.mark.usefixtures('without_locks')
def test_another_machine_is_waited_for_while_it_shows_signs_of_life(tmp_path, clock, lock):
  lock.write_text(json.dumps(ELSEWHERE))
  clock.during = [lambda n=n: os.utime(lock, (n, n)) for n in range(5)]
  said, _ = once(tmp_path)
  assert re.fullmatch(waiting(tmp_path, 7, 'elsewhere'), said)
  alive = 5 * clock.seconds
  assert alive + building.STALE <= clock.now <= alive + 2 * clock.seconds + building.STALE


@pytest.mark.usefixtures('without_locks')
def test_the_number_of_a_process_that_is_gone_may_be_anothers(tmp_path, clock, lock):
  """Without locks, that this machine has such a process is no more than a sign."""
  holder = {'process': os.getppid(), 'host': socket.gethostname(), 'since': 'noon'}
  lock.write_text(json.dumps(holder))
  once(tmp_path)
  assert building.STALE <= clock.now <= 2 * building.STALE


def test_a_disk_that_remembers_a_machine_which_is_gone_blocks_nobody(tmp_path, clock, other, lock):
  """And should the other one be there after all, it leaves alone what is not its own any more."""
  lock.write_text(json.dumps(ELSEWHERE))

  def build(directory):
    write(directory)
    other.communicate('')
    assert json.loads(lock.read_text())['process'] == os.getpid()

  once(tmp_path, build)
  assert building.STALE <= clock.now <= 2 * building.STALE


def test_who_builds_shows_that_it_lives(tmp_path, monkeypatch, lock):
  monkeypatch.setattr(building, 'BEAT', 0.001)

  def build(directory):
    os.utime(lock, (0, 0))
    for _ in range(10_000):
      if lock.stat().st_mtime > 0:
        return write(directory)
      threading.Event().wait(0.001)
    pytest.fail('no sign of life')

  once(tmp_path, build)


def test_threads_of_a_process_wait_for_each_other(tmp_path, monkeypatch):
  monkeypatch.setattr(building, 'POLL', 0.001)
  begun, second_waits = threading.Event(), threading.Event()

  def build(directory):
    begun.set()
    assert second_waits.wait(60)
    write(directory)

  first = threading.Thread(target=building.once, args=(tmp_path / 'x', build, lambda _: None))
  first.start()
  assert begun.wait(60)

  lines = []

  def log(line):
    lines.append(line)
    second_waits.set()

  building.once(tmp_path / 'x', lambda _: pytest.fail('it was built twice'), log)
  first.join()
  assert 'in use by this process already' in lines[0] and 'finished by another' in lines[1]


def test_a_corpus_and_its_packing_are_built_in_turns(tmp_path, monkeypatch):
  (tmp_path / 'a.txt').write_text('\n\n'.join(f'{n} words, and {n * n} more.' for n in range(300)))
  turns, turn = [], building.turn

  def counted(path, place, log):
    turns.append(path.name)
    return turn(path, place, log)

  monkeypatch.setattr(building, 'turn', counted)
  config = DataConfig(
    sources=(SourceConfig(kind='text', path=str(tmp_path / 'a.txt')),),
    tokenizer=TokenizerConfig(kind='byte'),
    sequence_length=50,
    split='tail',
    cache_dir=str(tmp_path / 'cache'),
  )
  for _ in range(2):
    key = prepare(config, log=lambda _: None).key.split('-')[0]
    assert turns == [f'.{key}.lock', '.rows-50.lock'], 'what is there is waited for by no one'
