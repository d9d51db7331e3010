"""Automata that are made in this process: another one, whose limits most tests are not about, takes
half a second to begin.
"""

import contextlib

import pytest

from decode import automaton


def all_plain(regexes, *limits):
  """What decode.schema asks, where it does not matter."""
  return [True] * len(regexes)


def _here(name, regexes, wanted, *more):
  return [getattr(automaton, name)(each, *more) for each in regexes]


@contextlib.contextmanager
def made_here():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(automaton, '_made_elsewhere', _here)
    yield
