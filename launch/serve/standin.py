"""What stands for a server in a rehearsal without a model? A process that keeps its contract:
/health, /metrics, streamed answers to /v1/chat/completions, rows and a queue, SIGTERM.

    python -m launch.serve.standin --port=8001 --rows=16
"""

import argparse
import asyncio
import contextlib
import json
import signal

from launch.serve import wire

STEP = 0.05  # seconds between two events of an answer


class Standin:
  """Attributes: running, waiting: requests. done: how many had an answer. draining: whether it
  takes no more. opened: connections.
  """

  def __init__(self, rows: int, queue: int):
    self._rows, self._queue = rows, queue
    self.running = self.waiting = self.done = 0
    self.opened = 0
    self.draining = False
    self._free = asyncio.Semaphore(rows)

  async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    self.opened += 1
    with contextlib.suppress(wire.Broken, OSError):
      first, headers = await wire.read_head(reader)
      body = b''.join([piece async for piece in wire.read_body(reader, headers)])
      _, path, _ = first.split()
      if path == '/v1/chat/completions':
        await self._chat(json.loads(body), writer)
      elif path == '/health':
        status = '503 Service Unavailable' if self.draining else '200 OK'
        writer.write(wire.answer(status, b'{}', content_type='application/json'))
      elif path == '/metrics':
        writer.write(wire.answer('200 OK', self.metrics().encode(), content_type='text/plain'))
      else:
        writer.write(wire.error('404 Not Found', f'no {path}'))
    await wire.closed(writer)
    self.opened -= 1

  def metrics(self) -> str:
    label = '{model_name="standin"}'
    ended = '{finished_reason="stop",model_name="standin"}'
    return (
      f'# TYPE tandem_num_requests_running gauge\ntandem_num_requests_running{label} '
      f'{self.running}\n# TYPE tandem_num_requests_waiting gauge\ntandem_num_requests_waiting'
      f'{label} {self.waiting}\n# TYPE tandem_request_success counter\n'
      f'tandem_request_success_total{ended} {self.done}\n'
    )

  async def _chat(self, asked: dict, writer: asyncio.StreamWriter) -> None:
    if self.draining:
      writer.write(wire.error('503 Service Unavailable', 'the server is draining'))
      return
    if self.waiting >= self._queue:
      writer.write(wire.error('429 Too Many Requests', 'the queue is full', retry_after='1'))
      return
    self.waiting += 1
    async with self._free:
      self.waiting -= 1
      self.running += 1
      try:
        await self._write(asked.get('max_tokens', 16), writer)
        self.done += 1
      finally:
        self.running -= 1

  async def _write(self, count: int, writer: asyncio.StreamWriter) -> None:
    kind = {'content-type': 'text/event-stream', 'transfer-encoding': 'chunked'}
    writer.write(wire.head('HTTP/1.1 200 OK', kind | {'connection': 'close'}))
    for i in range(count):
      end = 'stop' if i == count - 1 else None
      choice = {'index': 0, 'delta': {'content': f'{i} '}, 'finish_reason': end}
      said = f'data: {json.dumps({"choices": [choice]})}\n\n'
      said += 'data: [DONE]\n\n' if end else ''
      writer.write(b'%x\r\n%b\r\n' % (len(said), said.encode()))
      await writer.drain()
      await asyncio.sleep(STEP)
    writer.write(b'0\r\n\r\n')
    await writer.drain()


async def serve(options: argparse.Namespace) -> None:
  """Until SIGTERM, and then what was taken is finished."""
  standin = Standin(options.rows, options.waiting)
  server = await asyncio.start_server(standin.handle, wire.HOST, options.port, limit=wire.HEAD)
  told = asyncio.Event()
  asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
  await told.wait()
  standin.draining = True
  while standin.running or standin.waiting:
    await asyncio.sleep(STEP)
  server.close()
  await asyncio.sleep(STEP)  # who came last is heard
  while standin.opened:
    await asyncio.sleep(STEP)


def main() -> None:
  made = argparse.ArgumentParser(description=__doc__)
  made.add_argument('--port', type=int, required=True)
  made.add_argument('--rows', type=int, default=16, help='requests that run at a time')
  made.add_argument('--waiting', type=int, default=256, help='that may wait')
  asyncio.run(serve(made.parse_args()))


if __name__ == '__main__':
  main()
