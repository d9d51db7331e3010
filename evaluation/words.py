"""What is a word, in any script? A run of letters, digits and underscores, with the marks behind
them: vowel signs of Hindi, accents that stand by themselves.
"""

import functools
import re
import sys
import unicodedata

import numpy as np


def split_words(text: str) -> list[str]:
  """Without what is between them."""
  return _patterns()[0].findall(text)


def split_words_and_signs(text: str) -> list[str]:
  """And each sign between them that is no white space, by itself."""
  return _patterns()[1].findall(text)


@functools.cache
def _patterns() -> tuple[re.Pattern, re.Pattern]:
  r"""Of a word, and of a word or a sign. Python's \w leaves out marks, so that words which differ
  in their vowels are one. A mark that is behind no letter, as of an emoji, is in no word.
  """
  every = map(chr, range(sys.maxunicode + 1))
  marks = np.flatnonzero([unicodedata.category(sign)[0] == 'M' for sign in every])
  runs = np.split(marks, np.flatnonzero(np.diff(marks) > 1) + 1)
  ranges = ''.join(rf'\U{run[0]:08x}-\U{run[-1]:08x}' for run in runs)
  # Words of ASCII end without a look through all ranges of marks.
  word = rf'\w+(?:(?=[^\x00-\x7f])[{ranges}]\w*)*'
  return re.compile(word), re.compile(rf'{word}|[^\w\s]')
