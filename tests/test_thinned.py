"""Does `make test` run the first case of every costly test, and CI the last, too, and no other? And
of every slow test CI the last alone?
"""

import pytest

from tests.thinned import rest_long


class Item:
  """What pytest's items are to `rest_long`."""

  def __init__(self, name: str, *marks: str):
    self.nodeid = name
    self.marks = set(marks)

  def get_closest_marker(self, name):
    return name if name in self.marks else None

  def add_marker(self, name):
    self.marks.add(name)


@pytest.mark.parametrize('cases', [1, 2, 5])
@pytest.mark.parametrize('kind', ['costly', 'slow'])
def test_first_or_last_are_left(kind, cases):
  items = [Item(f't.py::test_it[{case}]', kind) for case in range(cases)]
  rest_long([*items, other := Item('t.py::test_other[0]')])
  fast = [item for item in items if 'slow' not in item.marks]
  slow = [item for item in items if item.marks >= {'slow'} and 'long' not in item.marks]
  assert fast == items[:1] * (kind == 'costly')
  assert slow == (items[max(1, cases - 1) :] if kind == 'costly' else items[-1:])
  assert not other.marks


def test_what_is_marked_itself_is_no_first_and_no_last():
  marks = [('costly', 'slow', 'long'), ('costly',), ('costly',), ('costly', 'slow')]
  items = [Item(f't.py::test_it[{case}]', *given) for case, given in enumerate(marks)]
  rest_long(items)
  assert ['slow' in item.marks for item in items] == [True, False, True, True]
  assert ['long' in item.marks for item in items] == [True, False, False, False]
