"""Which cases of the slow tests does CI run? Of each test the first and the last: of a product
these differ in everything that it is a product of. `make test-all` runs the others, too.
"""

from collections.abc import Iterable

import pytest


def rest_long(items: Iterable[pytest.Item]) -> None:
  """Marks the cases between the first and the last one of every slow test as `long`."""
  cases: dict[str, list[pytest.Item]] = {}
  for item in items:
    if item.get_closest_marker('slow') and not item.get_closest_marker('long'):
      cases.setdefault(item.nodeid.partition('[')[0], []).append(item)
  for of_one_test in cases.values():
    for item in of_one_test[1:-1]:
      item.add_marker('long')
