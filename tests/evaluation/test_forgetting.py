"""Is what a model has lost told, by its own definitions, and only of the same questions?"""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from decode.generator import Generator
from evaluation import compare, page, paired, running
from evaluation.examples import Manner
from evaluation.forgetting import (
  AT_CHANCE,
  KEPT,
  LOST,
  NEITHER,
  NO_NUMBER,
  UNSURE,
  Change,
  advice,
  change,
  mean_retention,
)
from evaluation.measures import chance_at, measures, named
from evaluation.task import Classification, Generate, MultipleChoice, Perplexity, Task, read
from tests.evaluation.test_label_scores import generator
from tests.evaluation.test_tasks import CHOICE, ROWS, WRITE

SHARE = named('accuracy', {})
BITS = named('bits per byte', {})


def rates(right: int, n: int = 200) -> list[list[float]]:
  return [[float(i < right), 1.0] for i in range(n)]


def changed(before: int, after: int, chance: float = 0.25) -> Change:
  return change('t', SHARE, rates(before), rates(after), chance)


def test_retention_is_what_its_definition_says():
  made = changed(150, 120)
  assert made.retention.value == pytest.approx(120 / 150)
  assert made.corrected.value == pytest.approx((0.6 - 0.25) / (0.75 - 0.25))
  assert made.difference.value == pytest.approx(-0.15) and made.p == pytest.approx(2**-29)
  assert made.corrected.low < 0.7 < made.corrected.high
  # Lower is better: nats and bytes of each text, twice as many afterwards.
  nats = [[float(i % 7 + 1), 1.0, 1.0, 1.0] for i in range(200)]
  double = [[2 * n, *rest] for n, *rest in nats]
  made = change('t', BITS, nats, double)
  assert made.retention.value == pytest.approx(0.5) and made.corrected is None
  assert not made.better and made.verdict == LOST


def test_who_is_unchanged_has_kept_exactly_everything():
  rng = np.random.default_rng(0)
  for right in (60, 110, 200):
    some = rng.permutation(rates(right)).tolist()
    made = change('t', SHARE, some, some, 0.25)
    assert made.p == 1 and made.difference.values()['value'] == 0
    for each in (made.retention, made.corrected):
      assert each is None or (each.value, each.low, each.high) == (1, 1, 1)
  assert made.verdict == KEPT and mean_retention([made]).value == 1 and not advice([made])


def test_verdicts_are_by_the_worse_of_the_retentions():
  assert changed(180, 178).verdict == KEPT
  assert changed(180, 100).verdict == LOST
  # 88% of the score is kept, and 78% of what is above chance.
  made = changed(110, 97)
  assert made.retention.value > 0.8 > made.corrected.value and made.verdict == LOST
  # 20 of 40 instead of 22, but others: 8 are lost and 6 won.
  sides = [1] * 22 + [0] * 18, [1] * 14 + [0] * 8 + [1] * 6 + [0] * 12
  made = change('t', SHARE, *([[float(x), 1.0] for x in side] for side in sides))
  assert made.retention.value >= 0.8 > made.retention.low and made.verdict == UNSURE
  assert advice([made])[0].startswith('t: not shown above 80%: retention 90.9% [')


def test_at_chance_there_is_nothing_to_keep():
  made = changed(55, 40)
  assert made.corrected is None and made.retention is not None and made.verdict == AT_CHANCE
  assert (
    mean_retention([made, changed(200, 200)]).value == 1 and 'says nothing' in advice([made])[0]
  )
  made = change('t', SHARE, rates(0), rates(5), 0.25)
  assert made.corrected is None and made.retention is None and made.verdict == AT_CHANCE


def test_at_chance_is_who_is_so_by_the_interval_that_is_shown():
  """Wilson's; the bootstrap's would say otherwise of some."""
  for right in range(61, 67):
    shown = SHARE.estimate(np.array(rates(right)), 0)
    assert (changed(right, right).corrected is None) == (shown.low <= 0.25), right


def test_every_accuracy_has_a_chance():
  """Of four choices, by both of its metrics; of labels, macro F1 has at most as much."""
  four = dataclasses.replace(CHOICE, kind=MultipleChoice('options', 'a'))
  labels = Task(Classification('configs/templates/sentiment.toml'), 'x.csv')
  for task, expected in ((four, [0.25] * 2), (labels, [0.25, 0.25, 0.0])):
    names = [measure.name for measure in measures(task)]
    settings = {'shots': 0, 'task': task.values()}
    summary = running.Summary('t', settings, 1, 'ab', 0.25, dict.fromkeys(names, {}), {}, {})
    assert [summary.chance_of(name) for name in names] == expected
  # The score of one's own is of what is asked first, and tells nothing of macro F1.
  labels = dataclasses.replace(labels, chance=0.6)
  assert chance_at('macro F1', ['accuracy', 'macro F1'], 0.6, labels.values()) == 0
  assert chance_at('exact match (SQuAD)', ['chrF2'], 0.5, WRITE.values()) == 0


def test_a_second_accuracy_at_chance_gets_no_verdict(tmp_path):
  metrics = {'mine': ['accuracy (per character)', 'accuracy (sum)']}
  task = {'metrics': [], 'kind': {'name': 'MultipleChoice'}}
  a, b = (written(tmp_path / name, metrics, 0.5, task) for name in 'ab')
  compare.main([a, b])
  values = json.loads((tmp_path / 'b' / compare.VALUES).read_text())['after'][b]
  assert [each['verdict'] for each in values] == [AT_CHANCE] * 2


def test_one_program_a_problem_passes_or_does_not():
  """0 of 164 has Wilson's interval, and not none; two models are compared by McNemar's test."""
  kind = Generate(passed=bool, samples=1)
  one = Task(kind, rows, prompt='{{ q }}', metrics=('pass@1', 'length'))
  several = dataclasses.replace(one, kind=Generate(passed=bool, samples=9, temperature=1.0))
  given = dataclasses.replace(one, kind=Generate('options'))  # whose rows say how many were drawn
  assert [measures(task)[0].rate for task in (one, several, given)] == [True, False, False]
  assert not measures(one)[1].rate
  none = measures(one)[0].estimate(np.array(rates(0, 164)), 0)
  assert (none.low, none.method) == (0, 'wilson') and none.high == pytest.approx(0.0229, abs=1e-4)
  again = named('pass@1', one.values())
  assert change('t', again, rates(0, 9), rates(3, 9)).p == paired.mcnemar(0, 3)


def test_what_has_no_score_is_left_out_and_counted():
  made = change('t', SHARE, [None, *rates(3, 5)], [*rates(3, 5), None])
  assert made.left_out == 2 and made.difference.n == 4
  with pytest.raises(ValueError, match='no question has a score on both sides'):
    change('t', SHARE, [None], [[1.0, 1.0]])


def test_what_is_no_number_is_not_compared(capsys):
  """A perplexity per word, of text without spaces, beyond all numbers; the others stand alone."""
  words = named('perplexity per word', {})
  before, lower = [[800.0, 300.0, 900.0, 1.0]] * 20, [[3.0, 300.0, 900.0, 1.0]] * 20
  for side in (before, lower):
    made = change('zh-0', words, before, side)
    assert made.before == math.inf and made.p is None and made.verdict == NO_NUMBER
    assert made.kept is None and mean_retention([made]) is None and not advice([made])
  row, beside = compare._rows([made, changed(150, 120)])
  assert row[2:9] == ['no number', f'{math.exp(3):.3f}', *[''] * 5]
  assert beside[5] == beside[6], 'Holm corrects for one test'
  compare.show('a', 'b', [made, changed(150, 120)], [])
  said = capsys.readouterr().out
  assert 'NOTE: zh-0: perplexity per word is no number before' in said and 'not compared' in said


def test_of_what_neither_way_is_better_nothing_is_forgotten(tmp_path, capsys):
  for before, after in ((150, 100), (100, 150), (30, 31)):
    made = change('t-0', SHARE, rates(before), rates(after), 0.5, directed=False)
    assert made.verdict == NEITHER and made.kept is None and not advice([made])
    assert made.difference.value == pytest.approx((after - before) / 200) and made.p <= 1
    assert mean_retention([made, changed(200, 200)]).value == 1
  (row,) = compare._rows([made])
  assert row[4] and row[5] and row[7:] == ['', '', NEITHER]
  # By what the results say, and of older ones by what the task does.
  assert not read('crows_pairs')[1].values()['directed'] and CHOICE.values()['directed']
  names = {'crows_pairs': ['accuracy (sum)'], 'mine': ['accuracy (sum)']}
  a, b = (written(tmp_path / name, names) for name in 'ab')
  compare.main([a, b])
  values = json.loads((tmp_path / 'b' / compare.VALUES).read_text())['after'][b]
  assert {each['task']: each['verdict'] for each in values} == {
    'crows_pairs-0': NEITHER,
    'mine-0': KEPT,
  }
  assert 'mean retention of 1 task: 100.0%' in capsys.readouterr().out


def written(directory, metrics: dict[str, list[str]], chance=0.0, about=None) -> str:
  """Results by hand, of tasks with these metrics: each is right in half of 20 questions."""
  directory.mkdir()
  for task, of in metrics.items():
    settings = {'shots': 0, 'task': about or {'metrics': []}}
    summary = running.Summary(task, settings, 20, 'ab', chance, dict.fromkeys(of, {}), {}, {})
    (directory / f'{task}-0.json').write_text(json.dumps(vars(summary)))
    stats = [dict.fromkeys(of, [float(i % 2), 1.0]) for i in range(20)]
    lines = [json.dumps({'digest': str(i), 'stats': each}) for i, each in enumerate(stats)]
    (directory / f'{task}-0.jsonl').write_text('\n'.join(lines) + '\n')
  return str(directory)


def test_a_metric_of_ones_own_is_refused_alone(tmp_path, capsys):
  metrics = {'mine': ['my mean', 'accuracy (sum)'], 'other': ['accuracy (sum)']}
  a, b = (written(tmp_path / name, metrics) for name in 'ab')
  compare.main([a, b])
  said = capsys.readouterr().out
  assert "NOTE: mine-0: 'my mean' is a metric of a task of its own" in said
  values = json.loads((tmp_path / 'b' / compare.VALUES).read_text())['after'][b]
  assert [each['task'] for each in values] == ['mine-0', 'other-0']
  whole = json.loads((tmp_path / 'b' / compare.VALUES).read_text())
  assert whole['prompts'] == {'mine-0': 'ab', 'other-0': 'ab'} and whole['runs'] == {a: {}, b: {}}
  assert '| mine-0 | ab |' in (tmp_path / 'b' / compare.PAGE).read_text()
  assert {'value', 'low', 'high', 'n'} <= whole['mean retention'][b].keys()
  c, d = (written(tmp_path / name, {'mine': ['my mean']}) for name in 'cd')
  with pytest.raises(SystemExit, match='have no metric that can be compared'):
    compare.main([c, d])


def test_a_target_that_was_at_nothing_before_has_a_point():
  """Its gain as it is; else in per cent of what it was."""
  others = change('kept-0', SHARE, rates(150), rates(120))
  for before, gain, label in ((0, 0.3, 'gain on new'), (40, 150.0, 'gain on new, %')):
    target = change('new-0', SHARE, rates(before), rates(before + 60))
    ax = Figure().subplots()
    compare._trade_off(ax, {'after': [target, others]}, ['new'])
    assert ax.lines[0].get_xydata().tolist() == [pytest.approx([80, gain])]
    assert ax.get_ylabel() == label
    across, up = (bars.get_segments()[0] for bars in ax.collections)
    kept, gap = others.retention, target.difference
    assert across[:, 0].tolist() == pytest.approx([100 * kept.low, 100 * kept.high])
    unit = gain / gap.value
    assert up[:, 1].tolist() == pytest.approx([unit * gap.low, unit * gap.high])


# The command, on two models.


def rows():
  return iter(ROWS)


FORETELL = Task(Perplexity(), rows, prompt='{{ q }} {{ options }}')
TASKS = {'choose': CHOICE, 'foretell': FORETELL}


@pytest.fixture(scope='module')
def evaluations(tmp_path_factory):
  """Directories of two models, and one of the first with other examples."""
  directory = tmp_path_factory.mktemp('compared')
  first = generator('llama')
  other = jax.tree.map(lambda x: x * 0.5, first.model)
  models = {'a': first, 'b': Generator(other, first.tokenizer, first.mesh)}
  for name, model in models.items():
    (directory / name).mkdir()
    _, failed = running.evaluate(
      model, TASKS, [0], Manner(), {'workdir': name}, directory / name, [].append
    )
    assert not failed
    page.write(directory / name, {'workdir': name}, {})
  (directory / 'c').mkdir()
  asked = {'choose': dataclasses.replace(CHOICE, prompt='{{ q }}')}
  running.evaluate(first, asked, [0], Manner(), {'workdir': 'c'}, directory / 'c', [].append)
  return directory


@pytest.mark.slow
def test_two_evaluations_are_compared_question_by_question(evaluations, capsys):
  a, b = (str(evaluations / name) for name in 'ab')
  compare.main([a, b, '--target=choose'])
  said = capsys.readouterr().out
  assert 'foretell-0' in said and 'mean retention of 1 task:' in said and 'target choose-0' in said
  values = json.loads((evaluations / 'b' / compare.VALUES).read_text())
  by_name = {(each['task'], each['metric']): each for each in values['after'][b]}
  lines = [
    [json.loads(line) for line in open(evaluations / name / 'foretell-0.jsonl')] for name in 'ab'
  ]
  nats = [sum(line['nats'] for line in of) for of in lines]
  bits = by_name['foretell-0', 'bits per byte']
  assert bits['retention']['value'] == pytest.approx(nats[0] / nats[1])
  assert {metric for _, metric in by_name} >= {'accuracy (sum)', 'accuracy (per character)'}
  assert (evaluations / 'b' / compare.PICTURE).read_bytes()[:4] == b'\x89PNG'
  assert 'p (Holm)' in (evaluations / 'b' / compare.PAGE).read_text()


def test_a_model_compared_with_itself_is_exactly_the_same(evaluations, tmp_path, capsys):
  a = str(evaluations / 'a')
  compare.main([a, a, f'--output={tmp_path}', '--seed=5'])
  said = capsys.readouterr().out
  assert 'seed 5: ' in said and json.loads((tmp_path / compare.VALUES).read_text())['seed'] == 5
  assert 'Seed of intervals and tests: 5.' in (tmp_path / compare.PAGE).read_text()
  # Weights of no training choose by chance.
  assert 'mean retention of 1 task: 100.0%' in said and 'WARNING' not in said
  for each in json.loads((tmp_path / compare.VALUES).read_text())['after'][a]:
    assert each['difference']['value'] == each['difference']['low'] == 0
    assert each['retention'] is None or each['retention']['low'] == 1


@pytest.mark.parametrize(
  'arguments, said',
  [
    (['a', 'c'], "choose-0 was asked otherwise: task.prompt was 'Q: {{ q }}?"),
    (['a', 'nowhere'], 'nowhere has no evaluation'),
    (['a', 'b', '--target=chooses'], '--target=chooses is none of the tasks'),
  ],
  ids=range(3),
)
def test_what_cannot_be_compared_is_said(evaluations, monkeypatch, arguments, said):
  monkeypatch.chdir(evaluations)
  with pytest.raises(SystemExit) as error:
    compare.main(arguments)
  assert said in str(error.value)


def test_measures_are_known_again_by_their_names():
  for task in (*TASKS.values(), WRITE):
    for measure in measures(task):
      again = named(measure.name, task.values())
      assert (again.name, again.lower_is_better, again.rate) == (
        measure.name,
        measure.lower_is_better,
        measure.rate,
      )
  with pytest.raises(ValueError, match='how it adds up is not known'):
    named('my own', {'metrics': ['chrf']})
