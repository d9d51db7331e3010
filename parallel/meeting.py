"""Have all processes come? Each says its number to the first one, which tells all who is missing.

It is asked before JAX connects them, which where one never comes ends in an abort that names
nobody. Afterwards the port is free again, and JAX's.
"""

import contextlib
import re
import socket
import time

HELLO = re.compile(rb'tandem: process (\d{1,9}) of (\d{1,9})\n')
ALL = 'all have come\n'
PAUSE = 0.2  # seconds between attempts, and looks
HEAR = 2.0  # seconds in which a visitor says who it is


def meet(coordinator: str, processes: int, process: int, seconds: float) -> None:
  """Returns once all processes have called it.

  Args:
    coordinator: host:port of process 0. seconds: that this one waits.
  Raises ValueError where some have not come by then, with their numbers.
  """
  host, _, port = coordinator.rpartition(':')
  deadline = time.monotonic() + seconds
  if process:
    answer = _ask(host.strip('[]'), int(port), processes, process, deadline)
  else:
    answer = _gather(int(port), processes, deadline)
  if answer != ALL:
    raise ValueError(
      f'process {process} of {processes} has waited {seconds:g} s at {coordinator}: '
      f'{answer.strip()}; start all within --meeting_timeout seconds, or raise it'
    )


def _gather(port: int, processes: int, deadline: float) -> str:
  """What process 0 tells all that have come."""
  came: dict[int, socket.socket] = {}
  with contextlib.ExitStack() as opened:
    server = opened.enter_context(_listening(port))
    while time.monotonic() < deadline and len(came) < processes - 1:
      with contextlib.suppress(OSError):
        visitor = opened.enter_context(server.accept()[0])
        visitor.settimeout(HEAR)
        said = HELLO.fullmatch(visitor.recv(64))
        # Of another port's scan nothing is made, and of a process that was started again the last.
        if said and int(said[2]) == processes and 0 < int(said[1]) < processes:
          came[int(said[1])] = visitor
      came = {number: visitor for number, visitor in came.items() if _waits(visitor)}

    missing = sorted({*range(1, processes)} - {*came})
    answer = f'process(es) {missing} have not come\n' if missing else ALL
    for visitor in came.values():
      with contextlib.suppress(OSError):
        visitor.sendall(answer.encode())
  return answer


def _listening(port: int) -> socket.socket:
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    server = socket.create_server(('', port), family=family, dualstack_ipv6=both, backlog=4096)
  except OSError as error:
    raise ValueError(
      f'process 0 cannot listen at port {port}: {error.strerror}; give --coordinator a free port'
    ) from error
  server.settimeout(PAUSE)
  return server


def _waits(visitor: socket.socket) -> bool:
  """Whether a process that has come is still there: it says nothing more, and has not gone."""
  visitor.setblocking(False)
  try:
    return visitor.recv(1) != b''
  except BlockingIOError:
    return True
  except OSError:
    return False


def _ask(host: str, port: int, processes: int, process: int, deadline: float) -> str:
  """What process 0 says to this one, or that it is not there."""
  while (left := deadline - time.monotonic()) > 0:
    # It may not have begun to listen, or have been started again.
    with contextlib.suppress(OSError), socket.create_connection((host, port), left) as first:
      first.sendall(f'tandem: process {process} of {processes}\n'.encode())
      first.settimeout(max(deadline - time.monotonic(), 0) + HEAR)
      if answer := first.makefile().readline():
        return answer
    time.sleep(PAUSE)
  return 'process 0 does not answer'
