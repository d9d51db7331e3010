"""Automata that are made in this process: another one, whose limits most tests are not about, takes
half a second to begin.
"""

import contextlib

import pytest

from decode import automaton


def all_plain(regexes):
  """What decode.schema asks, where it does not matter."""
  return [True] * len(regexes)


@contextlib.contextmanager
def made_here():
  with pytest.MonkeyPatch.context() as patch:
    here = lambda name, regexes: [getattr(automaton, name)(each) for each in regexes]  # noqa: E731
    patch.setattr(automaton, '_made_elsewhere', here)
    yield
