"""What only files can do: how does it come from a bucket, and how is it sent there?"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator

from remote.address import Address
from remote.lease import locked

SEND_SECONDS = 60  # between two times that a directory's files are sent


def here(place: Address) -> pathlib.Path:
  """A copy of all that lies there, on this machine, for who reads files; made anew where what lies
  there has changed.
  """
  found = place.found() or ({place: place.stat()} if place.is_file() else {})
  told = json.dumps([[str(each), *stat] for each, stat in found.items()])
  copy = kept(place) / hashlib.sha256(told.encode()).hexdigest()[:16]
  if not copy.exists():
    partial = pathlib.Path(tempfile.mkdtemp(dir=kept(place)))
    bring(place, partial / place.name, found)
    with contextlib.suppress(OSError):  # another process was first
      partial.rename(copy)
    shutil.rmtree(partial, ignore_errors=True)
  return copy / place.name


def bring(place: Address, to: pathlib.Path, found: Iterable[Address]) -> None:
  """Copies objects below a place, or the one there, to where a directory, or a file, is to be."""
  for each in found:
    path = to if each == place else to / each.relative_to(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    with each.stream() as source, open(path, 'wb') as file:
      shutil.copyfileobj(source, file, 2**22)


@contextlib.contextmanager
def worked_on(place: Address) -> Iterator[pathlib.Path]:
  """A block with a directory of this machine that holds what lies there; what changes in it is
  sent, every minute and at the end. The place is this process's meanwhile, as remote.lease has it.
  """
  with locked(place / 'lock', str(place), 'wait until it ends, or give another place'):
    staging = Staging(place)
    bring(place, staging.directory, found := [x for x in place.found() if x.name != 'lock'])
    staging.known(found)
    ended = threading.Event()

    def send():
      while not ended.wait(SEND_SECONDS):
        with contextlib.suppress(OSError):  # the last one says it
          staging.send()

    sending = threading.Thread(target=send, daemon=True)
    sending.start()
    try:
      yield staging.directory
    finally:
      ended.set()
      sending.join()
      staging.send()
      print(f'sent to {place} what was written to {staging.directory}')


def kept(place: Address) -> pathlib.Path:
  """The directory of this machine for what is kept of a place."""
  root = os.environ.get('TANDEM_CACHE') or pathlib.Path('~/.cache/tandem').expanduser()
  directory = pathlib.Path(root) / place.scheme / place.path
  directory.mkdir(parents=True, exist_ok=True)
  return directory


class Staging:
  """A directory of this machine, whose files are sent to a place."""

  def __init__(self, place: Address):
    self._place, self._last = place, 0.0
    self._sent: dict[pathlib.Path, tuple[int, int]] = {}
    self._holder = tempfile.TemporaryDirectory(prefix='tandem-')
    self.directory = pathlib.Path(self._holder.name)

  def known(self, found: Iterable[Address]) -> None:
    """What was brought need not be sent."""
    for each in found:
      path = self.directory / each.relative_to(self._place)
      self._sent[path] = _version(path)

  def send(self, seconds: float = 0) -> None:
    """What has changed since it was sent, if that is so many seconds ago; JSON, which seals other
    files, last.
    """
    if time.monotonic() < self._last + seconds:
      return
    self._last = time.monotonic()
    paths = [path for path in self.directory.rglob('*') if path.is_file()]
    for path in sorted(paths, key=lambda path: (path.suffix == '.json', path)):
      own = path.suffix == '.tmp' or path.name == 'lock'
      if not own and self._sent.get(path) != (version := _version(path)):
        (self._place / path.relative_to(self.directory)).send(path)
        self._sent[path] = version


def _version(path: pathlib.Path) -> tuple[int, int]:
  status = path.stat()
  return status.st_size, status.st_mtime_ns


def kvstore(place: Address | pathlib.Path) -> dict:
  """Where TensorStore reads and writes, with the endpoint that fsspec has."""
  if not isinstance(place, Address):
    return {'driver': 'file', 'path': f'{place}/'}
  if place.scheme == 'gs':
    if emulator := os.environ.get('STORAGE_EMULATOR_HOST'):  # gcsfs's name for it
      os.environ.setdefault('TENSORSTORE_GCS_HTTP_URL', emulator)
    return {'driver': 'gcs', 'bucket': place.bucket, 'path': f'{place.key}/'}
  spec = {'driver': 's3', 'bucket': place.bucket, 'path': f'{place.key}/'}
  if 'AWS_ACCESS_KEY_ID' in os.environ:  # nothing else is looked for, and complained of
    spec['aws_credentials'] = {'type': 'environment'}
  endpoint = os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL')
  if endpoint:
    region = os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION') or 'us-east-1'
    spec |= {'endpoint': endpoint, 'aws_region': region}
  return spec
