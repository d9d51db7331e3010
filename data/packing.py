"""How do documents of any length fill rows of one length, with no token lost or doubled?

A document of n tokens has n - 1 (input, target) pairs. `cut` divides its pairs into pieces of at
most T; `pack` puts pieces into rows. Only these plans are stored, never the rows themselves: a row
is gathered when it is asked for.
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
