"""Are the numbers of an evaluation, their intervals, and the examples that it shows what their
definitions say?
"""

import dataclasses
import math
import re

import numpy as np
import pytest

from data.records import LabelRecord
from evaluation import page, running
from evaluation.examples import examples
from evaluation.intervals import Z, bootstrap, wilson
from evaluation.measures import measures
from evaluation.metrics import calibration_error, classified, confusion, macro_f1
from evaluation.prompts import Shots, ranked
from evaluation.scoring import Scorer
from evaluation.task import Generate
from tests.evaluation.test_tasks import FORETELL, QUIET, WRITE

TRUTH, SAID = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
  'successes, n, low, high',
  [(8, 10, 0.4901625, 0.9433178), (0, 10, 0, 0.2775328), (10, 10, 0.7224672, 1)],
)
def test_wilsons_interval_is_the_tables(successes, n, low, high):
  made = wilson(successes, n)
  np.testing.assert_allclose([made.low, made.high], [low, high], atol=1e-6)
  assert made.value == successes / n and not made.small


def test_at_its_ends_the_share_is_as_far_as_said():
  made = wilson(37, 120)
  for p in (made.low, made.high):
    np.testing.assert_allclose(abs(made.value - p), Z * math.sqrt(p * (1 - p) / 120), rtol=1e-12)


@pytest.mark.parametrize('n, p', [(100, 0.3), (100, 0.5), (400, 0.8), (600, 0.9)])
def test_wilsons_interval_covers_95_percent(n, p):
  """Exactly: by the probabilities of all outcomes."""
  inside = [k for k in range(n + 1) if wilson(k, n).low <= p <= wilson(k, n).high]
  covered = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in inside)
  assert abs(covered - 0.95) < 0.015


def test_too_few_records_are_said_to_be():
  assert wilson(3, 9).small and '(few records)' in str(wilson(3, 9))
  assert bootstrap(lambda i: 0.5, 99).small and not bootstrap(lambda i: 0.5, 100).small
  with pytest.raises(ValueError, match='0 of 0 is no share'):
    wilson(0, 0)


def test_the_bootstrap_of_a_mean_is_the_normal_laws():
  values = np.random.default_rng(0).normal(2, 3, 900)
  made = bootstrap(lambda i: values[i].mean(), len(values), seed=1, resamples=4000)
  half = Z * values.std() / 30
  np.testing.assert_allclose(
    [made.low, made.high], [values.mean() - half, values.mean() + half], atol=0.03 * half * 2
  )
  assert made == bootstrap(lambda i: values[i].mean(), len(values), seed=1, resamples=4000)
  assert made != bootstrap(lambda i: values[i].mean(), len(values), seed=2, resamples=4000)


def test_macro_f1_is_the_mean_over_labels():
  """By hand: 4/5, 1/2 and 2/3; a label that nobody has or says does not count."""
  expected = (4 / 5 + 1 / 2 + 2 / 3) / 3
  assert macro_f1(TRUTH, SAID, 3) == pytest.approx(expected)
  assert macro_f1(TRUTH, SAID, 4) == pytest.approx(expected)
  assert confusion(TRUTH, SAID, 3).tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]


def test_the_calibration_error_is_the_gap_of_each_bin():
  confidence, right = np.array([0.95, 0.95, 0.55, 0.55]), np.array([1.0, 0, 1, 1])
  assert calibration_error(confidence, right) == pytest.approx((0.45 + 0.45) / 2)
  assert calibration_error(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0
  # 9/15 belongs to the bin that ends there; within a bin, gaps of both signs cancel.
  assert calibration_error(np.array([0.55, 0.6]), np.array([1.0, 0])) == pytest.approx(0.075)
  assert calibration_error(np.array([0.55, 0.61]), np.array([1.0, 0])) == pytest.approx(0.53)


def test_what_is_said_of_probabilities():
  p = np.eye(3)[SAID] * 0.8 + 0.2 / 3
  made = classified(TRUTH, p)
  assert made['accuracy'].value == pytest.approx(4 / 6)
  assert made['macro_f1'].value == pytest.approx(macro_f1(TRUTH, SAID, 3))
  assert made['calibration_error'].value == pytest.approx(abs(4 / 6 - (0.8 + 0.2 / 3)))
  assert made['majority'].value == pytest.approx(3 / 6)


POOL = [LabelRecord(f'text {i}', 'abc'[i % 3]) for i in range(30)]


def test_shots_are_balanced_seeded_and_never_the_one_that_is_asked():
  shots = Shots(POOL, 'abc', 6, seed=1)
  shown = shots.before()
  assert sorted(shot.label for shot in shown) == [*'aabbcc']
  assert Shots(POOL[::-1], 'abc', 6, seed=1).before() == shown, "the file's order is no matter"
  assert Shots(POOL, 'abc', 6, seed=2).before() != shown
  for record in POOL:
    others = shots.before(record.text)
    assert record not in others and sorted(shot.label for shot in others) == [*'aabbcc']
    if record not in shown:
      assert others == shown
  # Of 4 shots one label has two, which one the seed says.
  turns = {''.join(sorted(x.label for x in Shots(POOL, 'abc', 4, s).before())) for s in range(9)}
  assert turns == {'aabc', 'abbc', 'abcc'}


def test_more_shots_than_there_are_is_an_error():
  with pytest.raises(ValueError, match="shots=33 shows 11 examples of label '.', and there are 10"):
    Shots(POOL, 'abc', 33)
  with pytest.raises(ValueError, match='there are 9 besides the record that is asked'):
    Shots(POOL, 'abc', 30).before('text 0')
  assert Shots(POOL, 'abc', 0).before() == []


def test_an_order_is_of_each_record_alone():
  whole = ranked(POOL, 5)
  assert ranked(POOL[:10], 5) == [record for record in whole if record in POOL[:10]]


# What is written of them.


class Given(Scorer):
  """Of a task without a model: lines are made by hand."""

  def __init__(self, task, asked):
    self.task, self.asked, self.manner, self.measures = task, asked, QUIET, measures(task)

  def scores(self, asked):
    raise NotImplementedError


def test_what_is_beyond_all_numbers_is_null_and_said(tmp_path):
  """A perplexity per word of 800 nats a word. JSON has no word for infinite."""
  asked = examples(FORETELL, 0, QUIET)
  scored = Given(FORETELL, asked)
  stats = {measure.name: [800.0, 300.0, 900.0, 1.0] for measure in scored.measures}
  lines = [{'place': 'x', 'prompt': 'x', 'tokens': 1, 'nats': 1.0, 'stats': stats} for _ in asked]
  settings = {'shots': 0, 'task': FORETELL.values(), 'limit': 0, 'system': '', 'chat': False}
  settings['seed'] = 0
  place = running.TaskFiles(tmp_path, 'foretell-0', settings)
  place.begin(asked, 1)
  place.add(lines)
  place.end(running.summarised('foretell', settings, scored, zip(lines, asked)))
  page.write(tmp_path, {'workdir': 'runs/x'}, {})
  for name in ('foretell-0.json', page.VALUES):
    assert not re.search('Infinity|NaN', (tmp_path / name).read_text())
  (summary,) = page.read(tmp_path)
  assert summary.metrics['perplexity per word']['value'] is None
  assert (
    '| perplexity per word ↓ | no number [no number, no number]'
    in (tmp_path / page.PAGE).read_text()
  )


def test_counts_are_of_all_answers_of_a_question():
  drawn = Generate(temperature=1.0, samples=4)
  for kind, of in ((drawn, 20), (WRITE.kind, 5)):
    settings = {'shots': 0, 'task': dataclasses.replace(WRITE, kind=kind).values()}
    counts = {'cut': 3, 'nan': 0, 'empty': 4, 'endless': 5, 'failed': 2}
    said = page.notes([running.Summary('t', settings, 5, 'ab', 0.0, {}, {}, counts)])
    assert said[0].startswith('t-0: 3 of 5 prompts were cut')
    assert [line.split(' answers')[0] for line in said[1:]] == [
      f't-0: {n} of {of}' for n in (4, 5, 2)
    ]
  settings['task'] = FORETELL.values()
  said = page.notes([running.Summary('t', settings, 5, 'ab', 0.0, {}, {}, {'empty': 1})])
  assert said == ['t-0: 1 of 5 answers, or texts, are empty']
