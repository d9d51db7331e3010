"""Which cases of costly tests run where? Of a slow test CI runs the last case, which has the most
in it where cases are a product. Of a test marked `costly` the first is fast, and the last slow: of
a product these differ in everything that it is a product of. `make test-all` runs the others, too.
"""

from collections.abc import Iterable

import pytest


def rest_long(items: Iterable[pytest.Item]) -> None:
  """Marks the last case of every costly test as slow, and as `long` the cases between its first and
  its last one, and all but the last one of every slow test.
  """
  costly: dict[str, list[pytest.Item]] = {}
  slow: dict[str, list[pytest.Item]] = {}
  for item in items:
    test = item.nodeid.partition('[')[0]
    if item.get_closest_marker('long'):
      continue
    if item.get_closest_marker('slow'):
      slow.setdefault(test, []).append(item)
    elif item.get_closest_marker('costly'):
      costly.setdefault(test, []).append(item)

  for cases in slow.values():
    mark(cases[:-1], 'long')
  for cases in costly.values():
    mark(cases[1:], 'slow')
    mark(cases[1:-1], 'long')


def mark(items: Iterable[pytest.Item], name: str) -> None:
  """Adds a marker to all of them."""
  for item in items:
    item.add_marker(name)
