"""What happens to one document before it is learned from, and what in it must not be learned?

The stages, each counted: repair of lone surrogates, quality filters,
anonymisation, keys to find duplicates by.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import re
from collections.abc import Iterable, Iterator

import numpy as np

from data import content, duplicates, filters
from data.config import CleanConfig
from data.personal import anonymise
from data.processes import without_main


@dataclasses.dataclass(frozen=True)
class Cleaned:
  """One document after cleaning.

  Attributes:
    text: the text to learn from; '' when dropped.
    dropped: name of the filter that dropped it, '' when kept.
    counts: 'repaired' characters and masked items by kind; never their values.
    digest: 16 bytes that identify the text up to case and whitespace.
    signature: MinHash values, uint32 [112]; None when near-duplicates are not looked for.
  """

  text: str
  dropped: str
  counts: dict[str, int]
  digest: bytes = b''
  signature: np.ndarray | None = None


def clean(text: str, config: CleanConfig) -> Cleaned:
  """Runs every stage on one document."""
  text, repaired = _SURROGATES.subn('\ufffd', text)
  counts = {'repaired': repaired} if repaired else {}
  if not text.strip():
    return Cleaned('', 'empty', counts)
  view = filters.SplitText(text)
  for name, keeps in filters.FILTERS[config.filters].items():
    if not keeps(view):
      return Cleaned('', name, counts)
  if config.word_list and content.listed(config.word_list)(text):
    return Cleaned('', 'word_list', counts)
  if config.classifier:
    if content.classifier(config.classifier)(text) >= config.classifier_threshold:
      return Cleaned('', 'classifier', counts)
  text, masked = anonymise(text, config.anonymise)
  words = text.lower().encode().split()
  digest = hashlib.blake2b(b' '.join(words), digest_size=16).digest()
  signature = duplicates.minhash(words) if config.near_duplicates else None
  return Cleaned(text, '', counts | masked, digest, signature)


_SURROGATES = re.compile('[\ud800-\udfff]')


CHUNK_CHARACTERS = 2**20  # handed to a worker process at a time


def clean_all(texts: Iterable[str], config: CleanConfig, workers: int = 1) -> Iterator[Cleaned]:
  """Cleans a stream of documents, in order.

  Args:
    texts: documents.
    config: the stages.
    workers: processes; 1 works in this one. Only a few chunks per worker are held at any time.
  """
  if workers == 1:
    yield from (clean(text, config) for text in texts)
    return
  # 'spawn', since a fork of a process in which JAX runs threads may deadlock.
  with concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context('spawn')
  ) as pool:
    pending = collections.deque()
    for chunk in _chunks(texts):
      with without_main():  # a process may begin now
        pending.append(pool.submit(_clean_chunk, chunk, config))
      if len(pending) > 2 * workers:
        yield from pending.popleft().result()
    while pending:
      yield from pending.popleft().result()


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
  chunk, characters = [], 0
  for text in texts:
    chunk.append(text)
    characters += len(text)
    if characters >= CHUNK_CHARACTERS:
      yield chunk
      chunk, characters = [], 0
  if chunk:
    yield chunk


def _clean_chunk(texts: list[str], config: CleanConfig) -> list[Cleaned]:
  return [clean(text, config) for text in texts]
