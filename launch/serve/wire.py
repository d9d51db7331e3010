"""How do HTTP/1.1's bytes go to and fro? As little of it as a rehearsal needs: one request a
connection, heads that fit into memory, bodies as they come.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

HOST = '127.0.0.1'
HEAD = 65536  # bytes, at most


class Broken(Exception):
  """The other side went away before all of it had come."""


class Absent(Broken):
  """Nobody listens there."""


async def read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]]:
  """The first line and the headers, their names in lower case. Raises Broken."""
  try:
    text = (await reader.readuntil(b'\r\n\r\n')).decode('latin-1')
  except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError) as error:
    raise Broken('there is no head') from error
  first, *lines = text.split('\r\n')[:-2]
  headers = dict(line.split(':', 1) for line in lines)
  return first, {name.strip().lower(): value.strip() for name, value in headers.items()}


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
  """The pieces of a body. Raises Broken where it ends before its end."""
  try:
    if headers.get('transfer-encoding', '').lower() == 'chunked':
      while size := int(await reader.readuntil(b'\r\n'), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
      await reader.readuntil(b'\r\n')
    elif length := int(headers.get('content-length', 0)):
      yield await reader.readexactly(length)
  except (asyncio.IncompleteReadError, OSError, ValueError) as error:
    raise Broken('the connection broke off') from error


def head(first: str, headers: dict[str, str]) -> bytes:
  lines = ''.join(f'{name}: {value}\r\n' for name, value in headers.items())
  return f'{first}\r\n{lines}\r\n'.encode('latin-1')


def answer(status: str, body: bytes, **headers: str) -> bytes:
  """A whole answer."""
  named = {name.replace('_', '-'): value for name, value in headers.items()}
  length = {'content-length': str(len(body)), 'connection': 'close'}
  return head(f'HTTP/1.1 {status}', named | length) + body


def error(status: str, message: str, **headers: str) -> bytes:
  """An answer that refuses, in OpenAI's form."""
  kind = status.split(' ', 1)[1]
  body = json.dumps({'error': {'message': message, 'type': kind, 'param': None, 'code': None}})
  return answer(status, body.encode(), content_type='application/json', **headers)


def request(method: str, path: str, body: bytes = b'', **headers: str) -> bytes:
  named = {name.replace('_', '-'): value for name, value in headers.items()}
  fixed = {'host': HOST, 'connection': 'close', 'content-length': str(len(body))}
  return head(f'{method} {path} HTTP/1.1', fixed | named) + body


@contextlib.asynccontextmanager
async def asked(port: int, sent: bytes):
  """(status, headers, pieces of the body) of what a server on this machine answers. Raises Broken
  where there is no answer.
  """
  try:
    reader, writer = await asyncio.open_connection(HOST, port, limit=HEAD)
  except OSError as failure:
    raise Absent(f'nobody listens at {port}') from failure
  try:
    writer.write(sent)
    first, headers = await read_head(reader)
    yield int(first.split()[1]), headers, read_body(reader, headers)
  finally:
    await closed(writer)


async def get(port: int, path: str, **headers: str) -> tuple[int, str]:
  """Status and body; 0 where there is no answer."""
  try:
    async with asked(port, request('GET', path, **headers)) as (status, _, body):
      return status, b''.join([piece async for piece in body]).decode()
  except Broken:
    return 0, ''


async def closed(writer: asyncio.StreamWriter) -> None:
  writer.close()
  with contextlib.suppress(OSError):
    await writer.wait_closed()


async def events(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
  """The data of server-sent events."""
  pending = b''
  async for piece in pieces:
    *lines, pending = (pending + piece).split(b'\n')
    for line in lines:
      if line.startswith(b'data:'):
        yield line[5:].strip().decode()
