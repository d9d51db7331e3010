"""Is an answer worth what its judges say, to the last bit, and is one that got no score told,
counted, and never 0; whatever a reward function does?
"""

import numpy as np
import pytest

from data.prompts import Prompt
from objectives.judges import Answer, FileJudge, Judges, ModelJudge, totals

PROMPT = Prompt('asked.jsonl:7', (1, 5), 'a', {'prompt': 'a', 'worth': 0.7})


def judged(tmp_path, body, texts, seconds=20.0, head=''):
  path = tmp_path / 'own.py'
  path.write_text(f'{head}\ndef reward(text, record):\n  {body}\n')
  judges = Judges([FileJudge(str(path), seconds)], [1.0])
  try:
    for text in texts:
      judges.submit(Answer(PROMPT, (1, 2), text))
    return judges.scores()
  finally:
    judges.close()


def test_rewards_stay_what_they_are(tmp_path):
  """Fractions and signs: in what an array of ids would make of them, -1.9 is -1."""
  made = judged(tmp_path, 'return record["worth"] * len(text) - 1.9', ['', 'x', 'xxx'])
  assert made.each.dtype == np.float64 and not made.failures
  assert made.each[0].tolist() == [-1.9, 0.7 - 1.9, 0.7 * 3 - 1.9]


def test_what_gives_no_score_is_named_and_no_zero(tmp_path):
  body = (
    'import os, math\n'
    '  print("noise")\n'
    '  if text == "raises": raise KeyError("gone")\n'
    '  if text == "exits": os._exit(3)\n'
    '  odd = {"nan": math.nan, "text": "1", "none": None, "inf": math.inf, "1e39": 1e39}\n'
    '  odd["huge"] = 10**400\n'
    '  return odd.get(text, 1)'
  )
  texts = ['ok', 'raises', 'nan', 'exits', 'text', 'none', 'inf', '1e39', 'huge', 'ok']
  made = judged(tmp_path, body, texts)
  assert np.isnan(made.each[0, 1:-1]).all() and made.each[0, [0, -1]].tolist() == [1, 1]
  assert len(made.failures) == 8
  for failure, text, why in zip(
    made.failures,
    texts[1:],
    ('KeyError', 'nan', 'ended its process', "'1'", 'None', 'inf', '1e+39', 'OverflowError'),
  ):
    assert 'asked.jsonl:7' in failure and repr(text) in failure and why in failure


def test_one_that_hangs_is_ended(tmp_path):
  body = 'import time\n  time.sleep(60 if text == "hangs" else 0)\n  return 0.5'
  made = judged(tmp_path, body, ['hangs', 'ok', 'ok'], seconds=0.5)
  assert np.isnan(made.each[0, 0]) and made.each[0, 1:].tolist() == [0.5, 0.5]
  assert 'more than 0.5 s' in made.failures[0]


@pytest.mark.parametrize(
  'source, said',
  [
    ('def rewards(text, record): return 1', 'no function reward'),
    ('import nothing_of_this_name', 'nothing_of_this_name'),
    ('import os; os._exit(1)', 'ended its process'),
  ],
)
def test_a_file_that_cannot_judge_is_refused_at_once(tmp_path, source, said):
  path = tmp_path / 'own.py'
  path.write_text(source)
  with pytest.raises(ValueError, match=said):
    FileJudge(str(path), 1.0)
  with pytest.raises(ValueError, match='is no Python file'):
    FileJudge(str(tmp_path / 'none.py'), 1.0)


def test_a_model_reads_prompt_and_answer():
  read = []

  def scores(ids):
    read.extend(ids)
    return np.array([sum(each) / 10 for each in ids])

  judges = Judges([ModelJudge('runs/reward', scores, {'gain': 2.0})], [2.0])
  judges.submit(Answer(PROMPT, (8, 2), 'x'))
  made = judges.scores()
  assert read == [[1, 5, 8, 2]] and made.each.tolist() == [[1.6]]
  assert totals(made.each, judges.weights).tolist() == [3.2]
  assert judges.scores().each.shape == (1, 0)  # each is asked for once


def test_a_model_that_says_no_number_gives_no_score():
  """Told and counted as a file's, each by its prompt; the others have theirs."""
  said = [0.5, np.nan, -np.inf, 1e39, -2.0]
  judges = Judges([ModelJudge('runs/reward', lambda ids: np.array(said), {})], [1.0])
  for text in 'abcde':
    judges.submit(Answer(PROMPT, (8, 2), text))
  made = judges.scores()
  np.testing.assert_array_equal(made.each, [[0.5, np.nan, np.nan, np.nan, -2.0]])
  assert len(made.failures) == 3
  for failure, text, value in zip(made.failures, 'bcd', ('nan', '-inf', '1e+39')):
    assert f"runs/reward gave no reward to an answer to asked.jsonl:7 ('{text}')" in failure
    assert f'it said {value}, which is no finite number' in failure


def test_another_reward_is_told_from_the_one_before(tmp_path):
  path = tmp_path / 'own.py'
  said = []
  for worth in ('0', '1', '0'):
    path.write_text(f'def reward(text, record): return {worth}')
    judge = FileJudge(str(path), 1.0)
    said.append(Judges([judge, ModelJudge('runs/reward', list, {'gain': 2.0})], [1.0, 1.0]).of)
    judge.close()
  assert said[0] == said[2] != said[1] and said[1]['runs/reward'] == {'gain': 2.0}
  assert said[0].keys() == {str(path), 'runs/reward'}


def test_a_file_that_is_edited_judges_as_it_was(tmp_path):
  """All answers, those of processes that begin later too, by what the run says that it learned
  from; whatever encoding the file is in.
  """
  path = tmp_path / 'own.py'
  source = '# coding: latin-1\nimport os\ndef reward(text, record):\n  {}  # \xe9\n'
  body = "return os._exit(1) if text == 'exits' else float(len('\xe9'))"
  path.write_text(source.format(body), 'latin-1')
  judges = Judges([FileJudge(str(path), 20.0)], [1.0])
  of = judges.of
  try:
    path.write_text('def reward(text, record): return 2.0')
    for text in ['ok', *['exits'] * 8, *['ok'] * 8]:
      judges.submit(Answer(PROMPT, (1, 2), text))
    assert judges.scores().each[0, [0, *range(9, 17)]].tolist() == [1.0] * 9
  finally:
    judges.close()
  assert judges.of == of


def test_sums_of_several():
  each = np.array([[1.0, 2.0, 3.0, np.nan], [10.0, 10.0, 40.0, 10.0]])
  weights = np.array([1.0, 0.5])
  np.testing.assert_array_equal(totals(each, weights), [6, 7, 23, np.nan])
  scaled = totals(each, weights, group=2)
  # (1, 2) -> -+ sqrt(1 / 2); (10, 10) -> 0; (3, nan) -> 0; (40, 10) -> +- sqrt(1 / 2)
  half = np.sqrt(0.5)
  np.testing.assert_allclose(scaled, [-half, half, half / 2, np.nan], atol=1e-5)
