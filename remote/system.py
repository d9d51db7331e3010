"""Who answers for a bucket, how long is waited, and what does a refusal say?"""

import contextlib
import functools
import importlib
import logging
import os
import re
import types
import uuid
from collections.abc import Iterator
from typing import Any

import files

# Scheme -> (what fsspec needs, the extra that brings it).
DRIVERS = {'s3': ('s3fs', 's3'), 'gs': ('gcsfs', 'gcs')}
RETRIES, CONNECT_SECONDS, READ_SECONDS = 6, 5, 30  # of a request


@functools.cache
def of(scheme: str, first: bool = False):
  """fsspec's file system; first: one that gives up within seconds."""
  module, extra = DRIVERS[scheme]
  try:
    importlib.import_module(module)
  except ImportError as error:
    raise ValueError(
      f"{scheme}:// is reached by {module}: pip install 'tandem[{extra}]' ({error})"
    ) from error
  import fsspec

  plain = {'use_listings_cache': False, 'skip_instance_cache': True}
  if scheme == 's3':
    waits = {'connect_timeout': CONNECT_SECONDS, 'read_timeout': READ_SECONDS}
    retries = {'max_attempts': 1 if first else RETRIES, 'mode': 'standard'}
    kept = fsspec.filesystem('s3', config_kwargs={'retries': retries, **waits}, **plain)
    kept.retries = 1  # those of botocore have a backoff, and know what is worth another try
    return kept
  # Not fsspec's choice, which asks a second service of what kind each bucket is.
  kept = importlib.import_module('gcsfs.core').GCSFileSystem(timeout=READ_SECONDS, **plain)
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it prints the trace of what it raises
  if first:  # its five more tries, which it has no setting for, take half a minute
    kept._request = types.MethodType(kept._request.__wrapped__, kept)
  return kept


def forget() -> None:
  """For who changes the environment: it is read again."""
  of.cache_clear()


@contextlib.contextmanager
def answering(place, first: bool = False, writing: bool = False) -> Iterator[Any]:
  """The file system of a place; what it refuses comes as an OSError of one line.

  first: whether to give up within seconds. writing: whether only a bucket can be missing.
  """
  try:
    yield of(place.scheme, first)
  except FileNotFoundError as error:
    if _no_bucket(error) or writing:
      raise FileNotFoundError(
        f'there is no bucket {place.scheme}://{place.bucket}; make it, or correct the name'
      ) from error
    raise FileNotFoundError(f'{place} does not exist') from error
  except (FileExistsError, UnicodeError):
    raise
  except Exception as error:
    raise _unanswered(place, error) from error


class _Refused(files.BucketError, PermissionError):
  pass


def _unanswered(place, error: Exception) -> OSError | ValueError:
  name, said = type(error).__name__, ' '.join(str(error).split())
  if 'pip install' in said:
    return ValueError(said)
  remedy = f'does {_endpoint(place.scheme)} answer, and may this machine ask it?'
  kind: type[OSError] = files.BucketError
  if isinstance(error, PermissionError) or re.search(
    r'Credential|Forbidden|(?i:denied)|\b40[13]\b', f'{name} {said}'
  ):
    kind, remedy = _Refused, _CREDENTIALS[place.scheme]
  return kind(f'{place}: {name}: {said[:300]}; {remedy}')


_CREDENTIALS = {
  's3': 'give credentials that may list, read and write there: AWS_PROFILE, AWS_ACCESS_KEY_ID and '
  "AWS_SECRET_ACCESS_KEY, or the machine's role",
  'gs': 'give credentials that may list, read and write there: GOOGLE_APPLICATION_CREDENTIALS, '
  "gcloud auth application-default login, or the machine's service account",
}


def _endpoint(scheme: str) -> str:
  if scheme == 's3':
    return os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL') or 'S3'
  return os.environ.get('STORAGE_EMULATOR_HOST') or 'Cloud Storage'


def check(place, write: bool) -> None:
  """Raises OSError, within seconds, where there is no such bucket, or it may not be listed or, with
  `write`, written.
  """
  with answering(place, first=True, writing=write) as system:
    listed(system, place.path)
    if write:
      probe = place / f'.writable-{uuid.uuid4().hex[:12]}'
      system.pipe_file(probe.path, b'')
      system.rm_file(probe.path)


def listed(system, path: str) -> list[dict]:
  """What lies directly below; [] where there is nothing."""
  try:
    return system.ls(path, detail=True)
  except FileNotFoundError as error:
    if _no_bucket(error):
      raise
    return []


def _no_bucket(error: FileNotFoundError) -> bool:
  return re.search('bucket (does|doesn)|NoSuchBucket', str(error)) is not None
