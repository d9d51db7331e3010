"""Are questions found that stand in the text a model was trained on, and no others?"""

import json
import random

import numpy as np
import pytest

from evaluation import contamination, page, running
from evaluation.contamination import LEAST, WORDS, Runs, contaminated
from evaluation.examples import Item, Manner, digest_of, examples
from evaluation.task import MultipleChoice, Task
from tests.evaluation.test_label_scores import generator

VOCABULARY = [f'w{i}' for i in range(2000)]


def sentence(draw, n):
  return ' '.join(draw.choices(VOCABULARY, k=n))


def items(draw, n, words=20):
  return [Item(f'q:{i}', {}, sentence(draw, words) + '?', choices=('yes', 'no')) for i in range(n)]


def test_runs_are_found_whatever_their_case_and_punctuation():
  draw = random.Random(0)
  asked = items(draw, 40)
  words = contamination.words_of(asked[3].prompt)
  inside = ', '.join(words[4 : 4 + WORDS]).upper()
  training = [
    f'{sentence(draw, 50)} -- {inside}! {sentence(draw, 50)}',
    asked[7].prompt,
    # One word less, and all words in another order, are no run.
    ' '.join(contamination.words_of(asked[9].prompt)[: WORDS - 1]),
    ' '.join(reversed(contamination.words_of(asked[11].prompt))),
  ]
  (made,) = contaminated({'t': asked}, iter(training))
  assert {*made.shown} == {3, 7} and made.shown[3] == ' '.join(words[4 : 4 + WORDS])
  assert made.share.value == 2 / 40 and made.share.n == 40 and made.short == 0


def test_it_is_what_looking_for_every_run_everywhere_finds():
  draw = random.Random(1)
  few = VOCABULARY[:3]  # of which runs are met often

  def texts(n, words):
    return [' '.join(draw.choices(few, k=words)) for _ in range(n)]

  asked, training = texts(60, 12), texts(40, 60)
  runs = Runs(LEAST)
  assert all([runs.add(text, i) for i, text in enumerate(asked)])
  found = {}
  for text in training:
    found |= runs.within(text)
  padded = [f' {text} ' for text in training]
  grams = {
    i: [' '.join(text.split()[j : j + LEAST]) for j in range(12 - LEAST + 1)]
    for i, text in enumerate(asked)
  }
  expected = {i for i, of in grams.items() if any(f' {g} ' in text for g in of for text in padded)}
  assert {*found} == expected and 0 < len(expected) < 60


def test_short_questions_are_counted_apart():
  draw = random.Random(2)
  short = [Item(f's:{i}', {}, sentence(draw, LEAST - 2), choices=('y', 'n')) for i in range(5)]
  middle = Item('m', {}, sentence(draw, LEAST + 1))  # looked for whole
  (made,) = contaminated({'t': [*short, middle]}, [middle.prompt, *(s.prompt for s in short)])
  assert made.short == 5 and {*made.shown} == {5} and made.share.n == 1
  with pytest.raises(ValueError, match=f'no question has {LEAST} words'):
    contaminated({'t': short}, [])
  with pytest.raises(ValueError, match='--words=3 are found by chance; give at least 8'):
    Runs(3)


def test_words_are_those_of_any_script():
  said = ' '.join(f'क{mark}' for mark in 'ािीुूेैो')
  asked = [Item('q', {}, said)]
  (made,) = contaminated({'t': asked}, [' '.join(reversed(said.split()))])
  assert not made.shown and {*contaminated({'t': asked}, [f'"{said}"'])[0].shown} == {0}


def test_a_wrong_choice_gives_nothing_away():
  """Alone, or behind the question; the right one does, and the label of a text."""
  draw = random.Random(4)
  question, right, wrong = sentence(draw, 6), sentence(draw, 9), sentence(draw, 9)
  asked = [
    Item(f'q:{i}', {}, question, choices=choices, truth=truth)
    for i, (choices, truth) in enumerate((((wrong, right), 1), ((wrong, right), 0), ((right,), 0)))
  ]
  for training, expected in (
    ([f'people say {wrong} here', f'{question} {wrong}'], {1}),
    ([f'people say {right} here'], {0, 2}),
  ):
    (made,) = contaminated({'t': asked}, training)
    assert {*made.shown} == expected and made.share.n == 3


def test_the_command_tells_scores_apart(tmp_path, capsys):
  draw = random.Random(3)
  # The last three are too short to be looked for.
  rows = [
    {'q': sentence(draw, 15 if i < 9 else 3), 'c': ['left', 'right'], 'a': i % 2} for i in range(12)
  ]
  (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  text = "Task(MultipleChoice('c', 'a'), 'rows.jsonl', prompt='{{ q }}')"
  own = f'from evaluation.task import MultipleChoice, Task\n\n\ndef get_task():\n  return {text}\n'
  (tmp_path / 'own.py').write_text(own)
  (tmp_path / 'corpus.jsonl').write_text(
    ''.join(json.dumps({'body': row['q']}) + '\n' for row in rows[:5]) + 'no json\n'
  )
  task = Task(MultipleChoice('c', 'a'), 'rows.jsonl', prompt='{{ q }}')
  manner = Manner(str(tmp_path))
  running.evaluate(generator('llama'), {'own': task}, [0], manner, {'workdir': 'x'}, tmp_path)
  page.write(tmp_path, {'workdir': 'x'}, {})

  flags = [f'--tasks={tmp_path}/own.py', f'--data={tmp_path}', f'--results={tmp_path}']
  flags += [f'--training={tmp_path}/corpus.jsonl', '--field=body']
  contamination.main(flags)
  said = capsys.readouterr().out
  assert 'WARNING: malformed: 1' in said and '5 documents' in said and 'seed 0: ' in said
  (made,) = json.loads((tmp_path / contamination.FILE).read_text())['tasks']
  assert [*made['found']] == ['0', '1', '2', '3', '4'] and made['share']['value'] == 5 / 9
  lines = [json.loads(line) for line in (tmp_path / 'own-0.jsonl').read_text().splitlines()]
  right = [line['stats'][made['metric']][0] for line in lines]
  assert made['scores']['found']['value'] == np.mean(right[:5])
  assert made['scores']['others']['value'] == np.mean(right[5:9])
  assert made['scores']['others']['n'] == 4 and made['short'] == 3
  asked = examples(task, 0, manner)
  assert asked[0].digest == lines[0]['digest'] and made['prompts'] == digest_of(asked)

  said = (tmp_path / contamination.PAGE).read_text()
  assert f'| own | 9 | {running.shown(made["share"])} | 3 |' in said and made['prompts'] in said
  assert made['found']['0'] in said and 'Runs of 13 words in ' in said

  with pytest.raises(SystemExit, match='another evaluation .words was 13 and is 12'):
    contamination.main([*flags, '--words=12'])
  other = {'q': sentence(draw, 15), 'c': ['a', 'b'], 'a': 0}
  (tmp_path / 'rows.jsonl').write_text(json.dumps(other) + '\n')
  with pytest.raises(SystemExit, match='is not what was asked; give the --data'):
    contamination.main(flags)
  with pytest.raises(SystemExit, match='must end in one of'):
    contamination.main([*flags, '--training=corpus.bin'])
