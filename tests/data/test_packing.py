"""Packing laws: no pair lost or doubled, no row overfull,
whatever the documents and the row length.
"""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from data import packing

documents = st.lists(st.integers(2, 60), min_size=1, max_size=60)


def pairs_of(offsets):
  return [(i, i + 1) for first, last in zip(offsets, offsets[1:]) for i in range(first, last - 1)]


@pytest.mark.parametrize('pack', [packing.pack, packing.pack_in_order])
@given(lengths=documents, length=st.integers(1, 33), window=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_every_pair_exactly_once(pack, lengths, length, window):
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  pieces = packing.cut(offsets, length)
  default, packing.WINDOW = packing.WINDOW, window
  try:
    order, rows = pack(pieces[:, 1], length)
  finally:
    packing.WINDOW = default
  assert sorted(order.tolist()) == list(range(len(pieces)))
  assert rows[0] == 0 and rows[-1] == len(pieces) and (np.diff(rows) > 0).all()
  seen = []
  for first, last in zip(rows, rows[1:]):
    chosen = pieces[order[first:last]]
    assert chosen[:, 1].sum() <= length
    seen += [(i, i + 1) for start, n in chosen.tolist() for i in range(start, start + n)]
  assert sorted(seen) == pairs_of(offsets)


@given(lengths=documents, length=st.integers(1, 33))
@settings(max_examples=100, deadline=None)
def test_pieces_stay_within_a_document_and_only_its_last_is_short(lengths, length):
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  pieces = packing.cut(offsets, length)
  document = np.searchsorted(offsets, pieces[:, 0], side='right')
  assert (document == np.searchsorted(offsets, pieces[:, 0] + pieces[:, 1], side='right')).all()
  short = pieces[:, 1] < length
  last = np.append(document[1:] != document[:-1], True)
  assert (last | ~short).all()


@given(lengths=documents, length=st.integers(1, 33))
@settings(max_examples=60, deadline=None)
def test_in_order_keeps_the_order(lengths, length):
  pieces = packing.cut(np.concatenate([[0], np.cumsum(lengths)]), length)
  order, _ = packing.pack_in_order(pieces[:, 1], length)
  assert (order == np.arange(len(pieces))).all()


def test_best_fit_decreasing_matches_a_worked_example():
  # Longest first: 8 opens a row; 7 opens one; 5 opens one;
  # 4 fits the row of 5 (room 5), 3 that of 7, 2 that of 8.
  order, rows = packing.pack(np.array([2, 3, 4, 5, 7, 8]), 10)
  assert [order[a:b].tolist() for a, b in zip(rows, rows[1:])] == [[5, 0], [4, 1], [3, 2]]


def test_rows_are_nearly_full():
  lengths = np.random.default_rng(0).integers(1, 512, 20_000)
  _, rows = packing.pack(lengths, 512)
  assert lengths.sum() / ((len(rows) - 1) * 512) > 0.99
