"""Is it said how sure a number of the lm-evaluation-harness is, and what was counted?"""

import collections
from types import SimpleNamespace

import numpy as np
import pytest

from data.tokenizers import ByteTokenizer
from decode.choices import PairScore
from decode.request import FAILED, LENGTH, STOPPED
from evaluation import harness, harness_results
from evaluation.harness import HarnessSettings
from evaluation.intervals import summed, wilson
from evaluation.writing import Reply
from tests.evaluation.test_label_scores import generator


def quiet(line):
  pass


def test_scores_that_are_no_numbers_are_counted(monkeypatch):
  def score_pairs(model, contexts, behind):
    return [PairScore(float('nan') if ids[0] == 9 else -1.0, 1, False) for ids in behind]

  monkeypatch.setattr(harness, 'score_pairs', score_pairs)
  model, counts = generator('llama'), collections.Counter()
  pairs = [([1, 2], [9]), ([1], [8]), ([1] * (model.context + 5), [7])]
  assert len(harness.scored(model, pairs, quiet, counts)) == 3
  assert counts == {'cut': 1, 'nan': 1, 'requests': 3, 'pairs': 3}


def test_what_became_of_answers_is_counted(monkeypatch):
  replies = [('yes', STOPPED), (' ', STOPPED), ('and on', LENGTH), ('an', FAILED)]
  monkeypatch.setattr(harness.writing, 'answers', lambda *_: ([Reply(*of)] for of in replies))
  model, counts = generator('llama'), collections.Counter()
  requests = [(text, {'max_gen_toks': 4}) for text in ('a', 'b', 'c' * model.context, 'd')]
  answers = harness.written(model, requests, list, HarnessSettings(()), quiet, counts)
  assert answers == [text for text, _ in replies]
  expected = {'cut': 1, 'empty': 1, 'endless': 1, 'failed': 1, 'requests': 4, 'answers': 4}
  assert counts == expected
  of = {'metrics': {}, 'counts': dict(counts)}
  assert harness_results.notes({'tasks': {'t': of, 'older': {'metrics': {}}}}) == [
    't: 1 of 4 contexts, or questions, were cut on the left to fit the model',
    't: 1 of 4 answers are empty',
    't: 1 of 4 answers ended at max_gen_toks',
    't: 1 of 4 answers ended where the scores were not finite, and count as they are',
  ]


def test_a_tokenizer_that_was_made_here_names_no_control_tokens(monkeypatch):
  """As of every model that was trained here from nothing: the demo's."""
  model = generator('llama')
  monkeypatch.setattr(model, 'tokenizer', ByteTokenizer())
  text = model.tokenizer.encode('<s> ä')
  assert harness.encoded(model, '<s> ä', True, True) == [model.tokenizer.bos, *text]
  assert harness.encoded(model, '<s> ä', True, False) == text


def of_two(first, second, by_size):
  values = [x.mean() for x in (first, second)]
  weights = [len(first), len(second)] if by_size else [1, 1]
  value = np.average(values, weights=weights)
  return value, harness_results.stratified(value, [first, second], by_size, 0)


def test_a_group_has_the_interval_of_its_documents():
  draw = np.random.default_rng(0)
  right, wrong = (draw.random(n) < 0.6 for n in (400, 100))
  _, made = of_two(right.astype(float), wrong.astype(float), True)
  assert made == wilson(int(right.sum() + wrong.sum()), 500).values()
  # Each counts the same: as sure as the mean of two independent means.
  first, second = draw.normal(1, 1, 400), draw.normal(3, 2, 400)
  value, made = of_two(first, second, False)
  deviation = np.sqrt(first.var() / 400 + second.var() / 400) / 2
  ends = value - 1.96 * deviation, value + 1.96 * deviation
  np.testing.assert_allclose([made['low'], made['high']], ends, atol=0.25 * deviation)
  assert made['n'] == 800 and made['method'] == 'bootstrap'
  # Of as many documents not the same ones are drawn of both, as if they were pairs.
  pairs = summed(np.stack([(first + second) / 2, np.ones(400)], 1), lambda t: t[0] / t[1])
  assert made['high'] - made['low'] != pytest.approx(pairs.high - pairs.low, rel=1e-3)


def test_a_group_without_an_interval_says_none():
  of_all = np.zeros(50)
  for tasks in ([of_all, None], [of_all, np.zeros(1)], [of_all, of_all]):
    made = harness_results.stratified(0.0, tasks, False, 0)
    assert made['method'] == 'none' and made['low'] is None
  other = harness_results.stratified(0.7, [of_all, of_all], True, 0)
  assert other['method'] == 'none', 'the value is no mean of these'


def test_scores_of_groups_are_told_before_those_of_their_tasks():
  each = {'value': 0.5, 'low': 0.25, 'high': 0.75, 'n': 4, 'method': 'wilson', 'small': True}
  nothing = harness_results.none(0.5, 4)
  lost = {**nothing, 'value': None}
  task = {'n': 4, 'metrics': {'acc,none': each, 'ppl,none': lost}, 'prompts': 'ab'}

  class Group(SimpleNamespace):
    def aggregate(self, told):
      assert told['a']['sample_len'] == 4 and np.isnan(told['a']['ppl,none'])
      return {'alias': 'g', 'acc,none': 0.5, 'acc_stderr,none': 'N/A', 'sample_len': 8}

    def get_all_tasks(self):
      return [SimpleNamespace(task_name=name) for name in 'ab']

  listed = [SimpleNamespace(metric='acc', weight_by_size=True)]
  group = Group(aggregate_metric_list=listed, version='1')
  samples = [{'doc_id': i, 'filter': 'none', 'acc': float(i % 2)} for i in range(4)]
  tasks = {'a': task, 'b': task}
  made = harness_results.of_group(group, tasks, lambda name: samples, 0)
  assert made['metrics'] == {'acc,none': wilson(4, 8).values()} and made['tasks'] == ['a', 'b']
  rows = harness_results.rows({'tasks': {'a': task}, 'groups': {'g': made}})
  assert [row[:2] for row in rows] == [['g', 'acc,none'], ['a', 'acc,none'], ['a', 'ppl,none']]
  assert rows[1][2:] == ['0.5 [0.25, 0.75] (few)', '4'] and rows[2][2] == 'no number'
  assert harness_results.shown(nothing) == '0.5'
