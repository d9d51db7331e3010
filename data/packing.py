"""How do documents of any length fill rows of one length, with no token lost or doubled?

A document of n tokens has n - 1 (input, target) pairs. `cut` divides its pairs into pieces of at
most T; `pack` puts pieces into rows, and `pack_both` those of which two lengths have to fit. Only
these plans are stored, never the rows themselves: a row is gathered when it is asked for.
"""

import numpy as np

WINDOW = 8192  # pieces sorted and placed together: bounds memory, and fills rows to 99% or more


def cut(offsets: np.ndarray, length: int) -> np.ndarray:
  """Divides documents into pieces.

  Args:
    offsets: int64 [documents + 1]; document d is tokens[offsets[d]:offsets[d + 1]],
      of at least two tokens.
    length: T, the greatest number of pairs in a piece.

  Returns:
    int64 [pieces, 2]: (start, n), inputs tokens[start:start + n]
    and targets tokens[start + 1:start + n + 1].
  """
  pairs = np.diff(offsets) - 1
  counts = -(-pairs // length)
  first = np.cumsum(counts) - counts
  index = np.arange(counts.sum(), dtype=np.int64) - np.repeat(first, counts)
  starts = np.repeat(offsets[:-1], counts) + index * length
  lengths = np.minimum(length, np.repeat(pairs, counts) - index * length)
  return np.stack([starts, lengths], axis=1)


def pack(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Assigns pieces to rows: best-fit decreasing (Johnson 1974) over windows of WINDOW pieces.

  Pieces of a whole row need no search. The rest is placed longest first,
  each in the row where it leaves least room.

  Args:
    lengths: int64 [pieces], each in [1, length].
    length: T.

  Returns:
    order: int64 [pieces], a permutation of the pieces, and rows: int64 [rows + 1]; row r holds the
      pieces order[rows[r]:rows[r + 1]].
  """
  whole = np.flatnonzero(lengths == length)
  rest = np.flatnonzero(lengths < length)
  order, sizes = [whole], [np.ones(len(whole), np.int64)]
  for start in range(0, len(rest), WINDOW):
    window = rest[start : start + WINDOW]
    filled = _best_fit(lengths[window], length)
    order.append(window[np.array([piece for row in filled for piece in row], np.int64)])
    sizes.append(np.array([len(row) for row in filled], np.int64))
  return np.concatenate(order), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(
    np.int64
  )


def _best_fit(lengths: np.ndarray, length: int) -> list[list[int]]:
  """Rows of piece indices. Open rows are kept by the room left in them;
  bit r of `rooms`: some have room r.
  """
  open_rows: list[list[list[int]]] = [[] for _ in range(length + 1)]
  rooms = 0
  rows = []
  order = np.argsort(-lengths, kind='stable')
  for piece, n in zip(order.tolist(), lengths[order].tolist()):
    enough = rooms >> n
    if enough:
      room = n + (enough & -enough).bit_length() - 1
      row = open_rows[room].pop()
      if not open_rows[room]:
        rooms ^= 1 << room
    else:
      room, row = length, []
      rows.append(row)
    row.append(piece)
    if room > n:
      open_rows[room - n].append(row)
      rooms |= 1 << (room - n)
  return rows


def pack_in_order(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
  """As `pack`, but keeps the pieces in order: a piece that doesn't fit begins the next row."""
  ends = np.cumsum(lengths)
  rows = [0]
  while rows[-1] < len(lengths):
    before = ends[rows[-1] - 1] if rows[-1] else 0
    rows.append(int(np.searchsorted(ends, before + length, side='right')))
  return np.arange(len(lengths), dtype=np.int64), np.array(rows, np.int64)


def pack_alone(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
  """As `pack`, but with one piece in each row."""
  del length
  return np.arange(len(lengths), dtype=np.int64), np.arange(len(lengths) + 1, dtype=np.int64)


def pack_both(lengths: np.ndarray, room: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """As `pack`, of pieces with two lengths, each of which has a row of its own: first-fit decreasing
  over windows of WINDOW pieces, the largest first: by the row of which a piece takes most.

  Args:
    lengths: int64 [pieces, 2], each in [1, room of its side].
    room: of the two rows.
  """
  order, sizes = [], []
  for start in range(0, len(lengths), WINDOW):
    filled = _first_fit(lengths[start : start + WINDOW], room)
    order += [start + piece for row in filled for piece in row]
    sizes += map(len, filled)
  return np.array(order, np.int64), np.cumsum([0, *sizes], dtype=np.int64)


def _first_fit(lengths: np.ndarray, room: tuple[int, int]) -> list[list[int]]:
  """Rows of piece indices."""
  left = np.empty((len(lengths), 2), np.int64)  # what is left of each row
  rows: list[list[int]] = []
  order = np.argsort(-(lengths / room).max(1), kind='stable')
  for piece in order.tolist():
    fits = (left[: len(rows)] >= lengths[piece]).all(1)
    row = int(fits.argmax()) if fits.any() else len(rows)
    if row == len(rows):
      rows.append([])
      left[row] = room
    rows[row].append(piece)
    left[row] -= lengths[piece]
  return rows


def pack_both_in_order(lengths: np.ndarray, room: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """As `pack_both`, but keeps the pieces in order, as `pack_in_order`."""
  rows, first, second = [0], 0, 0
  for piece, (a, b) in enumerate(lengths.tolist()):
    if first + a > room[0] or second + b > room[1]:
      rows.append(piece)
      first = second = 0
    first, second = first + a, second + b
  return np.arange(len(lengths), dtype=np.int64), np.array([*rows, len(lengths)], np.int64)
