"""Does a bucket answer as a directory does, and what it cannot do, by name?"""

import gzip
import json
import pathlib
import random
import time

import pytest

import files
from data import sources
from data.config import SourceConfig
from remote import address, lease, system
from tests.remote.conftest import BOTH, Proxy


def shown(root) -> dict:
  """What lies below a directory, whatever kind it is: by name, content."""
  return {
    str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*') if path.is_file()
  }


@BOTH
def test_what_is_done_to_a_bucket_and_to_a_directory_shows_the_same(bucket, tmp_path):
  """The disk is the oracle: the same acts, the same answers."""
  draw = random.Random(3)
  roots = [tmp_path / 'run', bucket / 'run']
  keys = ['a.json', 'b.txt', 'x/c.json', 'x/y/d', 'x.jsonl']
  for _ in range(12):
    act, key, content = draw.choice('wwrru'), draw.choice(keys), draw.randbytes(draw.randint(0, 9))
    answers = []
    for root in roots:
      path = root / key
      if act == 'w':
        files.replace(path, content)
        answers.append(path.stat().st_size)
      elif act == 'r':
        answers.append([path.exists(), path.is_file()])
      else:
        path.unlink(missing_ok=True)
    assert len({str(answer) for answer in answers}) <= 1, (act, key, answers)
  assert shown(roots[0]) == shown(roots[1])
  of = [sorted(str(p.relative_to(root)) for p in root.glob('*.json')) for root in roots]
  assert of[0] == of[1]
  path = bucket / 'run' / 'x' / 'y.tar'
  disk = pathlib.PurePosixPath('/run/x/y.tar')
  for name in ('name', 'stem', 'suffix'):
    assert getattr(path, name) == getattr(disk, name)
  assert path.with_suffix('.json').name == disk.with_suffix('.json').name
  assert str(path.parent) == f'{bucket}/run/x' and files.place(str(path)) == path
  assert (files.here(bucket / 'run') / 'a.json').exists() == (roots[0] / 'a.json').exists()
  files.remove(bucket / 'run')
  assert not (bucket / 'run').exists()


@BOTH
def test_a_file_that_grows_is_what_was_written_to_it(bucket, monkeypatch):
  """Through any number of parts, of openings, of replacements."""
  monkeypatch.setattr(address, 'PART_BYTES', 64)
  place, draw, expected = bucket / 'metrics.jsonl', random.Random(5), b''
  for cut in (0, 0, 1, 0):
    if cut:
      expected = expected[: draw.randint(64, len(expected))]
      files.replace(place, expected)
    with place.open('ab') as file:
      for _ in range(5):
        line = b'x' * draw.randint(1, 40) + b'\n'
        file.write(line)
        file.flush()
        expected += line
    assert place.read_bytes() == expected
  assert len(list(bucket.iterdir())) > 2


@BOTH
def test_parts_of_a_file_that_was_replaced_belong_to_nothing(bucket, monkeypatch):
  """A writer may be killed between the two."""
  monkeypatch.setattr(address, 'PART_BYTES', 10)
  place = bucket / 'metrics.jsonl'
  with place.open('a') as file:
    for i in range(4):
      file.write(f'old line {i}\n')
      file.flush()
  system.of(bucket.scheme).pipe_file(place.path, b'another line\n')
  assert place.read_text() == 'another line\n'


def test_what_reads_files_is_refused_by_name(bucket):
  for act in (open, pathlib.Path):
    with pytest.raises(ValueError, match=f'{bucket}/x is in a bucket.*gcsfuse'):
      act(bucket / 'x')
  with pytest.raises(ValueError, match='only .*jsonl files grow'):
    (bucket / 'notes.txt').open('a')
  for text, said in (('s3:///x', 'names no bucket'), ('s3://b/../x', r'no \. and no')):
    with pytest.raises(ValueError, match=said):
      files.place(text)
  with pytest.raises(ValueError, match='and in buckets .s3, gs. here'):
    files.check_local('--workdir', 'http://host/x', buckets=True)
  assert files.place('file:///tmp/x') == pathlib.Path('/tmp/x')


@BOTH
def test_one_process_holds_a_place(bucket, monkeypatch):
  monkeypatch.setattr(lease, 'BEAT', 0.05)
  lock = bucket / 'run' / 'lock'
  with files.locked(lock, 'run', 'wait'):
    first = lock.read_bytes()
    with pytest.raises(files.InUse, match='in use by this process'):
      with files.locked(lock, 'run', 'wait'):
        pass
    while lock.read_bytes() == first:  # until it is renewed
      pass
  assert not lock.exists()


def held_by(place, **changed) -> None:
  files.replace(place, lease.content_of('theirs', **changed))


@BOTH
def test_a_lock_whose_holder_is_gone_is_taken_over(bucket, monkeypatch):
  """Of this machine at once; of another where it gives no sign of life."""
  monkeypatch.setattr(lease, 'SETTLES', 0)
  lock = bucket / 'run' / 'lock'
  held_by(lock, process=2**22 + 1)  # beyond what Linux counts to
  with files.locked(lock, 'run', 'wait'):
    pass
  monkeypatch.setattr(lease, 'STALE', 0.1)
  held_by(lock, host='elsewhere')
  with files.locked(lock, 'run', 'wait'):
    pass


@pytest.fixture
def in_memory(monkeypatch):
  """A bucket that is no server's."""
  memory = pytest.importorskip('fsspec').filesystem('memory')
  monkeypatch.setattr(system, 'of', lambda scheme, first=False: memory)
  monkeypatch.setattr(lease, 'SETTLES', 0)
  yield files.place('s3://in-memory')
  memory.store.clear()


def test_a_holder_that_ends_while_it_is_looked_at_is_no_holder(in_memory, monkeypatch):
  """Between the refusal and the first look, and between two looks."""
  lock = in_memory / 'run' / 'lock'
  made, refused = lease._created, iter([False])
  monkeypatch.setattr(lease, '_created', lambda *of: next(refused, True) and made(*of))
  with files.locked(lock, 'run', 'wait'):
    pass
  held_by(lock, host='elsewhere')
  looked = iter([True])
  monkeypatch.setattr(lease.time, 'sleep', lambda _: next(looked, False) and lock.unlink())
  with files.locked(lock, 'run', 'wait'):
    pass
  assert not [*refused, *looked]


@pytest.mark.parametrize('content', [b'', b'[]', b'{}', b'\xff{'])
def test_a_lock_that_cannot_be_read_is_waited_for_as_any_other(in_memory, monkeypatch, content):
  lock, slept = in_memory / 'run' / 'lock', []
  files.replace(lock, content)
  began = time.monotonic()
  monkeypatch.setattr(lease.time, 'monotonic', lambda: began + sum(slept))
  monkeypatch.setattr(lease.time, 'sleep', slept.append)
  with files.locked(lock, 'run', 'wait'):
    assert lease.STALE < sum(slept) < lease.STALE + 3
  files.replace(lock, content)
  monkeypatch.setattr(lease.time, 'sleep', lambda _: held_by(lock, host='elsewhere'))
  with pytest.raises(files.InUse, match='on elsewhere'):
    with files.locked(lock, 'run', 'wait'):
      pass


def test_only_a_buckets_own_refusal_says_that_a_lock_is_taken():
  """Not a name or a number that stands in what else went wrong."""

  class Refused(Exception):
    code = 412

  for cause, taken in (
    (Refused('conditionNotMet'), True),
    (Exception('An error occurred (PreconditionFailed) when calling PutObject'), True),
    (Exception('reset by peer, request 412'), False),
  ):
    error = OSError(f's3://bucket/412/lock: {cause}')
    error.__cause__ = cause
    assert lease._taken(error) == taken


@BOTH
def test_of_two_that_take_a_lock_over_one_goes_on(bucket, monkeypatch):
  lock = bucket / 'run' / 'lock'
  held_by(lock, process=2**22 + 1)
  monkeypatch.setattr(lease.time, 'sleep', lambda _: held_by(lock, host='elsewhere'))
  with pytest.raises(files.InUse, match='on elsewhere'):
    with files.locked(lock, 'run', 'wait'):
      pass


def test_a_holder_that_lives_elsewhere_is_heeded(bucket, monkeypatch):
  lock = bucket / 'run' / 'lock'
  held_by(lock, host='elsewhere')
  looks = iter(range(9))
  monkeypatch.setattr(
    lease.time, 'sleep', lambda _: held_by(lock, host='elsewhere', beat=next(looks))
  )
  with pytest.raises(files.InUse, match='on elsewhere, since .*; give another'):
    with files.locked(lock, 'run', 'give another'):
      pass


@BOTH
def test_who_has_lost_a_lock_writes_nothing_more(bucket, monkeypatch):
  monkeypatch.setattr(lease, 'BEAT', 0.05)
  run = bucket / 'run'
  with files.locked(run / 'lock', 'run', 'wait'):
    held_by(run / 'lock', host='elsewhere')
    while not lease.lost(run):
      pass
    with pytest.raises(OSError, match='is not this process.s any more.*elsewhere took it over'):
      files.replace(run / 'config.json', '{}')
    files.replace(bucket / 'other' / 'config.json', '{}')
  assert (run / 'lock').exists(), 'it is the other one\'s'


def test_who_was_not_heard_of_for_long_looks_before_it_writes(in_memory, monkeypatch):
  """A thread whose request neither ends nor fails says nothing; a process that was stopped, and
  whose lock nobody took, goes on. And who ends before the next beat leaves what another put there.
  """
  run = in_memory / 'run'
  with files.locked(run / 'lock', 'run', 'wait'):
    now, before = time.monotonic(), (run / 'lock').read_bytes()
    monkeypatch.setattr(lease.time, 'monotonic', lambda: now + lease.STALE / 2 + 1)
    assert not lease.lost(run) and (run / 'lock').read_bytes() != before, 'it was renewed'

    def refuse(place):
      raise OSError('no answer')

    monkeypatch.setattr(lease.time, 'monotonic', lambda: now + lease.STALE + 2)
    with monkeypatch.context() as broken:
      broken.setattr(lease, '_holder', refuse)
      assert 'could not be renewed' in lease.lost(run)
    with pytest.raises(OSError, match='is not this process.s any more'):
      files.replace(run / 'config.json', '{}')
  assert (run / 'lock').exists()
  (run / 'lock').unlink()
  with files.locked(run / 'lock', 'run', 'wait'):
    held_by(run / 'lock', host='elsewhere')
  assert (run / 'lock').exists(), 'it is the other one\'s'


def test_a_directory_may_begin_with_a_dot():
  place = files.place('s3://bucket/.exp/run/x')
  assert str(place.parent.parent) == 's3://bucket/.exp'
  assert str(place.parent.parent.parent) == str(files.place('s3://bucket'))


def test_a_missing_bucket_and_a_missing_library_are_one_line(bucket, monkeypatch, anew):
  with pytest.raises(FileNotFoundError, match='there is no bucket s3://nowhere-at-all; make it'):
    system.check(files.place('s3://nowhere-at-all/run'), write=True)
  monkeypatch.setitem(system.DRIVERS, 's3', ('no_such_module', 's3'))
  system.forget()
  with pytest.raises(ValueError, match=r"pip install 'tandem\[s3\]'"):
    files.replace(bucket / 'x', b'')


@BOTH
@pytest.mark.slow
@pytest.mark.parametrize(
  'fault, kind, said', [(403, PermissionError, 'give credentials'), (503, OSError, 'does http')]
)
def test_who_may_not_or_gets_no_answer_is_told_at_once(
  bucket, proxy: Proxy, capfd, fault, kind, said
):
  proxy.faults = lambda method, path: fault
  with pytest.raises(kind, match=f'{bucket}/run: .*{said}'):
    system.check(bucket / 'run', write=True)
  assert len(proxy.seen) < 10
  assert capfd.readouterr().err == ''


SLOW = pytest.mark.slow
FAULTS = [
  503,
  pytest.param('reset', marks=SLOW),
  pytest.param(500, marks=SLOW),
  pytest.param('stall', marks=SLOW),
]


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('bucket', ['s3', pytest.param('gs', marks=SLOW)], indirect=True)
def test_a_request_that_fails_is_made_again(bucket, proxy: Proxy, monkeypatch, anew, fault):
  """Every third one fails; what was written is whole."""
  monkeypatch.setattr(system, 'READ_SECONDS', 0.2)
  proxy.stall, count = 0.6, iter(range(10**6))
  proxy.faults = lambda method, path: None if next(count) % 3 else fault
  for i in range(3):
    files.replace(bucket / f'{i}', b'%d' % i * 1000)
    assert (bucket / f'{i}').read_bytes() == b'%d' % i * 1000


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz'])
def test_a_bucket_that_fails_is_no_damaged_file(bucket, proxy: Proxy, name):
  """Whose documents would be left out, and the corpus kept as if it were whole."""
  place = bucket / name
  content = json.dumps({'text': 'one'}).encode()
  files.replace(place, gzip.compress(content) if name.endswith('.gz') else content)
  source = SourceConfig(kind='jsonl', path=str(place), text_field='text')
  assert [*sources.of_file(source, str(place), sources.Problems(), {})] == ['one']
  proxy.faults = lambda method, path: 503 if method == 'GET' and name in path else None
  problems = sources.Problems()
  with pytest.raises(files.BucketError, match=f'{place}: .*; does http'):
    [*sources.of_file(source, str(place), problems, {})]
  assert not problems
  proxy.faults = lambda method, path: None
  files.replace(place, b'no archive and no record')
  assert [*sources.of_file(source, str(place), problems, {})] == [] and problems.total() == 1


@pytest.mark.slow
def test_requests_that_always_fail_end(bucket, proxy: Proxy):
  proxy.faults = lambda method, path: 503
  with pytest.raises(OSError, match=f'{bucket}/x: .*; does http://127.0.0.1.* answer'):
    files.replace(bucket / 'x', b'')
  assert len(proxy.seen) <= 3 * system.RETRIES
