"""Are constraints made once, in turn, within their bounds, for as long as somebody wants them?"""

import concurrent.futures
import gc
import queue
import threading
import weakref

import numpy as np
import pytest

from decode import automaton
from decode.constrain import Constraint
from serving import call as calls, constraints
from serving.call import QueueFull
from serving.fake import SIZES
from tests.serving.test_scheduler import call, events, service


class Making:
  """In the place of a Constraint: it goes on until it is let go, or nobody wants it."""

  def __init__(self, monkeypatch, nbytes=64, threads=1):
    self.go, self.begun, self.asked, self.nbytes = threading.Event(), queue.Queue(), [], nbytes
    monkeypatch.setattr(constraints, 'Constraint', self.made)
    monkeypatch.setattr(constraints, 'THREADS', threads)

  def made(self, tokenizer, *, regex, room, wanted):
    self.asked.append(regex)
    self.begun.put(regex)
    while not self.go.wait(0.001):
      if not wanted():
        raise automaton.Unwanted
    table = np.zeros(self.nbytes, np.int8)
    made = Constraint.__new__(Constraint)
    made.regex, made.next, made.classes = regex, table, table[:0]
    return made


def test_what_nobody_waits_for_is_not_made(monkeypatch):
  making = Making(monkeypatch)
  served = service()
  tickets = [served.submit(call(regex=regex)) for regex in ('a', 'b', 'b')]
  futures = [each.made for each in served._constraints._kept.values()]
  assert making.begun.get(timeout=60) == 'a'
  tickets[1].cancel()
  served.step()
  assert not any(future.done() for future in futures)  # the third waits for it still
  tickets[2].cancel()
  tickets[0].cancel()
  served.step()
  assert futures[1].cancelled() and isinstance(futures[0].exception(60), automaton.Unwanted)
  again = served.submit(call(regex='b'))
  assert making.begun.get(timeout=60) == 'b' and making.asked == ['a', 'b']
  making.go.set()
  concurrent.futures.wait([each.made for each in served._constraints._kept.values()], 60)
  served.run()
  assert again.done and served.stats().finished == {'cancelled': 3, 'stop': 1}


def test_a_server_that_ends_makes_nothing_more(monkeypatch):
  making = Making(monkeypatch)
  served = service()
  served.submit(call(regex='a'))
  (begun,) = served._constraints._kept.values()
  assert making.begun.get(timeout=60) == 'a'
  served.close()
  assert isinstance(begun.made.exception(60), automaton.Unwanted)


def test_nothing_is_made_for_whom_there_is_no_place(monkeypatch):
  making = Making(monkeypatch)
  served = service(waiting=4, constraints=4)
  with pytest.raises(ValueError, match='5 samples, of at most 4'):
    served.submit(call(regex='a', options=dict(num_samples=5)))
  assert not served._constraints._kept and not making.asked
  served.submit(call(regex='a', key='one'))
  served.submit(call(regex='b', key='one'))
  with pytest.raises(QueueFull, match='2 constraints are being made, of at most 4 .2 of this API'):
    served._constraints.made(call(regex='c', key='one'))
  served.submit(call(regex='c', key='other'))
  served.close()


def test_tables_that_are_kept_are_bounded(monkeypatch):
  making = Making(monkeypatch, nbytes=60)
  making.go.set()
  served = service(kept_bytes=100)
  for regex in 'abcb':
    served._constraints.made(call(regex=regex)).result(60)
  assert making.asked == ['a', 'b', 'c']
  served._constraints.made(call(regex='a')).result(60)
  assert making.asked == ['a', 'b', 'c', 'a'] and len(served._constraints._kept) == 2


@pytest.mark.slow
def test_a_refused_constraint_is_kept_without_its_tables(monkeypatch):
  tables = []

  class Large:
    def __init__(self, tokenizer, **given):
      self.next = np.zeros((SIZES.states, 2), np.int8)
      tables.append(weakref.ref(self))
      raise ValueError('takes 4096 states and tells 2 classes of tokens apart')

  monkeypatch.setattr(constraints, 'Constraint', Large)
  served = service()
  made = served._constraints.made(call(regex='a'))
  with pytest.raises(ValueError, match='states and tells 2 classes'):
    made.result(5)
  with pytest.raises(ValueError, match='states and tells 2 classes'):
    served._constraints.made(call(regex='a')).result(0)
  assert len(tables) == 1
  gc.collect()
  assert tables[0]() is None


def test_a_constraint_that_could_not_be_made_is_made_anew_and_is_no_fault_of_who_asks(monkeypatch):
  def broken(tokenizer, **given):
    raise RuntimeError('a secret of this machine')

  monkeypatch.setattr(constraints, 'Constraint', broken)
  served = service()
  first = served._constraints.made(call(regex='a'))
  with pytest.raises(RuntimeError):
    first.result(5)
  again = served._constraints.made(call(regex='a'))
  assert again is not first
  ticket = served.submit(call(regex='b'))
  while not ticket.done:
    served.step()
  (event,) = events(ticket)
  assert event.error.kind == calls.BROKEN and 'RuntimeError' in event.error.message
  assert 'secret' not in event.error.message


@pytest.mark.parametrize('threads', [1, 2])
def test_keys_take_turns_and_have_one_thread_each(monkeypatch, threads):
  """However many hostile ones another has asked for before."""
  making = Making(monkeypatch, threads=threads)
  served = service(waiting=64)
  for regex in 'abcd':
    served.submit(call(regex=regex, key='many'))
  assert making.begun.get(timeout=60) == 'a'
  for key in 'xy':
    served.submit(call(regex=key, key=key))
  if threads == 2:
    assert making.begun.get(timeout=60) == 'x' and making.begun.empty()
  making.go.set()
  concurrent.futures.wait([each.made for each in served._constraints._kept.values()], 60)
  order = ''.join(making.asked)
  assert order.startswith('a') and set(order) == set('abcdxy')
  assert max(order.index('x'), order.index('y')) < order.index('c'), order
  served.close()


def test_without_keys_all_threads_are_anybodys(monkeypatch):
  making = Making(monkeypatch, threads=2)
  served = service()
  for regex in 'ab':
    served.submit(call(regex=regex))
  assert {making.begun.get(timeout=60) for _ in range(2)} == {'a', 'b'}
  served.close()


def test_a_server_that_can_make_none_says_what_is_missing(monkeypatch):
  """At once, and not that it was a fault, for which one asks again."""
  monkeypatch.setattr(constraints.importlib.util, 'find_spec', lambda name: None)
  served = service()
  for given in (dict(regex='a'), dict(schema={'type': 'string'})):
    with pytest.raises(ValueError, match='(regex|schema): this server .*pip install outlines-core'):
      served.submit(call(**given))
  assert served.idle and not served._constraints._kept
