"""How is a bucket written and read as if it were a directory, as far as it can be?

An `Address` (s3://bucket/key, gs://bucket/key) answers what the house asks of a pathlib.Path. It is
no os.PathLike for libraries: whoever would open it as a file is refused by name. Small objects go
through fsspec (s3fs, gcsfs), arrays through TensorStore's drivers (workdir/arrays.py).

A bucket has no rename and no append. An object appears whole or not at all, which is what
`files.replace` asks for; a file that grows is one object that is written anew until it has
PART_BYTES, and then the next part, whose name tells of what it goes on.
"""

import base64
import datetime
import fnmatch
import hashlib
import io
import pathlib
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from remote import lease
from remote.system import answering, listed

PART_BYTES = 2**18  # what a line more writes anew, at most
BLOCK_BYTES = 2**23  # read ahead of a stream
LINES_BYTES = 2**20  # of those, where lines are looked for, which fsspec does ten times slower
GROWING = '.jsonl'  # what the name of a file that grows ends in: of others, no parts are looked for
_ADDRESS = re.compile(r'(s3|gs)://?([^/]+)/*(.*)', re.DOTALL)


class Stat(NamedTuple):
  """What is known of an object; tag: changes with its content."""

  st_size: int
  st_mtime: float
  tag: str


class Address:
  """The place of an object, or of all whose keys begin with its own and '/'."""

  def __init__(self, text: str):
    parsed = _ADDRESS.fullmatch(text)
    if not parsed:
      raise ValueError(
        f'{text!r} names no bucket; give s3://BUCKET/DIRECTORY or gs://BUCKET/DIRECTORY'
      )
    self.scheme, self.bucket, key = parsed.groups()
    self.key = '/'.join(part for part in key.split('/') if part)
    if '..' in self.key.split('/') or '.' in self.key.split('/'):
      raise ValueError(f'{text!r}: keys of a bucket have no . and no ..; write it out')

  def __str__(self) -> str:
    return f'{self.scheme}://{self.path}'

  def __repr__(self) -> str:
    return f'Address({str(self)!r})'

  def __fspath__(self) -> str:
    raise ValueError(
      f'{self} is in a bucket, and what was asked for reads or writes files; copy it to a '
      'directory, or mount the bucket as one (gcsfuse, mount-s3), and give that'
    )

  def __eq__(self, other) -> bool:
    return isinstance(other, Address) and str(self) == str(other)

  def __hash__(self) -> int:
    return hash(str(self))

  def __lt__(self, other: 'Address') -> bool:
    return str(self) < str(other)

  # What a path is, by its text.

  @property
  def path(self) -> str:
    """As fsspec has it: without the scheme."""
    return f'{self.bucket}/{self.key}' if self.key else self.bucket

  @property
  def _pure(self) -> pathlib.PurePosixPath:
    return pathlib.PurePosixPath(self.key)

  name = property(lambda self: self._pure.name or self.bucket)
  stem = property(lambda self: self._pure.stem)
  suffix = property(lambda self: self._pure.suffix)

  @property
  def parent(self) -> 'Address':
    above = str(self._pure.parent)
    return self._at('' if above == '.' else above)

  def _at(self, key: str) -> 'Address':
    return Address(f'{self.scheme}://{self.bucket}/{key}')

  def __truediv__(self, name) -> 'Address':
    return self._at(f'{self.key}/{name}')

  def with_name(self, name: str) -> 'Address':
    return self._at(str(self._pure.with_name(name)))

  def with_suffix(self, suffix: str) -> 'Address':
    return self._at(str(self._pure.with_suffix(suffix)))

  def relative_to(self, other: 'Address') -> pathlib.PurePosixPath:
    return self._pure.relative_to(other._pure)

  def absolute(self) -> 'Address':
    return self

  resolve = expanduser = absolute

  # What is there.

  def stat(self) -> Stat:
    with answering(self) as system:
      return _stat(system.info(self.path))

  def exists(self) -> bool:
    return self.is_file() or self.is_dir()

  def is_file(self) -> bool:
    with answering(self) as system:
      return bool(self.key) and system.isfile(self.path)

  def is_dir(self) -> bool:
    with answering(self) as system:
      return any(entry['name'].strip('/') != self.path for entry in listed(system, self.path))

  def found(self) -> 'dict[Address, Stat]':
    """All objects below, by one listing."""
    with answering(self) as system:
      entries = system.find(self.path + '/', detail=True)
    return {
      Address(f'{self.scheme}://{name}'): _stat(entry)
      for name, entry in sorted(entries.items())
      if not name.endswith('/')
    }

  def iterdir(self) -> 'Iterator[Address]':
    with answering(self) as system:
      names = {entry['name'].strip('/') for entry in listed(system, self.path)} - {self.path}
    return iter(sorted(Address(f'{self.scheme}://{name}') for name in names))

  def glob(self, pattern: str) -> 'list[Address]':
    """Of one level, as '*.json'."""
    return [place for place in self.iterdir() if fnmatch.fnmatchcase(place.name, pattern)]

  def matching(self) -> 'list[Address]':
    """Objects whose keys this one's, with * ? [] and **, matches; none behind a dot's name."""
    with answering(self) as system:
      entries = system.glob(self.path, detail=True)
    places = [
      Address(f'{self.scheme}://{name}')
      for name, entry in sorted(entries.items())
      if entry['type'] == 'file'
    ]
    return [place for place in places if not any(p.startswith('.') for p in place._pure.parts)]

  def rglob(self, pattern: str) -> 'list[Address]':
    return [place for place in self.found() if fnmatch.fnmatchcase(place.name, pattern)]

  # Reading.

  def read_bytes(self) -> bytes:
    """The whole object; of a file that grew, with all its parts."""
    with answering(self) as system:
      content = system.cat_file(self.path)
    if self.suffix == GROWING:
      for _, part in _parts(self, content):
        content += part
    return content

  def stream(self) -> BinaryIO:
    """The object from its beginning, by ranges and ahead: BLOCK_BYTES are in memory."""
    with answering(self) as system:
      file = system.open(self.path, 'rb', block_size=BLOCK_BYTES, cache_type='readahead')
    return io.BufferedReader(_Answered(self, file), LINES_BYTES)

  def read_text(self, encoding: str = 'utf-8') -> str:
    return self.read_bytes().decode(encoding)

  def open(self, mode: str = 'r'):
    """To read, by ranges and ahead; to append, in parts; to write whole, when it is closed."""
    if mode in ('a', 'ab'):
      return Growing(self, binary='b' in mode)
    if mode in ('w', 'wb'):
      return _Written(self, binary='b' in mode)
    if mode not in ('r', 'rb'):
      raise ValueError(f'{self} cannot be opened as {mode!r}: objects are written whole')
    file = io.BytesIO(self.read_bytes()) if self.suffix == GROWING else self.stream()
    return file if 'b' in mode else io.TextIOWrapper(file, encoding='utf-8')

  # Writing. A holder of a lock that was lost to another process writes nothing more.

  def write_bytes(self, content: bytes) -> None:
    """The object is then this one, whole, or, where that fails, as it was."""
    lease.check_held(self)
    with answering(self) as system:
      system.pipe_file(self.path, content)
    if self.suffix == GROWING:  # parts of what was here are of nothing any more
      for part in _part_names(self):
        part.unlink(missing_ok=True)

  def send(self, path: pathlib.Path) -> None:
    """The object is then what a file holds."""
    lease.check_held(self)
    with answering(self) as system:
      system.put_file(str(path), self.path)

  def write_text(self, text: str) -> None:
    self.write_bytes(text.encode())

  def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
    """Nothing: keys need no directories."""

  def rename(self, target: 'Address') -> 'Address':
    """By a copy, of one object: a reader may see both."""
    target.write_bytes(self.read_bytes())
    self.unlink()
    return target

  def unlink(self, missing_ok: bool = False) -> None:
    lease.check_held(self)
    try:
      with answering(self) as system:
        system.rm_file(self.path)
    except FileNotFoundError:
      if not missing_ok:
        raise

  def remove(self) -> None:
    """All objects below, and the one here."""
    lease.check_held(self)
    names = [place.path for place in self.found()]
    if names:
      with answering(self) as system:
        system.rm(names)
    self.unlink(missing_ok=True)


def _stat(entry: dict) -> Stat:
  changed = entry.get('LastModified') or entry.get('mtime') or entry.get('updated') or 0
  if isinstance(changed, str):
    changed = datetime.datetime.fromisoformat(changed)
  if isinstance(changed, datetime.datetime):
    changed = changed.timestamp()
  tag = entry.get('ETag') or entry.get('crc32c') or entry.get('etag') or ''
  if 'md5Hash' in entry:  # as S3 has it
    tag = base64.b64decode(entry['md5Hash']).hex()
  return Stat(int(entry.get('size') or 0), float(changed), str(tag).strip('"'))


# Growing files.


class Growing(io.RawIOBase):
  """A file that is appended to; what was written is in the bucket when `flush` returns.

  The first part is the object of that name. It, and each one behind it, is written anew until it
  has PART_BYTES; then another is begun, named by a digest of the first and by where it begins, so
  that parts left behind by a file that was replaced belong to nothing.
  """

  def __init__(self, place: Address, binary: bool):
    super().__init__()
    if place.suffix != GROWING:
      raise ValueError(f'{place} cannot be appended to: in a bucket, only *{GROWING} files grow')
    self._place, self._binary = place, binary
    try:
      with answering(place) as system:
        self._base = system.cat_file(place.path)
    except FileNotFoundError:
      self._base = b''
    parts = _parts(place, self._base)
    self._length = len(self._base) + sum(len(part) for _, part in parts)
    self._at, self._tail = parts[-1] if parts else (place, self._base)
    self._kept = True
    self._turn()

  def write(self, content) -> int:
    self._tail += content if self._binary else content.encode()
    self._length += len(content if self._binary else content.encode())
    self._kept = False
    return len(content)

  def writelines(self, lines) -> None:
    self.write((b'' if self._binary else '').join(lines))

  def flush(self) -> None:
    if self.closed or self._kept:
      return
    lease.check_held(self._place)
    with answering(self._at) as system:
      system.pipe_file(self._at.path, self._tail)
    self._kept = True
    if self._at == self._place:
      self._base = self._tail
    self._turn()

  def _turn(self) -> None:
    if len(self._tail) >= PART_BYTES:
      self._at, self._tail = _part(self._place, self._base, self._length), b''

  def close(self) -> None:
    if not self.closed:
      self.flush()
    super().close()


class _Answered(io.RawIOBase):
  """A file of fsspec's; what the bucket refuses while it is read comes as from `answering`."""

  def __init__(self, place: Address, file: BinaryIO):
    super().__init__()
    self._place, self._file = place, file

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    with answering(self._place):
      return self._file.readinto(buffer)

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    return self._file.seek(offset, whence)

  def tell(self) -> int:
    return self._file.tell()

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


class _Written(io.BytesIO):
  """Becomes an object when it is closed without an error."""

  def __init__(self, place: Address, binary: bool):
    super().__init__()
    self._place, self._binary = place, binary

  def write(self, content) -> int:
    return super().write(content if self._binary else content.encode())

  def __exit__(self, kind, error, trace) -> None:
    if kind is None:
      self._place.write_bytes(self.getvalue())
    super().close()


def _part(place: Address, base: bytes, at: int) -> Address:
  return place.with_name(f'{place.name}.{hashlib.sha256(base).hexdigest()[:12]}.{at:015d}')


def _part_names(place: Address) -> list[Address]:
  form = re.compile(re.escape(place.name) + r'\.[0-9a-f]{12}\.\d{15}')
  return [other for other in place.parent.iterdir() if form.fullmatch(other.name)]


def _parts(place: Address, base: bytes) -> list[tuple[Address, bytes]]:
  """Of a file that begins with `base`, those behind it, in order, as far as one follows another."""
  if len(base) < PART_BYTES:
    return []
  parts, at = [], len(base)
  names = set(_part_names(place))
  while (name := _part(place, base, at)) in names:
    with answering(name) as system:
      parts.append((name, system.cat_file(name.path)))
    at += len(parts[-1][1])
  return parts
