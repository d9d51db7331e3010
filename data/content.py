"""Which documents hold what a person does not want learned, by their own list of words or labels?

No list and no labels come with the code: what is toxic or biased depends on language, place and
purpose. A trained classifier is one file, made from labelled lines:

    python -m data.labels --labelled=labelled.jsonl --output=filter.npz
"""

import collections
import functools
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

from data.compressed import damaged

BUCKETS = 2**18  # of hashed n-grams
_WORD = re.compile(r'\w+')
# Of scripts that put no spaces between words (Thai, Lao, Tibetan, Burmese, Khmer, Japanese,
# Chinese): each of their characters is a word of a list's phrase.
_UNSPACED = (
  '\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff'
  '\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af'
)
_LISTED_WORD = re.compile(f'[{_UNSPACED}]|[^\\W{_UNSPACED}]+')


def listed(path: str) -> Callable[[str], bool]:
  """Whether a text has a word or phrase of a file's, one a line, '#' before a comment; whole words,
  whatever their case, or, in scripts that put no spaces between them, wherever they stand. Raises
  ValueError for a file without any.
  """
  return _listed(path, _version(path))


def _version(path: str) -> tuple[int, int]:
  """What changes with a file's content, so that one read before is not taken for another."""
  try:
    status = os.stat(os.path.expanduser(path))
  except OSError as error:
    raise ValueError(f'{path}: {error.strerror}; give a file') from error
  return status.st_mtime_ns, status.st_size


@functools.lru_cache(4)
def _listed(path: str, version: tuple[int, int]) -> Callable[[str], bool]:
  del version
  lines = text_of(path).splitlines()
  phrases: dict[str, set[tuple[str, ...]]] = collections.defaultdict(set)  # by their first words
  for line in lines:
    words = [] if line.lstrip().startswith('#') else _listed_words(line)
    if words:
      phrases[words[0]].add(tuple(words))
  if not phrases:
    raise ValueError(f'clean.word_list={path!r} has no word in it; give one a line')

  def has_one(text: str) -> bool:
    words = _listed_words(text)
    return any(
      tuple(words[i : i + len(phrase)]) == phrase
      for i, word in enumerate(words)
      for phrase in phrases.get(word, ())
    )

  return has_one


def classifier(path: str) -> Callable[[str], float]:
  """Gives the probability that a text is of the labelled kind, by a file that `train` wrote.
  Raises ValueError for another file.
  """
  return _classifier(path, _version(path))


@functools.lru_cache(4)
def _classifier(path: str, version: tuple[int, int]) -> Callable[[str], float]:
  del version
  try:
    with np.load(pathlib.Path(path).expanduser(), allow_pickle=False) as stored:
      weights, bias = stored['weights'], float(stored['bias'])
    if weights.shape != (BUCKETS,):
      raise ValueError(f'it has weights of shape {weights.shape}, not {(BUCKETS,)}')
  except (*damaged(), zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
    raise ValueError(
      f'clean.classifier={path!r} is no file of python -m data.labels: {error}'
    ) from error
  return lambda text: float(sigmoid(weights[features_of(text)].mean() + bias))


def text_of(path: str) -> str:
  try:
    return pathlib.Path(path).expanduser().read_bytes().decode('utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f'{path}: {error}; give a file of UTF-8 text') from error


def _listed_words(text: str) -> list[str]:
  return _LISTED_WORD.findall(text.lower())


def _words(text: str) -> list[str]:
  return _WORD.findall(text.lower())


def features_of(text: str) -> np.ndarray:
  """Places of a text's words and pairs of neighbours among BUCKETS, int64; [0] of none."""
  words = [word.encode('utf-8', 'replace') for word in _words(text)]
  grams = [*words, *(b' '.join(pair) for pair in zip(words, words[1:]))] or [b'']
  return np.array([zlib.crc32(gram) % BUCKETS for gram in grams], np.int64)


def sigmoid(x):
  return 1 / (1 + np.exp(-np.clip(x, -50, 50)))
