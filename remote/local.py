"""What only files can do: how does it come from a bucket, and how is it sent there?"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time

from remote.address import Address


def here(place: Address) -> pathlib.Path:
  """A copy of all that lies there, on this machine, for who reads files; made anew where what lies
  there has changed.
  """
  found = place.found() or ({place: place.stat()} if place.is_file() else {})
  told = json.dumps([[str(each), *stat] for each, stat in found.items()])
  copy = kept(place) / hashlib.sha256(told.encode()).hexdigest()[:16]
  if not copy.exists():
    partial = pathlib.Path(tempfile.mkdtemp(dir=kept(place)))
    for each in found:
      to = partial / place.name / (each.relative_to(place) if each != place else '')
      to.parent.mkdir(parents=True, exist_ok=True)
      to.write_bytes(each.read_bytes())
    with contextlib.suppress(OSError):  # another process was first
      partial.rename(copy)
    shutil.rmtree(partial, ignore_errors=True)
  return copy / place.name


def kept(place: Address) -> pathlib.Path:
  """The directory of this machine for what is kept of a place."""
  root = os.environ.get('TANDEM_CACHE') or pathlib.Path('~/.cache/tandem').expanduser()
  directory = pathlib.Path(root) / place.scheme / place.path
  directory.mkdir(parents=True, exist_ok=True)
  return directory


class Staging:
  """A directory of this machine, whose files are sent to a place."""

  def __init__(self, place: Address):
    self._place, self._sent = place, {}
    self._last = 0.0
    self._holder = tempfile.TemporaryDirectory(prefix='tandem-')
    self.directory = pathlib.Path(self._holder.name)

  def send(self, seconds: float = 0) -> None:
    """What has changed since it was sent, if that is so many seconds ago."""
    if time.monotonic() < self._last + seconds:
      return
    self._last = time.monotonic()
    for path in sorted(self.directory.rglob('*')):
      if path.is_file() and self._sent.get(path) != (size := path.stat().st_size):
        (self._place / str(path.relative_to(self.directory))).write_bytes(path.read_bytes())
        self._sent[path] = size


def kvstore(place: Address) -> dict:
  """Where TensorStore reads and writes, with the endpoint that fsspec has."""
  if place.scheme == 'gs':
    return {'driver': 'gcs', 'bucket': place.bucket, 'path': f'{place.key}/'}
  spec = {'driver': 's3', 'bucket': place.bucket, 'path': f'{place.key}/'}
  if 'AWS_ACCESS_KEY_ID' in os.environ:  # nothing else is looked for, and complained of
    spec['aws_credentials'] = {'type': 'environment'}
  endpoint = os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL')
  if endpoint:
    region = os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION') or 'us-east-1'
    spec |= {'endpoint': endpoint, 'aws_region': region}
  return spec
