"""How is a compressed file read as if it were not?"""

import bz2
import functools
import gzip
import importlib
import lzma
import zlib
from collections.abc import Iterable
from types import ModuleType
from typing import BinaryIO

import files

SUFFIXES = ('.gz', '.bz2', '.xz', '.zst')


def opened(path: str) -> BinaryIO:
  """A file as it is, or decompressed by what its name ends in: .gz, .bz2, .xz or .zst."""
  if path.endswith('.gz'):
    return gzip.open(files.stream(path))
  if path.endswith('.bz2'):
    return bz2.open(files.stream(path))
  if path.endswith('.xz'):
    return lzma.open(files.stream(path))
  if path.endswith('.zst'):
    check([path])
    return _zstandard().open(files.stream(path), 'rb')
  return files.stream(path)


def check(paths: Iterable[str]) -> None:
  """Raises ValueError where a file can't be read for want of a library, before any is."""
  for path in paths:
    if path.endswith('.zst') and _zstandard() is None:
      raise ValueError(
        f'{path} needs a library for Zstandard: pip install zstandard (Python 3.14 has one of its '
        'own), or unpack it by zstd -d'
      )


def damaged() -> tuple[type[Exception], ...]:
  """What reading raises where a file can't be read on: each format has its own."""
  library = _zstandard()
  own = (library.ZstdError,) if library else ()
  return OSError, EOFError, zlib.error, lzma.LZMAError, *own


@functools.cache
def _zstandard() -> ModuleType | None:
  for name in ('compression.zstd', 'zstandard'):
    try:
      return importlib.import_module(name)
    except ImportError:
      pass
  return None
