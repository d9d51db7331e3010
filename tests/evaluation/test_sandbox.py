"""Does a program that a model wrote pass exactly where it runs to its end, and is what it could
break out of its reach?
"""

import fcntl
import json
import os
import pathlib
import re
import time

import pytest

from configs.tasks import humaneval
from evaluation import confined
from evaluation.examples import Manner
from evaluation.sandbox import MODES, TRUSTED, Sandbox
from evaluation.task import Generate, Task
from tests.evaluation.test_tasks import lines_of


@pytest.fixture(params=MODES)
def sandbox(request):
  missing = confined.missing()
  if request.param != TRUSTED and missing:
    pytest.skip(missing)
  return Sandbox(request.param, seconds=2, memory=2**29)


ENDS = {
  'x = 1\nprint("fault: no")': '',
  'open("here", "w").write("x")\nassert open("here").read() == "x"': '',
  'import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()': '',
  'assert 1 + 1 == 3': 'AssertionError',
  'raise ValueError("a\\nb")': 'ValueError: a b',
  'def f(:': r'SyntaxError: .*line 1.*',
  # What ends itself did not come to its end.
  'raise SystemExit': 'SystemExit',
  'import os; os._exit(0)': 'it ended before its last line',
  'x = bytearray(2**30)': 'MemoryError',
  'open("large", "w").write("x" * 2**21)': r'OSError: .*File too large',
}


@pytest.mark.parametrize('program', ENDS, ids=range(len(ENDS)))
def test_a_program_passes_where_it_comes_to_its_end(sandbox, program):
  assert re.fullmatch(ENDS[program], sandbox.fault(program))


def test_what_does_not_end_is_ended():
  assert Sandbox(TRUSTED, seconds=1).fault('while True: pass') == 'it did not end within 1 s'


# It leaves when the child that it forked has the lock.
FORKS = """
import fcntl, os, time
ours, theirs = os.pipe()
if not os.fork():
  lock = open({path!r}, 'w')
  fcntl.flock(lock, fcntl.LOCK_EX)
  os.write(theirs, b'.')
  time.sleep(600)
os.read(ours, 1)
os._exit(0)
"""


def test_what_a_program_started_ends_with_it(tmp_path):
  path = tmp_path / 'lock'
  assert Sandbox(TRUSTED).fault(FORKS.format(path=str(path))) == 'it ended before its last line'
  with open(path) as file:
    until = time.monotonic() + 60  # it dies when the system gets to it
    while True:
      try:
        return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        assert time.monotonic() < until, 'the child lives'
        time.sleep(0.05)


def test_a_program_does_not_run_where_it_is_not_confined_after_all(tmp_path, monkeypatch):
  """And its answer is not counted as wrong."""
  if missing := confined.missing():
    pytest.skip(missing)
  source = pathlib.Path(confined.__file__).read_text()
  broken = tmp_path / 'confined.py'
  broken.write_text(
    source.replace('RESTRICT_SELF = 444, 445, 446', 'RESTRICT_SELF = 444, 445, 0xFFFF')
  )
  monkeypatch.setattr(confined, '__file__', str(broken))
  with pytest.raises(RuntimeError, match='cannot be confined here: .*not implemented'):
    Sandbox().fault('x = 1')


def test_files_network_and_processes_are_out_of_reach(tmp_path):
  if missing := confined.missing():
    pytest.skip(missing)
  mine = tmp_path / 'mine'
  mine.write_text('x')
  sandbox, refused = Sandbox(seconds=5), 'PermissionError: .*'
  for program in (
    f'open({str(mine)!r}).read()',
    f'open({str(tmp_path / "more")!r}, "w")',
    f'import os; os.remove({str(mine)!r})',
    f'import os; os.listdir({str(tmp_path)!r})',
    f'import os; os.chmod({str(mine)!r}, 0)',
    f'import os; os.truncate({str(mine)!r}, 0)',
    f'import os; os.utime({str(mine)!r})',
    'import socket; socket.socket()',
    'import subprocess; subprocess.run(["true"])',
    'import os; os.system("true")',
    'import os; os.fork()',
    'import os; os.kill(os.getppid(), 0)',
    'import ctypes; ctypes.CDLL(None)',
  ):
    assert re.fullmatch(refused, sandbox.fault(program)), program
  assert mine.read_text() == 'x' and os.listdir(tmp_path) == ['mine']
  assert sandbox.fault('import heapq, hashlib, typing\nhashlib.md5(b"x")') == ''


def test_limits_that_are_none_and_places_that_are_unknown_raise(monkeypatch):
  with pytest.raises(ValueError, match="--run_programs='here' is unknown.*confined.*trusted"):
    Sandbox('here')
  for wrong in ({'seconds': 0}, {'memory': 1}):
    with pytest.raises(ValueError, match='of a program must be at least'):
      Sandbox(TRUSTED, **wrong)
  monkeypatch.setattr(confined.sys, 'platform', 'darwin')
  with pytest.raises(ValueError, match='no Landlock on darwin; .*--run_programs=trusted'):
    Sandbox()


def test_answers_are_judged_by_running_them():
  """Of programs that are made so that the even ones are right."""

  def program(answer, row):
    return f'assert {row["i"]} % 2 == 0'

  task = Task(
    Generate(max_new_tokens=2, program=program),
    lambda: ({'i': i} for i in range(3)),
    prompt='{{ i }}',
    metrics=('pass@1',),
  )
  lines, _ = lines_of(task, Manner(programs=Sandbox(TRUSTED)))
  assert [line['passed'] for line in lines] == [1, 0, 1]
  assert [line['faults'] for line in lines] == [[''], ['AssertionError'], ['']]
  with pytest.raises(ValueError, match='answers are programs.*--run_programs=confined'):
    lines_of(task, Manner())
  with pytest.raises(ValueError, match='leave one out'):
    Generate(program=program, passed=program)


@pytest.mark.slow
def test_the_solutions_of_humaneval_pass_and_others_do_not(shared_data):
  """As a model would write them: the rest of a function, or a block of code with all of it."""
  if missing := confined.missing():
    pytest.skip(missing)
  sandbox = Sandbox()
  lines = (shared_data / 'humaneval' / 'problems.jsonl').read_text().splitlines()
  for i, row in enumerate(map(json.loads, lines)):
    right = row['canonical_solution']
    whole = f'Here it is:\n```python\n{row["prompt"]}{right}```\nIt works.'
    # A chat may go on behind a function that is in no block.
    answer = whole if i % 2 else f'{right}\n# It works.\nprint(' if i % 3 else right
    assert sandbox.fault(humaneval.program(answer, row)) == '', row['task_id']
    if not i % 8:
      assert sandbox.fault(humaneval.program('    return None\n', row)), row['task_id']
