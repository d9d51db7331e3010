"""Does an expression that takes too much cost its own request alone, and is that known in time?"""

import time

import numpy as np
import pytest

from data.tokenizers import ByteTokenizer
from decode import automaton, constrain
from tests.decode.automata import made_here

BYTES = ByteTokenizer()


def constraint(regex, **more):
  return constrain.Constraint(BYTES, regex=regex, **more)


def test_an_expression_of_too_many_states_ends_within_its_limit(monkeypatch):
  """(a|b)*a(a|b){n} has 2 to the n states, which n + 3 places do not tell."""
  assert len(constraint('(a|b)*a(a|b){9}').next) >= 2**9
  monkeypatch.setattr(automaton, 'MOST_SECONDS', 1)
  with pytest.raises(
    ValueError, match=r'\{24\}.* takes more than .* s or .* GiB .*lower its counts'
  ):
    constraint('(a|b)*a(a|b){24}')


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

  def note(name, regexes, *more):
    asked.extend(regexes)
    return [(np.zeros(1, np.int32), np.zeros((1, 1), np.int32))]

  monkeypatch.setattr(automaton, '_made_elsewhere', note)
  monkeypatch.setattr(constrain, 'MOST_PLACES', 10**6)
  constraint(regex)
  assert asked == ([] if is_few else [regex])


def test_the_states_that_are_handed_back_are_bounded(monkeypatch):
  monkeypatch.setattr(automaton, 'MOST_STATES', 40)
  states = r'\{40\}.* takes 4\d states, of at most 40: lower its'
  with made_here(), pytest.raises(ValueError, match=states):
    constraint('a{40}')


@pytest.mark.slow
def test_what_tokens_make_of_it_is_found_by_the_other_process_too(monkeypatch):
  """In a server's thread, while others are written for, nothing is left but to say so."""
  monkeypatch.setattr(automaton, '_merged', None)
  room = automaton.Room(states=99, classes=511)
  with pytest.raises(ValueError, match=r'takes 1\d\d states and tells 4 .*of at most 99 and 511'):
    constraint('(a|b)*a(a|b){6}', room=room)


@pytest.mark.slow
def test_a_large_vocabulary_reaches_the_other_process(monkeypatch):
  """It is more than a pipe holds until the process has begun to read."""
  monkeypatch.setattr(automaton, 'POLL', 0.01)
  monkeypatch.setattr(automaton, 'MOST_WAITING', 60)
  many = tuple(b'a' * 9 + str(i).encode() for i in range(20_000))
  vocabulary = automaton.Vocabulary('large', (b'', *many), (0,))
  classes, _ = automaton.over_tokens(r'a{9}\d5', 20, vocabulary)
  assert classes[1 + 25] == classes[1 + 35] != classes[1 + 26] == classes[1 + 250]


def test_what_nobody_wants_any_more_is_ended():
  began = []

  def wanted():
    began.append(automaton.POLL)
    return len(began) < 2

  with pytest.raises(automaton.Unwanted):
    constraint('(a|b)*a(a|b){24}', wanted=wanted)
  assert len(began) == 2


def test_what_does_not_come_to_its_end_is_ended(monkeypatch):
  monkeypatch.setattr(automaton, '_MAKE', 'import time; time.sleep(600)')
  monkeypatch.setattr(automaton, 'MOST_WAITING', 0)
  with pytest.raises(ValueError, match='takes more than'):
    constraint(r'\w')


def test_what_another_process_says_as_it_fails_is_in_the_log_alone(monkeypatch, caplog):
  monkeypatch.setattr(automaton, '_MAKE', 'raise SystemError("a secret of this machine")')
  with pytest.raises(RuntimeError, match='ended with code 1; the log says more$'):
    constraint(r'\w')
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
