"""Which documents are worth learning from? Rules that drop a document that breaks them,
with thresholds from papers.
"""

import collections
import functools
import re
import string
from collections.abc import Callable

import numpy as np

from data import duplicates

# Gopher, appendix A1
STOP_WORDS = frozenset(('the', 'be', 'to', 'of', 'and', 'that', 'have', 'with'))
TERMINAL_PUNCTUATION = ('.', '!', '?', '"', '\u201d', '\u2026', '\u3002', '\uff01', '\uff1f')


class SplitText:
  """A text with its words and its lines that aren't blank, split once for all the filters."""

  def __init__(self, text: str):
    self.text = text

  @functools.cached_property
  def words(self) -> list[str]:
    return self.text.split()

  @functools.cached_property
  def lines(self) -> list[str]:
    return [line.strip() for line in self.text.split('\n') if line.strip()]


def _share(part: int, whole: int) -> float:
  return part / whole if whole else 0.0


def _alphanumeric(view: SplitText) -> bool:
  return sum(map(len, re.findall(r'[^\W_]+', view.text))) >= 0.25 * len(view.text)


def _line_length(view: SplitText) -> bool:
  lines = view.text.split('\n')
  return max(map(len, lines)) <= 1000 and len(view.text) / len(lines) <= 100


def _word_count(view: SplitText) -> bool:
  return 50 <= len(view.words) <= 100_000


def _word_length(view: SplitText) -> bool:
  words = view.words
  return 3 <= _share(sum(map(len, words)), len(words)) <= 10


def _symbols(view: SplitText) -> bool:
  symbols = sum(map(view.text.count, ('#', '...', '\u2026')))
  return symbols <= 0.1 * len(view.words)


def _bullets(view: SplitText) -> bool:
  bullets = sum(line.startswith(('-', '*', '\u2022', '\u25cf')) for line in view.lines)
  ellipses = sum(line.endswith(('...', '\u2026')) for line in view.lines)
  return bullets <= 0.9 * len(view.lines) and ellipses <= 0.3 * len(view.lines)


def _letters(view: SplitText) -> bool:
  words = view.words
  return sum(any(map(str.isalpha, word)) for word in words) >= 0.8 * len(words)


def _stop_words(view: SplitText) -> bool:
  words = (word.strip(string.punctuation) for word in view.text.lower().split())
  return len(STOP_WORDS.intersection(words)) >= 2


def _placeholder_text(view: SplitText) -> bool:
  return 'lorem ipsum' not in view.text.lower() and '{' not in view.text


def _line_ends(view: SplitText) -> bool:
  ended = sum(line.endswith(TERMINAL_PUNCTUATION) for line in view.lines)
  return ended >= 0.12 * len(view.lines) and view.text.count('\n') <= 0.3 * len(view.words)


def _short_lines(view: SplitText) -> bool:
  return sum(len(line) <= 30 for line in view.lines) <= 0.67 * len(view.lines)


def _duplicate_share(parts: list[str]) -> tuple[float, float]:
  """Share of the parts, and of their characters, that repeat an earlier part."""
  counts = collections.Counter(parts)
  repeated = sum((count - 1) * len(part) for part, count in counts.items())
  return _share(len(parts) - len(counts), len(parts)), _share(repeated, sum(map(len, parts)))


def _repeated_lines(view: SplitText) -> bool:
  lines, line_characters = _duplicate_share(view.lines)
  paragraphs, paragraph_characters = _duplicate_share(
    [part for part in re.split(r'\n{2,}', view.text) if part.strip()]
  )
  return (
    lines <= 0.3 and paragraphs <= 0.3 and line_characters <= 0.2 and paragraph_characters <= 0.2
  )


# n -> greatest share of characters in the most frequent n-gram (2-4),
# or in all repeated n-grams (5-10).
GOPHER_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16, 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def _repeated_ngrams(view: SplitText) -> bool:
  words = view.words
  lengths = np.array([len(word) for word in words], np.int64)
  # Numbers and not Python's hashes of words, which another process draws anew.
  numbers: dict[str, int] = {}
  hashes = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.uint64)
  for n, limit in GOPHER_NGRAMS.items():
    if len(words) < n:
      break
    grams = duplicates.ngram_hashes(hashes, n)
    unique, first, inverse, counts = np.unique(
      grams, return_index=True, return_inverse=True, return_counts=True
    )
    if n <= 4:
      # Characters of the most frequent n-gram, wherever it is, if it repeats. Of several that are
      # as frequent it is the one that begins first (as in FineWeb's code): np.unique sorts by hash.
      often = np.flatnonzero(counts == counts.max())
      top = int(often[np.argmin(first[often])])
      characters = lengths[first[top] : first[top] + n].sum()
      covered = int(counts[top] * characters) if counts[top] > 1 else 0
    else:
      # Characters of words that lie in any n-gram that was there before, each word once: +1 where
      # such an n-gram starts, -1 behind it, and a word is inside where their running sum is not 0.
      starts = np.flatnonzero(np.arange(len(grams)) != first[inverse])
      inside = np.zeros(len(words) + 1, np.int64)
      np.add.at(inside, starts, 1)
      np.add.at(inside, starts + n, -1)
      covered = int(lengths[np.cumsum(inside[:-1]) > 0].sum())

    if covered > limit * lengths.sum():
      return False
  return True


# preset -> rule -> keeps(view), in the order in which they are tried.
FILTERS: dict[str, dict[str, Callable[[SplitText], bool]]] = {
  'none': {},
  # StarCoder (arXiv:2305.06161, section 3.1) after Codex (arXiv:2107.03374, section 3.1): no line
  # over 1000 characters, 100 on average, a quarter of the characters alphanumeric.
  'code': {'line_length': _line_length, 'alphanumeric': _alphanumeric},
  'prose': {
    # Gopher (arXiv:2112.11446, appendix A1, quality filters).
    'word_count': _word_count,
    'word_length': _word_length,
    'symbols': _symbols,
    'bullets': _bullets,
    'letters': _letters,
    'stop_words': _stop_words,
    # C4 (arXiv:1910.10683, section 2.2), without its rule on lines,
    # which FineWeb found to cost more than it gives.
    'placeholder_text': _placeholder_text,
    # FineWeb (arXiv:2406.17557, section 3.6), with its repository's limits
    # on newlines and short lines.
    'line_ends': _line_ends,
    'short_lines': _short_lines,
    # Gopher (appendix A1, repetition removal, table A1).
    'repeated_lines': _repeated_lines,
    'repeated_ngrams': _repeated_ngrams,
  },
}
