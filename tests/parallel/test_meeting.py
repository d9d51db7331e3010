"""Do processes learn who is missing, all of them, in time, whatever else knocks at the port?"""

import concurrent.futures
import socket
import time

import pytest

from parallel import meeting


@pytest.fixture
def port() -> int:
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


def meet(port, processes, numbers, seconds=30.0, late=0.0):
  """What each of these processes met with: None, or its error; the first one comes late."""

  def one(number):
    time.sleep(late if number == 0 else 0)
    try:
      meeting.meet(f'localhost:{port}', processes, number, seconds)
    except ValueError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(len(numbers)) as pool:
    return list(pool.map(one, numbers))


@pytest.mark.parametrize('processes', [1, 2, 5])
def test_who_has_come_goes_on(port, processes):
  began = time.monotonic()
  assert meet(port, processes, range(processes), late=0.5) == [None] * processes
  assert time.monotonic() - began < 15
  # The port is free again.
  assert meet(port, processes, range(processes)) == [None] * processes


def test_all_are_told_who_is_missing(port):
  came = meet(port, 5, (0, 1, 3), seconds=1.5)
  for number, said in zip((0, 1, 3), came, strict=True):
    assert said.startswith(f'process {number} of 5 has waited 1.5 s at localhost:{port}: process')
    assert 'process(es) [2, 4] have not come; start all within --meeting_timeout' in said


def test_without_the_first_one_the_others_say_so(port):
  began = time.monotonic()
  for said in meet(port, 3, (1, 2), seconds=1.0):
    assert 'process 0 does not answer; start all' in said
  assert time.monotonic() - began < 15


@pytest.mark.slow
def test_who_goes_again_is_missing_and_strangers_are_not_counted(port):
  """A process that has come and was lost, one of another run, and what a scan of ports sends."""
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first = pool.submit(meet, port, 3, (0,), 6.0)
    sent = (b'tandem: process 1 of 3\n', b'tandem: process 1 of 4\n', b'GET / HTTP/1.1\r\n', b'')
    for said in sent:
      for _ in range(100):
        try:
          with socket.create_connection(('localhost', port), 1) as visitor:
            visitor.sendall(said)
          break
        except OSError:
          time.sleep(0.02)
    # Only now, or all three would have been there at once.
    last = pool.submit(meet, port, 3, (2,), 20.0)
    for said in (*first.result(), *last.result()):
      assert 'process(es) [1] have not come' in said


def test_a_port_that_is_taken_is_said(port):
  with socket.create_server(('', port)), pytest.raises(ValueError, match='a free port'):
    meeting.meet(f'localhost:{port}', 2, 0, 1.0)
