"""Does the rehearsal see what it says: replicas that come and go by Kubernetes' formula, shares of
a canary, and every request that is lost?
"""

import asyncio
import contextlib
import json
import re
import signal

import pytest

from launch.serve import rehearse, wire
from launch.serve.autoscale import Autoscaler
from launch.serve.proxy import Backend, Proxy
from launch.serve.rehearse import Failed, Heard

METRIC = 'tandem_num_requests_waiting'


def autoscaler(target=4, least=1, most=10, **behavior) -> Autoscaler:
  pods = {'metric': {'name': METRIC}, 'target': {'averageValue': str(target)}}
  spec = {'minReplicas': least, 'maxReplicas': most, 'metrics': [{'pods': pods}]}
  return Autoscaler({'spec': spec | {'behavior': behavior}})


@pytest.mark.parametrize(
  'replicas, mean, wanted',
  [
    # Of Kubernetes' own page: twice the target doubles, half of it halves, near 1 nothing.
    (3, 8, 6),
    (4, 2, 2),
    (5, 4.39, 5),
    (5, 3.61, 5),
    (5, 4.5, 6),
    (3, 0, 1),
    (4, 40, 10),
  ],
)
def test_the_formula_is_that_of_kubernetes(replicas, mean, wanted):
  assert autoscaler().formula(replicas, {METRIC: mean}) == wanted


def test_the_greatest_of_the_metrics_counts_and_text_is_a_number():
  made = rehearse.autoscaler_of(rehearse.KUBERNETES.read_text())
  assert made.targets == {METRIC: 4, 'tandem_num_requests_running': 12}
  made.most = 8
  assert made.formula(2, {METRIC: 0, 'tandem_num_requests_running': 12}) == 2
  assert made.formula(2, {METRIC: 8, 'tandem_num_requests_running': 12}) == 4


def test_windows_and_policies_hold_changes_back():
  down = {'stabilizationWindowSeconds': 300}
  down |= {'policies': [{'type': 'Pods', 'value': 1, 'periodSeconds': 60}]}
  up = {'policies': [{'type': 'Percent', 'value': 100, 'periodSeconds': 60}]}
  made = autoscaler(scaleUp=up, scaleDown=down)
  replicas, seen = 1, {}
  for now in range(0, 1000, 15):
    replicas = made.desired(replicas, {METRIC: 40 / replicas if now < 150 else 0}, now)
    seen[now] = replicas
  # Doubled at most, each minute.
  assert [seen[now] for now in (0, 45, 60, 105, 120, 435)] == [2, 2, 4, 4, 8, 8]
  # Five minutes after more were wanted last, at 135, one goes, and one a minute from then on.
  assert [seen[now] for now in (450, 495, 510, 570, 810, 990)] == [7, 7, 6, 5, 1, 1]


def test_shares_of_versions_are_spread_evenly():
  proxy = Proxy()
  proxy.backends = [Backend('a', 'stable', 1, True), Backend('b', 'canary', 2, True)]
  proxy.weights = {'stable': 90, 'canary': 10}
  chosen = [proxy.choose(set()).name for _ in range(100)]
  assert chosen.count('b') == 10 and 'b' in chosen[:10] and chosen[:10].count('b') == 1
  # Who is not ready gets none, nor who has not taken it.
  proxy.backends[0].ready = False
  assert {proxy.choose(set()).name for _ in range(9)} == {'b'}
  assert proxy.choose({proxy.backends[1]}) is None


@contextlib.asynccontextmanager
async def answering(answer: bytes):
  """The port of a server that says this, and goes."""

  async def handle(reader, writer):
    await wire.read_head(reader)
    writer.write(answer)
    await wire.closed(writer)

  server = await asyncio.start_server(handle, wire.HOST, 0)
  async with server:
    yield server.sockets[0].getsockname()[1]


def through(*answers: bytes, more=()) -> tuple[list, str]:
  """[status, body or 'broken'] of a request to replicas that answer so, the first one first."""

  async def run():
    proxy = Proxy()
    await proxy.start()
    async with contextlib.AsyncExitStack() as stack:
      ports = [*more]
      for each in answers:
        ports.append(await stack.enter_async_context(answering(each)))
      proxy.backends = [Backend(str(i), 'v', port, True) for i, port in enumerate(ports)]
      proxy.weights = {'v': 1}
      async with wire.asked(proxy.port, wire.request('POST', '/x', b'{}')) as (status, head, body):
        try:
          return status, b''.join([piece async for piece in body]).decode(), head['x-replica']
        except wire.Broken:
          return status, 'broken', head['x-replica']
      await proxy.close()

  return asyncio.run(run())


def test_what_is_not_taken_goes_to_another_and_what_is_taken_does_not():
  fine = wire.answer('200 OK', b'yes')
  draining = wire.error('503 Service Unavailable', 'draining')
  chunked = b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n'
  assert through(fine) == (200, 'yes', '0')
  assert through(draining, fine) == (200, 'yes', '1')
  assert through(fine, more=[1]) == (200, 'yes', '1'), 'nobody listens at port 1'
  assert through(chunked + b'0\r\n\r\n') == (200, 'abc', '0')
  # Taken, and gone: said, and not asked again elsewhere.
  status, body, replica = through(b'', fine)
  assert (status, replica) == (502, '0') and 'gone' in json.loads(body)['error']['message']
  assert through(chunked, fine) == (200, 'broken', '0')


def options(tmp_path, *more):
  flags = ['--speed=300', '--tokens=3', '--requests=20', f'--log={tmp_path}/log', *more]
  return rehearse.parser().parse_args(flags)


def test_a_rehearsal_with_stand_ins_loses_nothing(tmp_path, capsys):
  rows = asyncio.run(rehearse.rehearse(options(tmp_path)))
  said = capsys.readouterr().out
  assert [row[0].split()[0] for row in rows] == ['1', 'canary', 'one']
  assert rows[1][2] == '60 done' and '2 of 20 requests went to the canary' in said
  # Those in flight on the killed one: begun, or not.
  assert re.search('broken off|error 502', rows[2][2]) and ' done' in rows[2][2]
  assert (tmp_path / 'log').read_text() == ''


def test_a_server_that_does_not_drain_is_found(tmp_path, monkeypatch):
  send = rehearse.Replica.send
  monkeypatch.setattr(rehearse.Replica, 'send', lambda self, _: send(self, signal.SIGKILL))
  with pytest.raises(Failed, match='ends with 0|no accepted request is lost'):
    asyncio.run(rehearse.rehearse(options(tmp_path)))


def test_a_lost_request_is_found():
  fine = [Heard('done', 'a', 3), Heard('refused')]
  rehearse.check_none_lost(fine)
  for outcome in ('no end', 'broken off', 'error 502', 'no answer'):
    with pytest.raises(Failed, match=f'lost .*1 {outcome}'):
      rehearse.check_none_lost([fine[0], Heard(outcome)])
  with pytest.raises(Failed, match='there were requests'):
    rehearse.check_none_lost([])
