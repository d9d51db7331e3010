"""Is what a task asks what it says, is every score that of a forward pass by hand, and does an
evaluation that was interrupted end with the same bytes?
"""

import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from data.batch import Batch
from decode.choices import PairScore
from evaluation import page, running, scoring, task as tasks, writing
from evaluation.differences import differences
from evaluation.examples import Asker, Manner, digest_of, examples, fitted
from evaluation.intervals import wilson
from evaluation.prompts import Shots
from evaluation.scoring import scorer, windows
from evaluation.task import Generate, MultipleChoice, Perplexity, Task
from objectives import next_token
from tests.evaluation.test_label_scores import generator

ROWS = [
  {
    'q': f'is it {i % 7}',
    'options': [f'no {i}', 'yes', f'perhaps {i * i}'][: 2 + i % 2],
    'a': i % 2,
  }
  for i in range(20)
]


def rows():
  return iter(ROWS)


CHOICE = Task(MultipleChoice('options', 'a'), rows, prompt='Q: {{ q }}?\nA:', balanced='a')
WRITE = Task(
  Generate(stops=('7', 'zz'), max_new_tokens=6),
  rows,
  prompt='{{ q }} ',
  target='{{ options[a] }}',
  metrics=('chrf', 'exact_match'),
)
FORETELL = Task(Perplexity(window=24, stride=10), rows, prompt='{{ q }} {{ options }} and so on')
QUIET = Manner()


def lines_of(task, manner=QUIET, k=0, name='llama', **sizes):
  asked = examples(task, k, manner)
  scored = scorer(generator(name, **sizes), task, manner, asked)
  return [line for some in scored.lines() for line in some], scored


def check_choices_by_hand() -> None:
  """Each choice alone, by Generator.score, for every normalisation."""
  g = generator('llama')
  for normalise in tasks.NORMALISATIONS:
    task = dataclasses.replace(CHOICE, kind=MultipleChoice('options', 'a', normalise=normalise))
    lines, _ = lines_of(task, k=2)
    for line, each in list(zip(lines, examples(task, 2, QUIET)))[:3]:
      shown = ''.join(f'{q} {a}\n\n' for q, a in each.shots)
      sums, per = [], []
      for choice in each.choices:
        (logs,) = g.score([shown + each.prompt + f' {choice}'])
        tokens = len(choice) + 1  # of bytes, with the space
        sums.append(float(logs[-tokens:].sum()))
        size = {'sum': 1, 'token': tokens, 'character': len(choice), 'byte': len(choice.encode())}
        per.append(sums[-1] / size[normalise])
      np.testing.assert_allclose(line['logprobs'], sums, atol=5e-5)
      right = [int(np.argmax(scores) == each.truth) for scores in (per, sums)]
      said = [line['stats'][name][0] for name in line['stats']]
      assert said == right[: len(said)] and line['said'] == np.argmax(per)


def test_choices_are_scored_as_by_hand():
  check_choices_by_hand()


def test_a_fault_in_what_is_asked_is_found(monkeypatch):
  """An answer without its space; a shot that is left out."""
  with monkeypatch.context() as patch:
    patch.setattr(Asker, 'answer', lambda self, choice: choice)
    with pytest.raises(AssertionError):
      check_choices_by_hand()
  text = Asker.text
  monkeypatch.setattr(
    Asker, 'text', lambda self, each: text(self, dataclasses.replace(each, shots=each.shots[1:]))
  )
  with pytest.raises(AssertionError):
    check_choices_by_hand()


def test_order_of_choices_company_and_devices_change_nothing(monkeypatch):
  expected, scored = lines_of(CHOICE)
  turned = [r | {'options': r['options'][::-1], 'a': len(r['options']) - 1 - r['a']} for r in ROWS]
  other = dataclasses.replace(CHOICE, data=lambda: iter(turned))
  for line, swapped in zip(expected, lines_of(other)[0]):
    np.testing.assert_allclose(swapped['logprobs'][::-1], line['logprobs'], atol=5e-5)
    assert swapped['stats'] == line['stats']
  monkeypatch.setattr(scoring.Scorer, 'block', 3)
  for line, alone in zip(expected, lines_of(CHOICE)[0], strict=True):
    np.testing.assert_allclose(alone['logprobs'], line['logprobs'], atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize('task', [CHOICE, WRITE, FORETELL], ids=['choice', 'write', 'foretell'])
def test_eight_devices_score_alike(task):
  expected, made = lines_of(task)[0], lines_of(task, data=8)[0]
  for a, b in zip(expected, made, strict=True):
    assert a.get('answers') == b.get('answers') and a.get('said') == b.get('said')
    for name in ('logprobs', 'nats'):
      np.testing.assert_allclose(a.get(name, 0), b.get(name, 0), atol=2e-3)


def test_pmi_takes_off_what_is_said_of_nothing():
  kind = MultipleChoice('options', 'a', normalise='sum', calibration='pmi', empty='A:')
  lines, scored = lines_of(dataclasses.replace(CHOICE, kind=kind))
  g = generator('llama')
  for line, row in list(zip(lines, ROWS))[:3]:
    nothing = [g.score([f'A: {o}'])[0][-len(o) - 1 :].sum() for o in row['options']]
    np.testing.assert_allclose(line['logprobs behind nothing'], nothing, atol=5e-5)
    assert line['said'] == np.argmax(np.array(line['logprobs']) - nothing)
  assert scored.measures[0].name == 'accuracy (pmi)' and scored.chance == pytest.approx(5 / 12)


def test_minimal_pairs_are_choices_without_a_prompt():
  pairs = [{'good': 'it is', 'bad': 'it are'}, {'good': 'they are', 'bad': 'they is'}]
  task = Task(MultipleChoice(('{{ good }}', '{{ bad }}'), 0, normalise='sum'), lambda: iter(pairs))
  lines, _ = lines_of(task)
  for line, pair in zip(lines, pairs):
    sums = [logs.sum() for logs in generator('llama').score([*pair.values()])]
    np.testing.assert_allclose(line['logprobs'], sums, atol=5e-5)


@pytest.mark.parametrize('name', ['pairs', 'choice'])
def test_who_tells_nothing_apart_is_right_in_no_pair(name):
  """Of choices behind a prompt the first of those that are as likely is said, as lm_eval has it."""
  pairs = Task(MultipleChoice(('{{ q }}', '{{ q }}.'), 0, normalise='sum'), rows)
  task, said = {'pairs': (pairs, -1), 'choice': (CHOICE, 0)}[name]
  asked = examples(task, 0, QUIET)[0]
  scored = scorer(generator('llama'), task, QUIET, [asked])
  choices = dataclasses.replace(asked, choices=('ab', 'cd'))
  scores = [PairScore(logprob, 2, False) for logprob in (-5.0, -5.0, -4.0)]
  line = scored._line(choices, scores[:2], None)
  right = float(said == asked.truth)
  assert line['said'] == said and all(of == [right, 1.0] for of in line['stats'].values())
  assert not line['nan'] and scored._line(choices, scores[1:], None)['said'] == 1


# Examples that are shown.


def leaked() -> int:
  """Questions that stand before themselves. There are seven, each twice or more."""
  return sum(
    each.prompt in [prompt for prompt, _ in each.shots]
    for seed in range(8)
    for k in (1, 2, 5)
    for each in examples(CHOICE, k, Manner(seed=seed))
  )


def test_shots_never_leak_the_one_that_is_asked(monkeypatch):
  """Not even where another row asks the same; who shows whatever comes first leaks."""
  assert not leaked() and all(len(each.shots) == 5 for each in examples(CHOICE, 5, QUIET))
  before = Shots.before
  monkeypatch.setattr(Shots, 'before', lambda self, text=None: before(self))
  assert leaked()


def test_shots_are_balanced_and_a_function_of_the_seed():
  pool = [{'q': f'question {i}', 'options': ['no', 'yes'], 'a': int(i > 15)} for i in range(20)]
  task = dataclasses.replace(CHOICE, data=lambda: iter(pool))
  for each in examples(task, 4, QUIET):
    assert sorted(answer for _, answer in each.shots) == ['no', 'no', 'yes', 'yes']
  shown = [[e.shots for e in examples(task, 4, Manner(seed=seed))] for seed in (0, 0, 1)]
  assert shown[0] == shown[1] != shown[2]
  with pytest.raises(ValueError, match="shots=10 shows 5 examples of label '1', and there are 4"):
    examples(task, 10, QUIET)
  # From another file: none of what is asked.
  task = dataclasses.replace(task, shots=lambda: iter(ROWS))
  assert all(p.startswith('Q: is it') for e in examples(task, 2, QUIET) for p, _ in e.shots)


# Perplexity.


@pytest.mark.parametrize('size, new', [(8, 8), (8, 3), (100, 100), (5, 1)])
def test_windows_score_every_token_once_behind_as_many_as_fit(size, new):
  ids = [*range(100, 137)]
  check_windows(windows(ids, 1, size, new), ids, size)
  # A token twice, or one that is left out.
  for wrong in (lambda i, p: (p[0], ids[i : i + 1] + p[1]), lambda i, p: (p[0], p[1][1:])):
    parts = [wrong(i, part) for i, part in enumerate(windows(ids, 1, size, new))]
    with pytest.raises(AssertionError):
      check_windows(parts, ids, size)


def check_windows(parts, ids, size) -> None:
  assert [i for _, part in parts for i in part] == ids
  whole, at = [1, *ids], 1
  for context, part in parts:
    assert context == whole[at - len(context) : at]
    assert len(context) + len(part) - 1 <= size
    assert len(context) + len(part) - 1 == min(size, at + len(part) - 1), 'no room is left unused'
    at += len(part)


def test_perplexity_is_the_training_loss():
  """That of objectives/next_token.py on the same tokens, a document in a row."""
  g = copy.copy(generator('llama'))
  g.vocabulary = g.model.config.V  # where a config names no limit, it trains on all rows
  task = Task(Perplexity(), rows, prompt='{{ q }}, {{ options }}')
  scored = scorer(g, task, QUIET, examples(task, 0, QUIET))
  lines = [line for some in scored.lines() for line in some]
  total = np.sum([line['stats']['nats per token'] for line in lines], 0)
  batch = Batch.empty(len(lines), 48)
  for row, each in enumerate(scored.asked):
    ids = np.array(g.encoded(each.prompt), np.int32)
    n = len(ids) - 1
    batch.tokens[row, :n], batch.targets[row, :n] = ids[:-1], ids[1:]
    batch.positions[row, :n], batch.segments[row, :n] = np.arange(n), 1
    batch.weights[row, :n] = 1
  with jax.set_mesh(g.mesh):
    loss_of = jax.jit(lambda model, batch: next_token.summed_loss(model, batch, 0.0)[1])
    sums = loss_of(g.model, batch)
  assert total[1] == sums['tokens']
  loss = float(sums['nll'] / sums['tokens'])
  assert scored.measures[3].value(total) == pytest.approx(loss, abs=1e-5)
  bytes_ = sum(len(each.prompt.encode()) for each in scored.asked)
  expected = float(sums['nll']) / bytes_ / np.log(2)
  assert scored.measures[0].value(total) == pytest.approx(expected, rel=1e-6)


# Generation.


@pytest.mark.slow
def test_answers_are_those_of_the_generator():
  """Which go side by side there, and join one another here; seeds are those of its prompts."""
  prompts = [f'{row["q"]} ' for row in ROWS[:6]]
  drawn = Generate(stops=('7',), max_new_tokens=6, temperature=1.0, samples=2)
  for kind in (WRITE.kind, drawn):
    lines, _ = lines_of(dataclasses.replace(WRITE, kind=kind), Manner(limit=6, seed=3))
    options = {'temperature': kind.temperature, 'num_samples': kind.samples, 'seed': 3}
    expected = generator('llama')(prompts, max_new_tokens=6, stop=kind.stops, **options)
    assert [text for line in lines for text in line['answers']] == [row.text for row in expected]
    assert [each for line in lines for each in line['finish']] == [row.finish for row in expected]


@pytest.mark.slow
def test_an_encoder_decoder_writes_and_chooses():
  """By the same engine: what is written of one does not depend on which others are asked."""
  drawn = Generate(stops=('7',), max_new_tokens=6, temperature=1.0, samples=2)
  for kind in (WRITE.kind, drawn):
    task = dataclasses.replace(WRITE, kind=kind)
    lines, _ = lines_of(task, Manner(limit=6, seed=3), name='t5')
    options = {'temperature': kind.temperature, 'num_samples': kind.samples, 'seed': 3}
    prompts = [f'{row["q"]} ' for row in ROWS[:6]]
    expected = generator('t5')(prompts, max_new_tokens=6, stop=kind.stops, **options)
    assert [text for line in lines for text in line['answers']] == [row.text for row in expected]
  assert len(lines_of(CHOICE, name='t5')[0]) == len(ROWS)


def test_what_a_model_cannot_be_asked_is_said():
  for name, task, said in (
    ('t5', FORETELL, 'this model is an encoder-decoder'),
    ('bert', CHOICE, 'this one is an encoder'),
  ):
    with pytest.raises(ValueError, match=said):
      lines_of(task, name=name)
  with pytest.raises(ValueError, match='has no chat template'):
    lines_of(CHOICE, Manner(chat=True))


def dated(tokenizer, day):
  """With a chat template that says which day it is."""
  made = copy.copy(tokenizer)
  made.chat_templates = {'default': f'{day}: {{{{ messages[0].content }}}}'}
  return made


def test_a_chat_is_asked_the_same_on_every_day(tmp_path, monkeypatch):
  model, (each, *_), settings = generator('llama'), examples(CHOICE, 0, QUIET), {}
  own = model.tokenizer
  for name, day in (('dated', "{{ strftime_now('%Y-%m-%d') }}"), ('fixed', '2020')):
    monkeypatch.setattr(model, 'tokenizer', dated(own, day))
    text = Asker(model, CHOICE, Manner(chat=True)).text(each)
    assert text == f'{"2024-07-26" if name == "dated" else "2020"}: {each.prompt}'
    (tmp_path / name).mkdir()
    evaluated(tmp_path / name, Manner(chat=True), (0,), {'choose': CHOICE})
    settings[name] = json.loads((tmp_path / name / 'choose-0.json').read_text())['settings']
  assert settings['dated']['day'] == '2024-07-26' and 'day' not in settings['fixed']
  assert settings['dated']['chat_template'] != settings['fixed']['chat_template']

  # Another template is another evaluation; of older results, on whatever day, only the day is.
  monkeypatch.setattr(model, 'tokenizer', dated(own, '2021'))
  with pytest.raises(ValueError, match='chat_template was .* and is '):
    evaluated(tmp_path / 'fixed', Manner(chat=True), (0,), {'choose': CHOICE})
  for now in settings.values():
    older = {key: value for key, value in now.items() if key not in ('chat_template', 'day')}
    apart = differences(older, now)
    assert apart == (["day was None and is '2024-07-26'"] if 'day' in now else [])


# What is written.


def evaluated(output, manner=QUIET, shots=(0, 2), asked=None, said=None):
  asked = asked or {'choose': CHOICE, 'write': WRITE, 'foretell': FORETELL}
  log = (said if said is not None else []).append
  return running.evaluate(generator('llama'), asked, shots, manner, {'step': 3}, output, log)


def content(output):
  return {path.name: path.read_bytes() for path in output.iterdir()}


@pytest.mark.slow
def test_what_was_interrupted_ends_with_the_same_bytes(tmp_path, monkeypatch):
  """Wherever a kill came: between blocks, within a line, before the summary."""
  monkeypatch.setattr(scoring.Scorer, 'block', 6)
  monkeypatch.setattr(scoring.Foretelling, 'block', 6)
  whole, part = tmp_path / 'whole', tmp_path / 'part'
  whole.mkdir()
  summaries, failed = evaluated(whole, shots=(0,))
  assert not failed and len(summaries) == 3
  shutil.copytree(whole, part)
  expected = content(whole)
  calls = []
  pairs = scoring.score_pairs
  monkeypatch.setattr(
    scoring, 'score_pairs', lambda m, c, b: calls.append(len(c)) or pairs(m, c, b)
  )
  for name in ('choose-0', 'write-0', 'foretell-0'):
    lines = expected[f'{name}.jsonl']
    line = lines.index(b'\n', len(lines) // 2) + 1
    for cut in (line, line + 9, len(lines)) if name != 'write-0' else (line + 9,):
      (part / f'{name}.jsonl').write_bytes(lines[:cut])
      kept = json.loads(expected[f'{name}.json'])
      (part / f'{name}.json').write_text(json.dumps({'settings': kept['settings']}))
      evaluated(part, shots=(0,))
      assert content(part) == expected, (name, cut)
  # All of them anew would be 330 pairs.
  assert sum(calls) < 200, 'what was there is not scored again'


@pytest.mark.parametrize('name', ['llama', 't5'])
def test_answers_go_on_at_a_batch_where_layers_are_in_stages(name, monkeypatch):
  """There, whose company is whose is fixed; elsewhere every answer stands alone."""
  drawn = Generate(max_new_tokens=6, temperature=1.0, samples=5)
  sizes = []
  for stages in (False, True):
    monkeypatch.setattr(writing, '_stages', lambda model, stages=stages: stages)
    for kind in (WRITE.kind, drawn):
      task = dataclasses.replace(WRITE, kind=kind)
      sizes.append(scorer(generator(name), task, QUIET, examples(task, 0, QUIET)).block)
  assert sizes == [1, 1, writing.BATCH, writing.BATCH // 5]


def test_other_settings_in_the_same_place_are_refused_by_name(tmp_path):
  evaluated(tmp_path, asked={'choose': CHOICE})
  before = content(tmp_path)
  said = []
  evaluated(tmp_path, asked={'choose': CHOICE}, said=said)
  assert said == ['choose-0: is there already', 'choose-2: is there already']
  for manner, name in ((Manner(seed=1), 'seed was 0 and is 1'), (Manner(limit=4), 'limit')):
    with pytest.raises(ValueError, match=f'of another evaluation .{name}'):
      evaluated(tmp_path, manner, asked={'write': WRITE, 'choose': CHOICE})
  other = dataclasses.replace(CHOICE, kind=MultipleChoice('options', 'a', normalise='byte'))
  with pytest.raises(ValueError, match="task.kind.normalise was 'character' and is 'byte'"):
    evaluated(tmp_path, asked={'choose': other})
  assert content(tmp_path) == before
  with pytest.raises(ValueError, match='of another evaluation .seed was 0 and is 1'):
    evaluated(tmp_path, Manner(seed=1), asked={'write': WRITE})
  # The same settings, and other data: an interrupted one does not go on.
  (tmp_path / 'choose-0.json').write_text(
    json.dumps({'settings': json.loads(before['choose-0.json'])['settings']})
  )
  changed = dataclasses.replace(CHOICE, data=rows_changed)
  _, failed = evaluated(tmp_path, asked={'choose': changed}, shots=(0,))
  assert 'is of another question' in failed['choose']


def test_what_is_there_already_is_not_taken_for_other_data(tmp_path):
  asked, questions = {'choose': CHOICE}, examples(CHOICE, 0, QUIET)
  settings = {'shots': 0, 'task': CHOICE.values(), 'run': {'step': 3}}
  settings |= {'limit': 0, 'seed': 0, 'system': '', 'chat': False, 'programs': None}
  summary = running.Summary('choose', settings, 20, digest_of(questions), 0.5, {}, {}, {})
  running.TaskFiles(tmp_path, 'choose-0', settings).end(summary)
  before = content(tmp_path)
  changed = {'choose': dataclasses.replace(CHOICE, data=rows_changed)}
  done, failed = evaluated(tmp_path, shots=(0,), asked=changed)
  assert not done and 'is of other questions' in failed['choose']
  assert 'was changed since; give another --output' in failed['choose']
  assert content(tmp_path) == before and evaluated(tmp_path, shots=(0,), asked=asked)[0]


def rows_changed():
  return iter([ROWS[0] | {'q': 'other'}, *ROWS[1:]])


rows_changed.__name__ = 'rows'


def test_a_task_that_raises_is_named_and_others_go_on(tmp_path):
  def broken():
    yield ROWS[0]
    raise RuntimeError('the disk is gone')

  bad = dataclasses.replace(CHOICE, data=broken)
  wrong = dataclasses.replace(CHOICE, prompt='{{ question }}')
  asked = {'bad': bad, 'wrong': wrong, 'choose': CHOICE}
  summaries, failed = evaluated(tmp_path, asked=asked, shots=(0,))
  assert [each.task for each in summaries] == ['choose']
  assert (
    failed['bad'].endswith('RuntimeError: the disk is gone') and 'test_tasks.py:' in failed['bad']
  )
  assert "rows():1: prompt failed: UndefinedError: 'question' is undefined" in failed['wrong']
  assert 'the row has q, options, a' in failed['wrong']
  # Whatever cannot be asked first: the other way is asked all the same.
  for shots in ((40, 0), (0, 40)):
    summaries, failed = evaluated(tmp_path, asked={'choose': CHOICE}, shots=shots)
    assert [each.name for each in summaries] == ['choose-0'] and [*failed] == ['choose-40']


def test_scores_that_are_no_numbers_are_counted(tmp_path, monkeypatch):
  pairs = scoring.score_pairs

  def broken(model, contexts, behind):
    made = pairs(model, contexts, behind)
    return [made[0]._replace(logprob=float('nan'), greedy=False), *made[1:]]

  monkeypatch.setattr(scoring, 'score_pairs', broken)
  asked = {'choose': CHOICE, 'foretell': FORETELL}
  (choose, foretell), failed = evaluated(tmp_path, asked=asked, shots=(0,))
  assert not failed and choose.counts['nan'] == 1 and foretell.counts['nan'] == 2
  right = [
    json.loads(x)['stats'][[*choose.metrics][0]][0] for x in open(tmp_path / 'choose-0.jsonl')
  ]
  estimate = wilson(int(sum(right)), len(ROWS))
  assert right[0] == 0 and [*choose.metrics.values()][0]['value'] == estimate.value
  assert foretell.metrics['bits per byte']['n'] == len(ROWS) - 2 and foretell.n == len(ROWS)
  page.write(tmp_path, {'workdir': 'runs/x'}, {})
  said = (tmp_path / page.PAGE).read_text()
  assert 'choose-0: 1 of 20 questions have scores that are no finite numbers' in said
  assert 'no number' in said and (tmp_path / page.PICTURE).read_bytes()[:4] == b'\x89PNG'


def test_prompts_that_are_too_long_are_cut_and_counted(tmp_path):
  long = [ROWS[0] | {'q': 'x' * 200}, *ROWS[1:3]]
  task = dataclasses.replace(CHOICE, data=lambda: iter(long))
  lines, scored = lines_of(task)
  assert [line['cut'] for line in lines] == [1, 0, 0]
  text = scored.asker.text(scored.asked[0])
  ids, behind, _ = scored.asker.pairs(text, [' no 0', ' yes'])
  assert len(ids) + max(map(len, behind)) - 1 == 96 and ids[0] == generator('llama').tokenizer.bos
  assert fitted([1, 2, 3, 4], 3) == [1, 3, 4]


@pytest.mark.parametrize(
  'made, said',
  [
    (lambda: MultipleChoice(('a',), 0), 'a choice is of 2 or more'),
    (lambda: MultipleChoice('options', 'a', normalise='letter'), "normalise='letter' is unknown"),
    (lambda: Generate(samples=3), 'are all the same; give a temperature'),
    (lambda: Perplexity(window=4, stride=5), 'at most the window'),
    (lambda: Task(MultipleChoice('o', 'a'), 'rows.xml'), "the kind of rows.xml='xml' is unknown"),
    (lambda: dataclasses.replace(CHOICE, prompt='{{ q'), "prompt, at '{{ q'"),
    (lambda: dataclasses.replace(WRITE, metrics=('chrff',)), "did you mean 'chrf'"),
    (lambda: dataclasses.replace(WRITE, metrics=()), 'give some of'),
    (
      lambda: examples(Task(MultipleChoice('o', 'a'), 'rows.jsonl'), 0, QUIET),
      'by --data=DIRECTORY',
    ),
    (lambda: tasks.read('arc_eazy'), "did you mean 'arc_easy'"),
  ],
  ids=range(10),
)
def test_what_is_no_task_is_said(made, said):
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    made()
  assert said in str(error.value)
