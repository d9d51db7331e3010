"""What happens to one document before it is learned from, and what in it must not be learned?

The stages, each counted: repair of lone surrogates, quality filters,
anonymisation, keys to find duplicates by.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import ipaddress
import multiprocessing
import re
from collections.abc import Iterable, Iterator

import numpy as np

from data import duplicates, filters
from data.config import CleanConfig


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
  view = filters.View(text)
  for name, keeps in filters.FILTERS[config.filters].items():
    if not keeps(view):
      return Cleaned('', name, counts)
  text, masked = anonymise(text, config.anonymise)
  words = text.lower().encode().split()
  digest = hashlib.blake2b(b' '.join(words), digest_size=16).digest()
  signature = duplicates.minhash(words) if config.near_duplicates else None
  return Cleaned(text, '', counts | masked, digest, signature)


_SURROGATES = re.compile('[\ud800-\udfff]')


# Each pattern begins with a character or a class, and looks behind it only then: re skips to
# possible beginnings at memory speed, but tries a leading look-behind at every character (four
# times slower on the standard library).
_EMAIL_HINT = re.compile(r'@(?<=\w@)[A-Za-z0-9-]+\.')
_EMAIL = re.compile(
  r"[\w.+'-](?<![\w.+'-]{2})[\w.+'-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"
)
_IPV4 = re.compile(r'[0-9](?<![\w.][0-9])[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w]|\.[0-9])')
_IPV6 = re.compile(r'[0-9A-Fa-f](?<![\w:.].)[0-9A-Fa-f]{0,3}:[0-9A-Fa-f:]{2,37}(?![\w:])')
_PHONES = (
  # +44 20 7946 0958, +1 (555) 010-9999, +35236450: at most 15 digits (ITU-T E.164).
  re.compile(
    r'\+(?<![\w.+]\+)[1-9][0-9]{0,2}(?:[ -]?(?:\([0-9]{1,4}\)|[0-9]{2,4})){2,5}(?![\w-]|\.[0-9])'
  ),
  # (555) 010-9999
  re.compile(r'\((?<!\w\()[0-9]{2,5}\)[ .-]?[0-9]{3,4}[ .-][0-9]{3,4}(?![\w-]|\.[0-9])'),
  # 555-010-9999, 020 7946 0958
  re.compile(r'[0-9](?<![\w.+/-][0-9])[0-9]{1,3}[ .-][0-9]{3,4}[ .-][0-9]{4}(?![\w-]|\.[0-9])'),
)
_CARDS = re.compile(r'[0-9](?<![\w.][0-9])[0-9]{3}(?:[ -][0-9]{4}){3}(?![\w-]|\.[0-9])')
_DIGITS = re.compile(r'[0-9](?<![\w.][0-9])[0-9]{8,}(?!\w|\.[0-9])')


def anonymise(text: str, kinds: Iterable[str]) -> tuple[str, dict[str, int]]:
  """Replaces personal data by placeholders.

  Rules, not a recogniser: 'a@b.de' in prose and 'x@layer.weight'
  in Python look the same and both go.

  Args:
    text: any text.
    kinds: of 'email', 'ip', 'phone', 'digits' (runs of nine or more, and 4 x 4 as on cards),
      in any order.

  Returns:
    The text with <EMAIL>, <IP>, <PHONE>, <DIGITS>, and how many of each kind were replaced.
  """
  counts = {}
  wanted = set(kinds)
  if 'email' in wanted and _EMAIL_HINT.search(text):
    text, counts['email'] = _EMAIL.subn('<EMAIL>', text)
  if 'ip' in wanted:
    text, v4 = _mask_addresses(text, _IPV4)
    text, v6 = _mask_addresses(text, _IPV6)
    counts['ip'] = v4 + v6
  cards = 0
  if 'digits' in wanted:
    text, cards = _CARDS.subn('<DIGITS>', text)
  if 'phone' in wanted:
    for pattern in _PHONES:
      text, count = pattern.subn('<PHONE>', text)
      counts['phone'] = counts.get('phone', 0) + count
  if 'digits' in wanted:
    text, runs = _DIGITS.subn('<DIGITS>', text)
    counts['digits'] = cards + runs
  return text, {kind: count for kind, count in counts.items() if count}


def _mask_addresses(text: str, pattern: re.Pattern) -> tuple[str, int]:
  """Masks those matches that parse as IP addresses; returns the text and their number."""
  masked = 0

  def replace(match: re.Match) -> str:
    nonlocal masked
    groups = [group for group in match[0].split(':') if group]
    # Slices such as x[1::2] parse as IPv6: ask for three groups,
    # or a first one of four digits as in fe80::1.
    if ':' in match[0] and len(groups) < 3 and len(groups[0]) < 4:
      return match[0]
    try:
      ipaddress.ip_address(match[0])
    except ValueError:
      return match[0]
    masked += 1
    return '<IP>'

  return pattern.sub(replace, text), masked


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
