"""Does an expression that takes too much cost its own request alone, and is that known in time?"""

import time

import numpy as np
import pytest

from decode import automaton, constrain
from tests.decode.automata import made_here


def test_an_expression_of_too_many_states_ends_within_its_limit(monkeypatch):
  """(a|b)*a(a|b){n} has 2 to the n states, which n + 3 places do not tell."""
  assert len(constrain._over_bytes('(a|b)*a(a|b){9}')[0]) >= 2**9
  monkeypatch.setattr(automaton, 'MOST_SECONDS', 1)
  with pytest.raises(
    ValueError, match=r'\{24\}.* takes more than .* s or .* GiB .*lower its counts'
  ):
    constrain._over_bytes('(a|b)*a(a|b){24}')


@pytest.mark.parametrize(
  'regex, is_few',
  [
    ('yes|no', True),
    (r'(?:ab?){3}\.', True),
    ('[ab]{3,9}c', True),
    ('[ -a]{12}', True),
    ('[ab]{13}', False),
    (r'\w*a\w', False),
    ('.a', False),
    ('[^a]', False),
    ('[é-ü]', False),
    ('[[:word:]]', False),
    (r'[a\w]', False),
    (r'\p{L}', False),
    ('(?i)ab', False),
    ('(?i:ab)', False),
    ('a{ 5000 }', False),
    ('a{,5000}', False),
  ],
)
def test_only_what_has_few_states_is_made_by_this_process(monkeypatch, regex, is_few):
  asked = []

  def note(name, regexes):
    asked.extend(regexes)
    return [(np.full((1, 256), -1), np.zeros(1, bool), 0)]

  monkeypatch.setattr(automaton, '_made_elsewhere', note)
  monkeypatch.setattr(constrain, 'MOST_PLACES', 10**6)
  constrain._over_bytes(regex)
  assert asked == ([] if is_few else [regex])


def test_the_states_that_are_handed_back_are_bounded(monkeypatch):
  monkeypatch.setattr(automaton, 'MOST_STATES', 40)
  states = r'\{40\}.* takes 4\d states, of at most 40: lower its'
  with made_here(), pytest.raises(ValueError, match=states):
    constrain._over_bytes('a{40}')


def test_what_another_process_says_as_it_fails_is_in_the_log_alone(monkeypatch, caplog):
  monkeypatch.setattr(automaton, '_MAKE', 'raise SystemError("a secret of this machine")')
  with pytest.raises(RuntimeError, match='ended with code 1; the log says more$'):
    constrain._over_bytes(r'\w')
  assert 'a secret of this machine' in caplog.text


@pytest.mark.parametrize(
  'regex',
  [
    '[' * 60_000,
    r'[\]' * 30_000,
    r'\p{' * 20_000,
    '{' * 60_000,
    'a{' + ' ' * 60_000,
    '[^' * 30_000,
  ],
  ids=lambda regex: regex[:3],
)
def test_places_are_counted_in_time_that_grows_with_the_text(regex):
  began = time.process_time()
  assert constrain._places(regex)
  assert time.process_time() - began < 1
