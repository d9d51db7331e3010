"""Which replica gets a request? What a Service and a canary's weights do, in one process: versions
by their weights, of a version the replica with the fewest requests, and only those that are ready.
"""

import asyncio
import dataclasses
import itertools

from launch.serve import wire

PATIENCE = 60.0  # seconds that a request waits for a replica, at most


class _NotTaken(Exception):
  """A replica takes no requests: another one may."""


@dataclasses.dataclass(eq=False)
class Backend:
  """Attributes: name, version, port: of a replica. ready: whether it gets requests. running:
  numbers of those that it has. taken: how many it has had.
  """

  name: str
  version: str
  port: int
  ready: bool = False
  running: set[int] = dataclasses.field(default_factory=set)
  taken: int = 0


class Proxy:
  """Attributes: backends. weights: of each version that gets requests. port: its own."""

  def __init__(self):
    self.backends: list[Backend] = []
    self.weights: dict[str, int] = {}
    self.port = 0
    self._credit: dict[str, float] = {}
    self._numbers = itertools.count()

  async def start(self) -> None:
    self._server = await asyncio.start_server(self._handle, wire.HOST, 0, limit=wire.HEAD)
    self.port = self._server.sockets[0].getsockname()[1]

  async def close(self) -> None:
    self._server.close()
    await self._server.wait_closed()

  def choose(self, without: set[Backend]) -> Backend | None:
    """The next one: of every 100 requests a version gets as many as its weight says of all, spread
    evenly.
    """
    able = [each for each in self.backends if each.ready and each not in without]
    weights = {
      version: weight
      for version, weight in self.weights.items()
      if weight and any(each.version == version for each in able)
    }
    if not weights:
      return None
    for version, weight in weights.items():
      self._credit[version] = self._credit.get(version, 0) + weight
    version = max(weights, key=self._credit.__getitem__)
    self._credit[version] -= sum(weights.values())
    of_version = [each for each in able if each.version == version]
    return min(of_version, key=lambda each: len(each.running))

  async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
      first, headers = await wire.read_head(reader)
      body = b''.join([piece async for piece in wire.read_body(reader, headers)])
      method, path, _ = first.split()
      kept = {
        name.replace('-', '_'): value
        for name, value in headers.items()
        if name not in ('host', 'connection', 'content-length', 'transfer-encoding')
      }
      await self._forward(wire.request(method, path, body, **kept), writer)
    except (wire.Broken, OSError):
      pass  # who asked has gone
    finally:
      await wire.closed(writer)

  async def _forward(self, sent: bytes, writer: asyncio.StreamWriter) -> None:
    """To a replica that takes it: what one does not take (it is not there any more, or says 503),
    another may; what one has taken is its own, and breaks off where that one does.
    """
    number, tried, loop = next(self._numbers), set(), asyncio.get_running_loop()
    ends = loop.time() + PATIENCE
    while loop.time() < ends:
      backend = self.choose(tried)
      if backend is None:
        tried = set()
        await asyncio.sleep(0.02)
        continue
      backend.running.add(number)
      backend.taken += 1
      begun = False
      try:
        async with wire.asked(backend.port, sent) as (status, headers, pieces):
          if status == 503:
            raise _NotTaken
          begun = True
          headers |= {'connection': 'close', 'x-replica': backend.name}
          chunked = headers.get('transfer-encoding') == 'chunked'
          writer.write(wire.head(f'HTTP/1.1 {status} -', headers))
          async for piece in pieces:
            writer.write(b'%x\r\n%b\r\n' % (len(piece), piece) if chunked else piece)
            await writer.drain()
          writer.write(b'0\r\n\r\n' if chunked else b'')
        return
      except (_NotTaken, wire.Absent):
        backend.taken -= 1
        tried.add(backend)
      except wire.Broken:
        if begun:
          raise  # and the connection ends before the body does, which who reads sees
        message = f'{backend.name} has gone, with what it had taken; ask again'
        writer.write(wire.error('502 Bad Gateway', message, x_replica=backend.name))
        return
      finally:
        backend.running.discard(number)
    message = f'no replica is ready, after {PATIENCE:.0f} s; come again later'
    writer.write(wire.error('503 Service Unavailable', message, retry_after='5'))
