"""Does what launch/serve/ asks of a cluster work on this machine, with no request lost?

    python -m launch.serve.rehearse                          stand-ins that keep a server's contract
    python -m launch.serve.rehearse --workdir=runs/chat      the server itself, of that model

Behind a small proxy, under load: replicas go from 1 to 2 and back by the formula and the numbers of
kubernetes.yaml's autoscaler and what /metrics says; a canary gets 0, 10, then 100 of a hundred
requests; one of two replicas is killed. A cluster's minutes pass --speed times as fast.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import signal
import socket
import subprocess
import sys
import time

import commands
from launch.serve import wire
from launch.serve.autoscale import SYNC, Autoscaler
from launch.serve.proxy import Backend, Proxy

KUBERNETES = pathlib.Path(__file__).parent / 'kubernetes.yaml'
PROBE = 5.0  # seconds between two looks at /health
REPLICAS = 2  # at most, on one machine
STAGES = (0, 10, 100)  # weights of a canary, in hundredths
FINISHED = 'tandem_request_success_total'


class Failed(Exception):
  """What was to hold does not."""


@dataclasses.dataclass
class Heard:
  """What came of a request. outcome: 'done', 'refused' (429) or what went wrong. replica: that
  answered; ''.
  """

  outcome: str
  replica: str = ''
  events: int = 0


class Replica:
  """A server, as a process. Attributes: backend: as the proxy knows it."""

  def __init__(self, name: str, version: str, options: argparse.Namespace):
    with socket.socket() as opened:
      opened.bind((wire.HOST, 0))
      port = opened.getsockname()[1]
    self.backend = Backend(name, version, port)
    command = [sys.executable, '-m', 'launch.serve.standin']
    if options.workdir:
      command = [sys.executable, 'serve.py', f'--workdir={options.workdir}']
      command += [*options.flag, f'--drain_seconds={options.patience}']
    command += [f'--port={port}', f'--rows={options.rows}']
    self._log = open(options.log, 'ab')
    self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

  def send(self, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
      self.process.send_signal(number)

  async def ended(self, seconds: float) -> int:
    """Its exit code. Raises Failed."""
    ends = time.monotonic() + seconds
    while (code := self.process.poll()) is None:
      if time.monotonic() > ends:
        raise Failed(f'{self.backend.name} had not ended {seconds:.0f} s after it was told to')
      await asyncio.sleep(0.02)
    self._log.close()
    return code

  async def metric(self, name: str) -> float:
    """The sum of a metric's series. Raises Failed where it has none, or gives no answer."""
    status, text = await wire.get(self.backend.port, '/metrics')
    lines = [line for line in text.splitlines() if line.split('{')[0].split(' ')[0] == name]
    if status != 200 or not (lines or name == FINISHED):
      raise Failed(f'{self.backend.name}: /metrics says {status}, and nothing of {name}')
    return sum(float(line.rsplit(' ', 1)[1]) for line in lines)


class Cluster:
  """Replicas behind a proxy.

  Attributes: replicas: that are there, or end. proxy. results: of all requests.
  """

  def __init__(self, options: argparse.Namespace):
    self._options = options
    self.proxy = Proxy()
    self.replicas: list[Replica] = []
    self.results: list[Heard] = []
    self._names = itertools.count(1)
    self._began = time.monotonic()

  def say(self, text: str) -> None:
    print(f'{time.monotonic() - self._began:7.1f} s  {text}', flush=True)

  def scaled(self, seconds: float) -> float:
    """A cluster's seconds, in this machine's."""
    return seconds / self._options.speed

  async def watch(self) -> None:
    """Readiness, as kubelets look at it."""
    while True:
      for each in list(self.replicas):
        status, _ = await wire.get(each.backend.port, '/health')
        each.backend.ready = status == 200 and each.backend in self.proxy.backends
      await asyncio.sleep(self.scaled(PROBE))

  async def add(self, version: str = 'stable') -> Replica:
    """One more; waits until it is ready."""
    replica = Replica(f'{version}-{next(self._names)}', version, self._options)
    self.replicas.append(replica)
    self.proxy.backends.append(replica.backend)
    ends = time.monotonic() + self._options.patience
    while not replica.backend.ready:
      if replica.process.poll() is not None or time.monotonic() > ends:
        raise Failed(f'{replica.backend.name} did not become ready; see {self._options.log}')
      await asyncio.sleep(0.05)
    self.say(f'{replica.backend.name} is ready')
    return replica

  async def remove(self, replica: Replica) -> None:
    """As a pod ends: no new requests, preStop, SIGTERM, and what it has is finished."""
    self.proxy.backends.remove(replica.backend)
    running = len(replica.backend.running)
    await asyncio.sleep(self.scaled(10))
    replica.send(signal.SIGTERM)
    code = await replica.ended(self._options.patience)
    self.replicas.remove(replica)
    self.say(f'{replica.backend.name} has ended with code {code}, and {running} requests then')
    check(code == 0, f'{replica.backend.name} drains, and ends with 0')

  async def ask(self) -> Heard:
    """One request, to its end. Raises Failed where it is one that a replica cannot take."""
    body = {'messages': [{'role': 'user', 'content': 'Count!'}], 'stream': True}
    body |= {'max_tokens': self._options.tokens, 'ignore_eos': True, 'temperature': 0}
    body |= json.loads(self._options.body)
    sent = wire.request(
      'POST',
      '/v1/chat/completions',
      json.dumps(body).encode(),
      content_type='application/json',
    )
    result = Heard('no answer')
    try:
      async with wire.asked(self.proxy.port, sent) as (status, headers, pieces):
        result.replica = headers.get('x-replica', '')
        if 400 <= status < 500 and status != 429:
          said = b''.join([piece async for piece in pieces]).decode(errors='replace')
          raise Failed(f'{result.replica} takes no such request; see --body: {said[:300]}')
        if status != 200:
          result.outcome = 'refused' if status == 429 else f'error {status}'
        else:
          result.outcome = 'no end'
          async for data in wire.events(pieces):
            result.events += 1
            if data == '[DONE]':
              result.outcome = 'done'
            elif 'error' in json.loads(data):
              result.outcome = 'error in the stream'
    except wire.Broken:
      result.outcome = 'broken off' if result.outcome != 'done' else 'done'
    self.results.append(result)
    return result

  @contextlib.asynccontextmanager
  async def load(self, clients: int):
    """A block in which so many clients ask, one request after the other; it ends when they have
    their last answers. Raises Failed as soon as one of them does.
    """
    over = asyncio.Event()

    async def client():
      while not over.is_set():
        result = await self.ask()
        if result.outcome == 'refused':
          await asyncio.sleep(0.2)

    try:
      async with asyncio.TaskGroup() as group:
        for _ in range(clients):
          group.create_task(client())
        try:
          yield
        finally:
          over.set()
    except* Failed as failures:
      raise failures.exceptions[0] from None

  async def close(self) -> None:
    for replica in self.replicas:
      replica.send(signal.SIGKILL)
      await replica.ended(30)
    await self.proxy.close()


def check(truth: bool, claim: str) -> None:
  if not truth:
    raise Failed(f'not so: {claim}')


def counted(results: list[Heard]) -> str:
  outcomes = collections.Counter(each.outcome for each in results)
  return ', '.join(f'{count} {outcome}' for outcome, count in sorted(outcomes.items())) or 'none'


def check_none_lost(results: list[Heard]) -> None:
  check(bool(results), 'there were requests')
  lost = [each for each in results if each.outcome not in ('done', 'refused')]
  check(not lost, f'no accepted request is lost ({counted(results)})')


def autoscaler_of(text: str) -> Autoscaler:
  """The one that a file describes, for one machine."""
  import yaml

  documents = yaml.safe_load_all(text)
  [document] = [each for each in documents if each['kind'] == 'HorizontalPodAutoscaler']
  document['spec']['maxReplicas'] = REPLICAS
  return Autoscaler(document)


async def autoscale(cluster: Cluster, autoscaler: Autoscaler, speed: float) -> None:
  """Looks, and adds or removes a replica, for ever."""
  said = 0, 0
  while True:
    await asyncio.sleep(cluster.scaled(SYNC))
    ready = [each for each in cluster.replicas if each.backend.ready]
    check(bool(ready), 'a replica is ready, of which the autoscaler asks')
    means = {
      name: sum([await each.metric(name) for each in ready]) / len(ready)
      for name in autoscaler.targets
    }
    wanted = autoscaler.desired(len(ready), means, time.monotonic() * speed)
    formula = autoscaler.formula(len(ready), means)
    if (formula, wanted) != said:
      said = formula, wanted
      seen = ', '.join(f'{mean:.1f} {name.rpartition("_")[2]}' for name, mean in means.items())
      cluster.say(
        f'{seen} at each of {len(ready)}: the formula says {formula}, and with its windows {wanted}'
      )
    if wanted > len(ready):
      await cluster.add()
    elif wanted < len(ready):
      await cluster.remove(cluster.replicas[-1])


async def scale(cluster: Cluster, options: argparse.Namespace) -> list:
  """1 -> 2 -> 1, by the autoscaler's document."""
  autoscaler = autoscaler_of(KUBERNETES.read_text())
  cluster.proxy.weights = {'stable': 1}
  before = len(cluster.results)
  await cluster.add()
  scaling = asyncio.create_task(autoscale(cluster, autoscaler, options.speed))

  async def until(truth, what: str) -> None:
    ends = time.monotonic() + options.patience
    while not truth():
      if scaling.done():
        scaling.result()
      check(time.monotonic() < ends, f'{what}, in {options.patience:.0f} s')
      await asyncio.sleep(0.02)

  try:
    many = 2 * options.rows + 2 * math.ceil(autoscaler.targets['tandem_num_requests_waiting'])
    cluster.say(f'{many} clients come')
    async with cluster.load(many):
      await until(lambda: len(cluster.proxy.backends) == 2, 'load brings a second replica')
      second = cluster.replicas[-1].backend
      await until(lambda: second.taken > len(second.running), 'which answers, too')
    cluster.say('2 of them stay')
    async with cluster.load(2):
      await until(lambda: len(cluster.replicas) == 1, 'the end of the load takes it away')
  finally:
    scaling.cancel()
  results = cluster.results[before:]
  check_none_lost(results)
  return ['1 -> 2 -> 1 replicas', len(results), counted(results)]


async def canary(cluster: Cluster, options: argparse.Namespace) -> list:
  """0, 10, 100% to another version."""
  new = await cluster.add('canary')
  before = len(cluster.results)
  shares = []
  for weight in STAGES:
    cluster.proxy.weights = {'stable': 100 - weight, 'canary': weight}
    answered, finished = new.backend.taken, await new.metric(FINISHED)
    slots = asyncio.Semaphore(options.rows)

    async def one():
      async with slots:
        return await cluster.ask()

    results = await asyncio.gather(*(one() for _ in range(options.requests)))
    share = new.backend.taken - answered
    shares.append(share)
    cluster.say(f'a weight of {weight}%: {share} of {len(results)} requests went to the canary')
    check(share == round(weight / 100 * options.requests), f'{weight}% are {share} requests')
    own = await new.metric(FINISHED) - finished
    check(own == share, f'its own /metrics says so, too ({own:.0f})')
  for old in [each for each in cluster.replicas if each is not new]:
    await cluster.remove(old)
  results = cluster.results[before:]
  check_none_lost(results)
  return [
    f'canary {" -> ".join(f"{weight}%" for weight in STAGES)}',
    len(results),
    counted(results),
  ]


async def kill(cluster: Cluster, options: argparse.Namespace) -> list:
  """One of two is killed, under load."""
  cluster.proxy.weights = {'stable': 1, 'canary': 1}
  [left] = cluster.replicas
  doomed = await cluster.add()
  before = len(cluster.results)
  async with cluster.load(options.rows):
    while not doomed.backend.running or not left.backend.running:
      await asyncio.sleep(0.02)
    running, taken = len(doomed.backend.running), doomed.backend.taken
    doomed.send(signal.SIGKILL)
    cluster.say(f'{doomed.backend.name} is killed, with {running} requests')
    await doomed.ended(30)
    cluster.replicas.remove(doomed)
    cluster.proxy.backends.remove(doomed.backend)
    running += doomed.backend.taken - taken  # while it died
    after = left.backend.taken
    while left.backend.taken < after + options.rows:
      await asyncio.sleep(0.05)
  results = cluster.results[before:]
  failed = [each for each in results if each.outcome not in ('done', 'refused')]
  check(len(failed) <= running, f'{len(failed)} failed, of {running} that the killed one had')
  for each in failed:
    check(each.replica == doomed.backend.name, f'{each.outcome}: of {each.replica}')
  check(bool(failed), 'those in flight are told')
  return ['one of two is killed', len(results), counted(results)]


async def rehearse(options: argparse.Namespace) -> list:
  """Rows of what was seen. Raises Failed."""
  cluster = Cluster(options)
  await cluster.proxy.start()
  watching = asyncio.create_task(cluster.watch())
  try:
    return [await act(cluster, options) for act in (scale, canary, kill)]
  finally:
    watching.cancel()
    await cluster.close()


def parser() -> argparse.ArgumentParser:
  """What the command takes."""
  made = argparse.ArgumentParser(
    prog='python -m launch.serve.rehearse',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = made.add_argument
  add('--workdir', default='', help='of the model that serve.py serves; none: stand-ins')
  add(
    '--flag',
    action='append',
    default=[],
    help='one more of serve.py, such as --flag=--max_model_len=512',
  )
  add('--rows', type=int, default=16, help='of each replica; the autoscaler is set for 16')
  add('--tokens', type=int, default=16, help='of an answer')
  add('--requests', type=int, default=50, help='at each weight of the canary')
  add('--body', default='{}', help='JSON that goes into every request')
  add('--speed', type=float, default=60.0, help="a cluster's seconds in one")
  add('--patience', type=float, default=120.0, help='seconds that anything may take')
  add('--log', default='rehearsal.log', help='what the replicas print')
  return made


def main() -> None:
  options = parser().parse_args()
  with commands.mendable(Failed):
    if not 0 < options.speed or not 0 < options.rows or not 0 < options.requests:
      given = f'--speed={options.speed} --rows={options.rows} --requests={options.requests}'
      raise ValueError(f'{given} must be positive')
    rows = asyncio.run(rehearse(options))
  commands.table(
    'No accepted request was lost, but those of the killed one', ['', 'requests', ''], rows
  )


if __name__ == '__main__':
  commands.end(main)
