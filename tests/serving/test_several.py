"""Do several processes serve what one does, and what happens where one of them is lost? Real ones,
on this machine.
"""

import contextlib
import json
import os
import pathlib
import pickle
import signal
import socket
from types import SimpleNamespace

import numpy as np
import pytest

from decode.constrain import Constraint
from decode.sampling import make_sampling
from decode.sizes import Request
from serving import several
from serving.call import EngineLost
from serving.several import HeardCalls, LeadingRows, Sent
from tests.test_commands import Process

ROOT = pathlib.Path(__file__).parents[2]
# A server of a little model whose heads two devices share, and what it is asked; process 1 follows.
SERVING = """
import contextlib, json, os, sys
import jax
from parallel import hosts
from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from decode.options import Options
from model import transformer
from model.config import ModelConfig
from parallel.mesh import MeshConfig, make_mesh
from serving import several
from serving.call import Call, NotReady
from serving.running import Running
coordinator, process, sizes = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
SIZES = dict(rows=2, capacity=48, read_tokens=8, last_tokens=3, block=8, steps=4, bias=4)
SIZES |= dict(ends=4, states=40)
SIZES |= dict(classes=64, alternatives=2)

def generator():
  mesh = make_mesh(MeshConfig(data=1, tensor=2))
  with jax.set_mesh(mesh):
    config = ModelConfig(
      vocabulary=264, width=16, layers=2, heads=2, feed_forward=24, max_length=64, init_scale=1.0
    )
    model = jax.jit(transformer.init, static_argnums=(0, 1))(config, 0)
  return Generator(model, ByteTokenizer(), mesh)

def call(text, new=9, regex=None, **options):
  return Call(prompt=text, regex=regex, options=Options(max_new_tokens=new, **options))

def serve(served):
  assert served.ready(), served.error
  asked = [call('to be, or not to be, or', 16, temperature=0.0), call('a', seed=3)]
  asked += [call('to be, or not', seed=5, num_samples=2), call('ab', regex='[ab]{3,6}c', seed=1)]
  asked += [call('b', regex='[ab]{3,6}c', seed=2), call('c' * 30, 14, seed=4)]
  tickets = [served.submit(one) for one in asked]
  served.submit(call('gone', 20)).cancel()
  said = [[(e.sample, e.ids, e.logprobs, e.finish) for e in ticket] for ticket in tickets]
  print(json.dumps([said, served.stats().preempted]), flush=True)

def lose(served):
  input()  # until the other one is gone
  if sys.argv[4] == 'asked':
    *_, end = served.submit(call('more', 20))
    print(end.finish, end.error.kind)
  served.closed()
  print(served.error)
  try:
    served.submit(call('again'))
  except NotReady as error:
    print(error.state, flush=True)
  os._exit(7)

with hosts.connect(coordinator, 2, process, 60) if coordinator else contextlib.nullcontext():
  if process:
    several.following(generator(), **SIZES | sizes).follow()
    print('followed')
  else:
    served = Running(generator(), **SIZES | sizes)
    serve(served)
    if len(sys.argv) > 4:
      lose(served)
    served.drain(60)
    served.closed()
"""


@contextlib.contextmanager
def variables(**values):
  """Of the processes that are started within."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in values.items():
      patch.setenv(name, value)
    yield


@pytest.fixture
def start(tmp_path):
  """(coordinator, which, sizes, *more) -> Process."""
  (tmp_path / 'serving_.py').write_text(SERVING)

  def started(coordinator, which, sizes, *more, devices=1, stdin=None):
    with variables(PYTHONPATH=str(ROOT), JAX_NUM_CPU_DEVICES=str(devices)):
      arguments = coordinator, str(which), json.dumps(sizes), *more
      return Process(tmp_path, str(tmp_path / 'serving_.py'), *arguments, stdin=stdin)

  return started


def coordinator():
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return f'localhost:{listener.getsockname()[1]}'


def answers(out: str):
  """What was said of each call: by sample ids, log-probabilities and how it ended."""
  said, preempted = json.loads(out.splitlines()[0])
  found = []
  for events in said:
    samples = {}
    for sample, ids, logprobs, finish in events:
      before = samples.get(sample, ([], [], ''))
      samples[sample] = (before[0] + ids, before[1] + logprobs, finish)
    found.append(samples)
  return found, preempted


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes',
  [{}, pytest.param(dict(lookup=2, pages=6, host_pages=8), marks=pytest.mark.long)],
  ids=str,
)
def test_two_processes_serve_what_one_does(start, sizes):
  """Whoever joins, waits, is cancelled or has a constraint; to the same end."""
  where = coordinator()
  processes = [start(where, i, sizes) for i in range(2)] + [start('', 0, sizes, devices=2)]
  done = [process.end() for process in processes]
  assert [process.code for process in done] == [0, 0, 0], done
  assert done[1].out.splitlines()[-1] == 'followed'
  (found, preempted), (expected, _) = answers(_last(done[0].out)), answers(done[2].out)
  assert found == expected and len(found) == 6
  assert bool(preempted) == bool(sizes)


def _last(out: str) -> str:
  """Without what is said of the processes' meeting."""
  return '\n'.join(line for line in out.splitlines() if line[:2] == '[[')


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('how', ['idle', 'asked'])
def test_one_that_is_lost_ends_all_with_503(start, how):
  """Who asked just then is told so, and who asks next; also where nobody asks."""
  where = coordinator()
  reading, writing = os.pipe()
  first = start(where, 0, {}, how, stdin=reading)
  other = start(where, 1, {})
  assert first.until(lambda: _last(first.out())), (first.end(), other.end())
  other.process.send_signal(signal.SIGKILL)
  other.process.wait()
  os.write(writing, b'\n')
  done = first.end()
  assert done.code == 7, done.error[-6000:]
  *_, end, error, state = done.out.splitlines()
  assert state == 'failed' and 'start all of them again' in error
  assert end == 'failed gone' if how == 'asked' else 'process 1 of 2 has given no sign' in error


def request(constraint=None):
  return Request([1, 2], 4, make_sampling(1, seed=3), [5], constraint, salt='s')


class Known(Constraint):
  """Made of its tables."""

  def __init__(self, regex):
    self.regex, self.classes, self.next = regex, np.arange(4, dtype=np.int32), np.ones((2, 3))


def test_constraints_are_the_same_for_as_long_as_they_are_there():
  sent, heard = Sent(), HeardCalls()
  some, other = Known('a'), Known('a')
  first, again, third = (
    heard.unpacked(sent.packed(('join', 0, request(each)))) for each in (some, some, other)
  )
  assert first[:2] == ('join', 0) and first[2].prompt == [1, 2] and first[2].salt == 's'
  np.testing.assert_array_equal(first[2].sampling.seed, [3])
  assert first[2].constraint is again[2].constraint is not third[2].constraint
  assert first[2].constraint.regex == 'a' and (first[2].constraint.next == 1).all()


def test_a_message_makes_no_other_objects():
  class Harm:
    def __reduce__(self):
      return os.system, ('false',)

  with pytest.raises(pickle.UnpicklingError, match='has a posix.system'):
    HeardCalls().unpacked(pickle.dumps(('join', Harm())))


def told_by(monkeypatch, identity, adapters):
  """What a process of two says of its model to the other, who has to say the same."""
  said = []
  monkeypatch.setattr(several.hosts, 'count', lambda: 2)
  monkeypatch.setattr(several.hosts, 'check_same', lambda name, value: said.append(value))
  devices = np.array([SimpleNamespace(process_index=i) for i in range(2)])
  mesh = SimpleNamespace(devices=devices, size=2, shape={'tensor': 2})
  model = SimpleNamespace(config='config')
  loaded = SimpleNamespace(mesh=mesh, model=model, identity=identity, adapters=adapters)
  several._check(SimpleNamespace(model=loaded, sizes='sizes'), False, '')
  return said


def test_processes_of_other_weights_or_another_order_of_adapters_are_none_of_a_server(monkeypatch):
  """Of which each would write a half."""
  fronts = {'a': 1, 'b': 2}
  known = told_by(monkeypatch, 'digest weights=', fronts)
  assert known == told_by(monkeypatch, 'digest weights=', dict(fronts))
  assert known != told_by(monkeypatch, 'other weights=', fronts)
  assert known != told_by(monkeypatch, 'digest weights=', dict(reversed(fronts.items())))


@pytest.mark.parametrize('error, expected', [(ValueError, ValueError), (OSError, EngineLost)])
def test_a_request_that_no_tables_take_is_the_end_of_that_request_alone(error, expected):
  class Refusing:
    def check(self, request):
      pass

    def join(self, row, request):
      raise error('a constraint is over 300 ids')

  rows, said = LeadingRows.__new__(LeadingRows), []
  rows._engine, rows._say = Refusing(), lambda *message: said.append(message)
  with pytest.raises(expected):
    rows.join(0, Request([1], 1, make_sampling(1)))
  assert [message[:2] for message in said] == [('join', 0)]
