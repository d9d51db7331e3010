"""Is a rollout to the token what was written and judged: what counts, what is taken off, replaced,
dropped, and told? Of a policy and rewards that are what a test says; no model runs.
"""

import dataclasses
import json
import types

import numpy as np
import pytest

from data.prompts import Prompt, Prompts
from data.tokenizers import ByteTokenizer
from decode.bulk import Written
from objectives.judges import Judges, ModelJudge
from objectives.policy import GRPO
from objectives.rollout import HeldOut, Rollouts
from tests.training.conftest import tiny
from workdir.rollouts import RolloutJournal, read

EOS = ByteTokenizer().eos
PROMPTS = tuple(Prompt(f'asked.jsonl:{i}', (1, 20 + i), 'ab', {}) for i in range(6))
# Of an answer by its first token.
WORTH = {10: 1.0, 11: 2.5, 12: np.nan}
ENDED, UNENDED, FAILED = [10, 13, EOS], [11, 10, 12, 13], [12, EOS]
OBJECTIVE = GRPO(group=2, max_new_tokens=4, reward=('worth.py',), missing_end=0.25)


def worth(ids):
  return np.array([WORTH[each[2]] for each in ids])


class Scripted:
  """A stage whose policy writes the answers of a script, over and over, the last one first; models
  say by how many nats a token they differ from who wrote.
  """

  def __init__(self, *script):
    self.prompts = Prompts('key', ByteTokenizer(), PROMPTS[:4], PROMPTS[4:], 8)
    self.judges = Judges([ModelJudge('worth', worth, {})], [1.0])
    self.seed, self.dtype = 3, 'float32'
    self.lines, self.notes = [], []
    self.log = self.lines.append
    self._script, self._written = script, 0

  def answers(self, models, asked):
    first, self._written = self._written, self._written + len(asked)
    for index in reversed(range(len(asked))):
      ids = self._script[(first + index) % len(self._script)]
      logs = [-0.01 * (1 + index)] * len(ids)
      yield index, Written([*ids], logs, logs, ended=ids[-1] == EOS)

  def text(self, ids):
    return ' '.join(map(str, ids))

  def said(self, models, batch, names):
    return {
      name: np.where(batch.weights > 0, batch.behaviour + models['apart'], 0) for name in names
    }

  def note(self, rollout, content):
    def refuse(name):
      raise ValueError(f'{name} is no JSON')

    self.notes.append(json.loads(json.dumps(content), parse_constant=refuse))


def rollouts_of(stage, **fields):
  data = tiny(data={'batch_size': 4, 'sequence_length': 8}).data
  return Rollouts(stage, dataclasses.replace(OBJECTIVE, **fields), data, range(4))


def state(apart=0.0):
  return types.SimpleNamespace(models={'apart': apart})


def test_an_end_is_learned_and_a_missing_one_costs():
  stage = Scripted(ENDED, UNENDED)
  batch = rollouts_of(stage).take(state())
  data = tiny(data={'batch_size': 4, 'sequence_length': 8}).data
  (held_out,) = HeldOut(stage, OBJECTIVE, data, range(4)).of(state().models)
  for answers, rows in ((batch, 4), (held_out, 2)):
    for row in range(rows):
      ids, score = ((ENDED, 1.0), (UNENDED, 2.5 - 0.25))[row % 2]
      # Behind a prompt of two tokens, whose last one is the first place of the answer.
      expected = [0, *ids, *[0] * (7 - len(ids))]
      np.testing.assert_array_equal(answers.targets[row] * answers.weights[row], expected)
      np.testing.assert_array_equal(answers.weights[row] > 0, np.array(expected) > 0)
      np.testing.assert_array_equal(answers.scores[row], np.eye(8)[len(ids)] * score)
      assert answers.ended[row].sum() == (ids is ENDED)
  assert not held_out.last[2:].any()


def test_each_epoch_has_all_answers_in_an_order_of_its_own():
  rollouts, orders = rollouts_of(Scripted(ENDED, UNENDED), minibatches=3, epochs=3), []
  for _ in range(2):
    for _ in range(3):
      batches = [rollouts.take(state()) for _ in range(3)]
      # Which answer a row is, its log-probabilities say.
      logs = np.concatenate([batch.behaviour.min(1) for batch in batches])
      orders.append(np.rint(-100 * logs).astype(int).tolist())
  assert all(sorted(order) == list(range(1, 13)) for order in orders)
  assert len(set(map(tuple, orders))) == 6


def test_sampler_and_trainer_are_compared_where_there_is_something_to_compare():
  """Not where no answer counts, which would find them alike whatever they are."""
  for apart in (0.0, 1.0):
    stage = Scripted(*[UNENDED] * 4, ENDED)
    rollouts = rollouts_of(stage, unended='masked')
    assert not rollouts.take(state(apart)).weights.any() and stage.notes[0]['ended'] == 0
    assert len(stage.lines) == 1 and 'no answer of rollout 0 counts' in stage.lines[0]
    if apart:
      with pytest.raises(FloatingPointError, match='the sampler and the trainer differ by 1 nats'):
        rollouts.take(state(apart))
    else:
      rollouts.take(state())
      rollouts.take(state(0.5))  # has been found alike once
      assert len(stage.lines) == 2 and 'sampler and trainer agree' in stage.lines[1]


def test_epochs_that_are_dropped_are_told():
  stage = Scripted(ENDED, UNENDED)
  rollouts = rollouts_of(stage, minibatches=2, epochs=4, stop_kl=0.1)
  for apart in (0.0, 0.5, 0.01, 0.5, 0.5):  # of which the third and the fifth begin an epoch
    rollouts.take(state(apart))
  assert [note['dropped_epochs'] for note in stage.notes] == [0, 2]
  (line,) = [line for line in stage.lines if 'dropped' in line]
  assert line.startswith('rollout 0: 2 of objective.epochs=4 are dropped')
  assert 'moved by 0.149 nats a token, more than objective.stop_kl=0.1' in line


def test_an_answer_without_a_reward_is_null_and_told():
  stage = Scripted(ENDED, FAILED)
  batch = rollouts_of(stage).take(state())
  (note,) = stage.notes
  assert note['rewards'] == [1.0, None] and note['reward'] == 1.0 and note['failed'] == 2
  assert note['ended'] == 4
  assert batch.failed.sum() == 2 and not batch.weights[batch.failed.max(1) > 0].any()
  told = [line for line in stage.lines if 'gave no reward' in line]
  asked = [stage.prompts.order(stage.seed, index).place for index in range(2)]
  assert [place in line for place, line in zip(asked[::-1], told, strict=True)] == [True, True]


def test_what_was_replaced_is_counted():
  """Its tokens took a part of the seconds, and its rewards failed."""
  stage = Scripted(ENDED, ENDED, FAILED, FAILED, ENDED, UNENDED, UNENDED, ENDED)
  batch = rollouts_of(stage, resamplings=1).take(state())
  (note,) = stage.notes
  assert note['replaced'] == 4 and note['failed'] == 2 and not note['equal']
  assert note['tokens'] == 2 * len(ENDED) + 2 * len(FAILED) + 2 * (len(ENDED) + len(UNENDED))
  assert batch.lengths.sum() == 2 * (len(ENDED) + len(UNENDED)) and not batch.failed.any()


def test_rates_are_of_writing_and_of_learning_from_the_one_before(monkeypatch):
  """Of each epoch's tokens, by all that stood between the two."""
  clock = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(
    'objectives.rollout.time', types.SimpleNamespace(perf_counter=lambda: clock.now)
  )

  class Slow(Scripted):
    def answers(self, models, asked):
      clock.now += 0.5
      yield from super().answers(models, asked)

  stage = Slow(ENDED, UNENDED)
  rollouts = rollouts_of(stage, minibatches=2, epochs=2)
  for _ in range(2):
    for _ in range(4):
      rollouts.take(state())
      clock.now += 0.25
  written = 4 * (len(ENDED) + len(UNENDED))
  rates = [note['tokens_per_second'] for note in stage.notes]
  assert rates == [{'generate': 2 * written}, {'generate': 2 * written, 'learn': 2 * written}]


def test_lines_of_another_history_are_dropped_and_told(tmp_path):
  path, lines = tmp_path / 'rollouts.jsonl', []
  first = RolloutJournal(path, lines.append)
  for rollout in range(4):
    first.note(rollout, {'rollout': rollout, 'of': 'first'})
  assert not lines
  again = RolloutJournal(path, lines.append)
  for rollout in (2, 3):
    again.note(rollout, {'rollout': rollout, 'of': 'again'})
  assert [line['of'] for line in read(path)] == ['first', 'first', 'again', 'again']
  assert len(lines) == 1 and lines[0].startswith(
    f'2 lines of {path} are dropped, of rollouts from 2'
  )
  RolloutJournal(path, lines.append).note(4, {'rollout': 4, 'of': 'later'})
  assert len(read(path)) == 5 and len(lines) == 1
