"""Where are cleaned documents while a corpus is built, so that they need not fit in memory?"""

import array
import os
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from data import clean


class Texts:
  """Cleaned documents on disk while a corpus is built; in memory, a few numbers for each."""

  def __init__(self, directory: pathlib.Path):
    self._path = directory / 'texts.partial'
    self._signatures_path = directory / 'signatures.partial'
    self._bytes = array.array('q')
    self._characters = array.array('q')
    self._hashes = array.array('Q')

  def write(self, documents: Iterable[clean.Cleaned]) -> None:
    """Appends documents."""
    with open(self._path, 'ab') as texts, open(self._signatures_path, 'ab') as signatures:
      for document in documents:
        self._bytes.append(texts.write(document.text.encode()))
        self._characters.append(len(document.text))
        self._hashes.append(int.from_bytes(document.digest[:8], 'little'))
        if document.signature is not None:
          signatures.write(document.signature.tobytes())

  def __len__(self) -> int:
    return len(self._bytes)

  def read(self, first: int, last: int, kept: np.ndarray) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the documents from first to last that are kept (bool [documents])."""
    with open(self._path, 'rb') as texts:
      texts.seek(int(self.sizes[:first].sum()))
      for d in range(first, last):
        if kept[d]:
          yield d, texts.read(self._bytes[d]).decode()
        else:
          texts.seek(self._bytes[d], os.SEEK_CUR)

  @property
  def sizes(self) -> np.ndarray:
    """Bytes of each document, int64 [documents]."""
    return np.frombuffer(self._bytes, np.int64)

  @property
  def characters(self) -> np.ndarray:
    """Of each document, int64 [documents]."""
    return np.frombuffer(self._characters, np.int64)

  def signatures(self) -> np.ndarray:
    """MinHash signatures, uint32 [documents, 112], memory-mapped."""
    return np.memmap(self._signatures_path, np.uint32, 'r').reshape(len(self), -1)

  def hash_shares(self) -> np.ndarray:
    """Each document's content hash as a number in [0, 1), float64 [documents]."""
    return np.frombuffer(self._hashes, np.uint64) / 2.0**64

  def delete(self) -> None:
    """Removes the files."""
    self._path.unlink()
    self._signatures_path.unlink()
