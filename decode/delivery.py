"""How do chunks of tokens reach who asked for them? While the device makes the next one.

Also: what becomes of a call that Ctrl-C ends.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from decode.drafting import Course
from decode.options import Options
from decode.report import CallTimer
from decode.request import INTERRUPTED, Row, raise_where_all_failed


def deliver(
  generator: Any,
  rows: Sequence[Row],
  course: Course,
  timer: CallTimer,
  options: Options,
) -> Iterator[list[str]]:
  """Fills the rows, each as far as it goes, and leaves the generator a report; each step gives the
  text that is new of each row.
  """
  # Chunk k + 1 runs while chunk k is read; the first token comes alone, and soon.
  count = 1
  ahead = timer.first(course.advance(count))
  try:
    while True:
      chunk = ahead
      # The most that a row still lacks when this chunk is read.
      left = max(row.most - len(row.ids) for row in rows if not row.finish) - count
      count = min(left, course.most)
      if count > 0:
        ahead = course.advance(count)

      chunk = jax.tree.map(np.asarray, chunk)
      pieces = [row.add(index, chunk) for index, row in enumerate(rows)]
      course.came(rows)
      timer.came([len(row.ids) for row in rows])
      if count <= 0 or all(row.finish for row in rows):
        break
      yield pieces
  except KeyboardInterrupt:
    if not any(row.ids for row in rows):
      raise
    pieces = [''] * len(rows)
    timer.came([len(row.ids) for row in rows])

  # Who has not ended by now was interrupted.
  pieces = [piece + row.end(INTERRUPTED) for piece, row in zip(pieces, rows)]
  generator.report = timer.report(options.seed, rows, course.fell_back)
  yield pieces
  raise_where_all_failed(rows)


def run_out(steps: Iterator[list[str]]) -> None:
  """Runs the steps of a call to their end. Ctrl-C that comes between two of them counts as if it
  came in one.
  """
  with contextlib.closing(steps):
    try:
      for _ in steps:
        pass
    except KeyboardInterrupt:
      if not steps.gi_suspended:  # it has ended them: nothing was made so far
        raise
      steps.throw(KeyboardInterrupt)


def pieces_of(row: Row, steps: Iterator[list[str]]) -> Iterator[str]:
  """The text of the only row of a call, as it comes.

  Raises KeyboardInterrupt at the end where Ctrl-C was that.
  """
  with contextlib.closing(steps):
    for (piece,) in steps:
      if piece:
        yield piece
  if row.finish == INTERRUPTED:
    raise KeyboardInterrupt
