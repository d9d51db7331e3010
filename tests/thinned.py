"""Which cases of a product does CI run, and which are left to `make test-all`?"""

from collections.abc import Collection, Iterable

import pytest


def rest_long(cases: Iterable, kept: Collection[int]) -> list:
  """The cases of a slow test, all but the `kept` ones, by number, marked `long`; those should meet
  every value of what the cases are products of.
  """
  return [
    case
    if number in kept
    else pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.long)
    for number, case in enumerate(cases)
  ]
