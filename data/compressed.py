"""How is a compressed file read as if it were not?"""

import bz2
import functools
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Iterable
from types import ModuleType
from typing import BinaryIO

import files

SUFFIXES = ('.gz', '.bz2', '.xz', '.zst')
READ = 2**14  # bytes of a packed file at a time: what they unpack to is in memory


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
    return _of_frames(files.stream(path))
  return files.stream(path)


def _of_frames(file: BinaryIO) -> BinaryIO:
  """Zstandard frames, decompressed."""
  library = _zstandard()
  if hasattr(library, 'ZstdFile'):
    return library.open(file, 'rb')
  return io.BufferedReader(_Frames(file, library.ZstdDecompressor()), READ)


class _Frames(io.RawIOBase):
  """What the frames of a file hold, one after the other. The package zstandard's own reader gives
  no lines, and takes a file that is cut off for one that ends.
  """

  def __init__(self, file: BinaryIO, decompressor):
    self._file, self._decompressor = file, decompressor
    self._frame = None  # where one has begun
    self._packed, self._ready = b'', memoryview(b'')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._ready:
      self._packed = self._packed or self._file.read(READ)
      if not self._packed and self._frame is None:
        return 0
      if not self._packed:
        raise EOFError('the file ends within a frame')
      self._frame = self._frame or self._decompressor.decompressobj()
      self._ready = memoryview(self._frame.decompress(self._packed))
      self._packed = self._frame.unused_data if self._frame.eof else b''
      self._frame = None if self._frame.eof else self._frame
    given = self._ready[: len(buffer)]
    buffer[: len(given)] = given
    self._ready = self._ready[len(given) :]
    return len(given)

  def close(self) -> None:
    self._file.close()
    super().close()


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
