"""Bits per byte of plays of Shakespeare (tinyshakespeare.txt)."""

from collections.abc import Iterator

from evaluation.task import Perplexity, Row, Task

CHARACTERS = 4000  # of a document, at least: they end with a speech


def documents(row: Row) -> Iterator[Row]:
  """The plays, cut where speeches end."""
  part = ''
  for speech in row['text'].split('\n\n'):
    part += speech + '\n\n'
    if len(part) >= CHARACTERS:
      yield {'text': part}
      part = ''
  if part.strip():
    yield {'text': part}


def get_task() -> Task:
  return Task(Perplexity(), 'tinyshakespeare.txt', prompt='{{ text }}', rows=documents)
