"""Does a model card keep what a person wrote, and tell what was found? And is it found from when on
a model knows nothing?
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from evaluation import card, knowledge, page, running
from evaluation.examples import Manner
from evaluation.measures import OTHERS
from evaluation.running import Summary
from evaluation.task import Perplexity, Task
from tests.evaluation.test_label_scores import generator
from tests.training.conftest import tiny
from training import config as configs
from workdir import card as run_card

BLOCKS = {name: f'what is said of {name}' for name in card.BLOCKS}
BLOCKS[card.FRONT] = 'library_name: tandem'


def metadata(text: str) -> dict:
  """As Hugging Face reads it: between the first two lines of ---."""
  assert text.startswith('---\n')
  return yaml.safe_load(text.split('---\n')[1])


def test_what_a_person_wrote_is_kept():
  new = card.written('it', BLOCKS)
  assert metadata(new) == {'library_name': 'tandem'}
  filled = new.replace('# license: apache-2.0', 'license: mit')
  filled = filled.replace(card.FILL + ' What this model is', 'It sorts mail. What this model is')
  filled = filled.replace('<!-- end scores -->', '<!-- end scores -->\n\nThese surprised us.')
  changed = {**BLOCKS, 'scores': 'other scores\n<!-- end scores -->', card.FRONT: 'tags: [x]'}
  text, gone = card.rewritten(filled, changed, 'CARD')
  assert not gone and metadata(text) == {'tags': ['x'], 'license': 'mit'}
  for kept in ('It sorts mail.', 'These surprised us.', 'other scores', 'what is said of energy'):
    assert kept in text
  assert 'what is said of scores' not in text
  # Again, with the same, nothing changes; nor by an editor that takes away ends of lines.
  assert card.rewritten(text, changed, 'CARD')[0] == text
  assert card.rewritten(text.replace('\n\n', ' \n\n'), changed, 'CARD')[1] == []


def test_what_would_be_lost_is_refused():
  new = card.written('it', BLOCKS)
  with pytest.raises(ValueError, match="CARD: the block 'bias' was changed by hand"):
    card.rewritten(new.replace('said of bias', 'known of bias'), BLOCKS, 'CARD')
  with pytest.raises(ValueError, match='CARD is a card that this has not written'):
    card.rewritten('# My model\n', BLOCKS, 'CARD')
  with pytest.raises(ValueError, match="the block 'data' has no end"):
    card.rewritten(new.replace('<!-- end data -->', ''), BLOCKS, 'CARD')
  begin, end = new.index('<!-- begin safety'), new.index('<!-- end safety -->')
  without = new[:begin] + new[end + len('<!-- end safety -->') :]
  text, gone = card.rewritten(without, BLOCKS, 'CARD')
  assert gone == ['safety'] and text == without


def test_scores_are_told_as_hugging_face_lists_them(tmp_path):
  of = {'value': 0.25, 'low': 0.1, 'high': 0.4, 'n': 40, 'method': 'wilson', 'small': False}
  of['lower_is_better'] = False
  settings = {'shots': 0, 'chat': False, 'run': {'workdir': 'x', 'step': 3, 'digest': 'd3'}}
  nan = {**of, 'value': None}
  metrics = {'accuracy (per byte)': of, 'chrF2': nan}
  summary = Summary('arc', settings, 40, 'abc123', 0.25, metrics, {}, {})
  found = [(tmp_path, summary)]
  text = card.written('it', {**BLOCKS, card.FRONT: card.front('it', found)})
  ((result,),) = [each['results'] for each in metadata(text)['model-index']]
  (metric,) = result['metrics']
  assert metric['value'] == 0.25 and metric['args']['n'] == 40
  assert metric['type'] == 'accuracy_per_byte' and result['dataset']['type'] == 'arc'
  table = card.scores(found, [], 3, 'd3')
  assert '| arc | 0 | accuracy (per byte) | 0.250 [0.100, 0.400] | 40 | 0.25 | 3 |' in table
  assert 'Of other checkpoints' not in table
  other = card.scores(found, [], 7, 'd7')
  assert 'Of other checkpoints than the last, 7, or of one that is not told: 3 of `x`.' in other
  assert card.scores([], [], 3, 'd3').startswith('Not evaluated')

  assert 'evaluate.py bias' in card.of_results('bias', [tmp_path])
  findings = [{'category': 'age', 'what': 'nats more', **of, 'p': 0.01}] * 40
  (tmp_path / 'bias.json').write_text(json.dumps({'t-0': {'prompts': 'd', 'findings': findings}}))
  said = card.of_results('bias', [tmp_path])
  assert '| age | nats more | 40 | 0.250 [0.100, 0.400] | 0.01 |' in said and 'And 10 more' in said
  run = {'workdir': 'runs/x', 'step': 7, 'weights': 'int8'}
  of_run = {'t-0': {'prompts': 'd', 'run': run, 'findings': findings}}
  (tmp_path / 'bias.json').write_text(json.dumps(of_run))
  said = card.of_results('bias', [tmp_path])
  assert 't-0, prompts `d`, checkpoint 7 of `runs/x` in int8:' in said
  (tmp_path / 'bias.json').write_text('{"t-0": {}}')
  with pytest.raises(ValueError, match='bias.json is not what bias writes'):
    card.of_results('bias', [tmp_path])


def test_a_card_says_of_which_checkpoint_other_results_are(tmp_path, monkeypatch):
  """Of rewards, labels, the harness and canaries, as of tasks: and where it is not the last."""
  configs.save(tiny(), tmp_path)
  last = {'latest': 7, 'record': {}, 'reference': {'digest': 'd7'}}
  checkpoints = SimpleNamespace(**{name: lambda *_, x=x: x for name, x in last.items()})
  monkeypatch.setattr(run_card, 'Checkpoints', lambda workdir: checkpoints)
  of = {'value': 0.25, 'low': 0.1, 'high': 0.4, 'n': 40, 'method': 'wilson', 'small': False}
  place = tmp_path / 'evaluation'
  place.mkdir()

  def blocks(run):
    reward = {'run': run, 'metrics': {'accuracy': of}, 'prompts': 'a1'}
    (place / 'reward.json').write_text(json.dumps(reward))
    each = {'shots': 2, 'calibration': 'none', 'metrics': {'accuracy': of}, 'prompts': 'a2'}
    (place / 'classify.json').write_text(json.dumps({'run': run, 'results': [each]}))
    task = {'metrics': {'acc,none': of}, 'prompts': 'abcdefabcdefabc'}
    task['counts'] = {'requests': 40, 'pairs': 40, 'nan': 3}
    said = {'lm_eval': '0.4', **run, 'failed': {'lost': 'no file'}, 'tasks': {'theirs': task}}
    (place / 'lm_eval.json').write_text(json.dumps(said | {'groups': {'all': {'metrics': {}}}}))
    exposed = {'run': run, 'candidates': 9, 'space': {'bits': 9.0}, 'most': 3.3, 'exact': False}
    exposed |= {'chance': 1.44, 'seed': 0, 'prompts': 'x', 'exposure': {'0': of}, 'canaries': []}
    (place / 'exposure.json').write_text(json.dumps(exposed))
    return run_card.blocks_of(tmp_path)

  made = blocks({'workdir': 'r', 'step': 7, 'digest': 'd7', 'weights': ''})
  for told in (
    'reward.json (checkpoint 7, prompts `a1`)',
    "classify.json (shots=2, calibration='none', checkpoint 7, prompts `a2`)",
    'lm-evaluation-harness 0.4 (checkpoint 7), `evaluation/lm_eval.json`:',
    '| theirs | acc,none | 0.25 [0.1, 0.4] | 40 | `abcdefabcdef` |',
    '- theirs: 3 of 40 scores are no finite numbers',
    '- lost failed: no file',
  ):
    assert told in made['scores'], made['scores']
  assert 'not the last' not in made['scores'] and 'the last, 7' not in made['memorisation']
  made = blocks({'workdir': 'r', 'step': 3, 'digest': 'd3', 'weights': ''})
  assert made['scores'].count('checkpoint 3 of `r`, not the last, 7') == 3
  stale = 'Of another checkpoint than the last, 7, or of one that is not told: 3 of `r`.'
  assert stale in made['memorisation']
  (place / 'reward.json').write_text(json.dumps({'metrics': {'accuracy': of}, 'prompts': 'a1'}))
  assert 'reward.json (of a checkpoint that is not told' in run_card.blocks_of(tmp_path)['scores']


def test_a_card_tells_other_weights_and_models_from_its_own(tmp_path, monkeypatch):
  configs.save(tiny(), tmp_path)
  last = {'latest': 3, 'record': {}, 'reference': {'digest': 'd3'}}
  checkpoints = SimpleNamespace(**{name: lambda *_, x=x: x for name, x in last.items()})
  monkeypatch.setattr(run_card, 'Checkpoints', lambda workdir: checkpoints)
  of = {'value': 0.25, 'low': 0.1, 'high': 0.4, 'n': 40, 'method': 'wilson', 'small': False}
  metrics = {'accuracy (sum)': of | {'lower_is_better': False}}
  own = {'workdir': 'runs/own', 'step': 3, 'digest': 'd3', 'weights': ''}
  ways = {
    'own': (own, True),
    'int8': (own | {'weights': 'int8'}, False),
    'base': (own | {'workdir': 'runs/base', 'digest': 'other'}, False),
    'older': ({'workdir': 'runs/own', 'step': 3}, False),
  }
  for name, (run, chat) in ways.items():
    (tmp_path / name).mkdir()
    summary = Summary(name, {'shots': 0, 'chat': chat, 'run': run}, 40, 'a1', 0.0, metrics, {}, {})
    (tmp_path / name / f'{name}-0.json').write_text(json.dumps(vars(summary)))
  blocks = run_card.blocks_of(tmp_path)
  ((result,),) = [each['results'] for each in yaml.safe_load(blocks[card.FRONT])['model-index']]
  assert result['dataset'] == {'type': 'own', 'name': 'own, 0 shots, chat'}
  for told in ('| 3 | chat | own |', '| 3 | int8 | int8 |', '| 3 of `runs/base` |  | base |'):
    assert told in blocks['scores'], blocks['scores']


@pytest.mark.slow
def test_a_rise_is_found_where_it_is_and_nowhere_else():
  draw = np.random.default_rng(0)
  periods = [f'{2018 + i // 20}' for i in range(160)]
  late = np.array([period >= '2023' for period in periods])
  measure = OTHERS['bits per byte']

  def statistics(rise):
    nats = draw.normal(100, 10, 160) + rise * late
    return np.stack([nats, *[np.full(160, 100.0)] * 3], 1)

  found = knowledge.rise(periods, statistics(8.0), measure)
  assert found.period == '2023' and found.shown and found.p < 0.01
  assert found.before.n == 100 and found.after.value > found.before.high
  # A fall is no rise, and nothing is none; a p that looks at every cut is below 0.05 as rarely.
  assert not knowledge.rise(periods, statistics(-8.0), measure).shown
  shown = [knowledge.rise(periods, statistics(0.0), measure, seed, 60).shown for seed in range(100)]
  assert sum(shown) <= 11  # of 100, 5 are expected
  by = knowledge.by_period(periods, statistics(8.0), measure, 0)
  assert [*by] == [str(2018 + i) for i in range(8)] and {each.n for each in by.values()} == {20}
  assert knowledge.rise(periods[:9], statistics(0.0)[:9], measure) is None


def test_texts_without_a_byte_make_no_rise():
  """They have no bits per byte, and stand in no period; how many is said."""
  draw = np.random.default_rng(1)
  measure = OTHERS['bits per byte']
  scored = [[float(nats), 30.0, 100.0, 20.0] for nats in draw.normal(100, 1, 30)]
  told = [
    ({'stats': {measure.name: of}}, {'date': str(2020 + i // 10)}) for i, of in enumerate(scored)
  ]
  summary = Summary('t', {'shots': 0, 'run': {}}, 32, 'ab', 0.0, {measure.name: {}}, {}, {})
  expected = knowledge.report(summary, measure, told, 'year', 0)
  empty = ({'stats': {measure.name: [0.0] * 4}}, {'date': '2020'})
  of = knowledge.report(summary, measure, [empty, *told, empty], 'year', 0)
  assert of == expected | {'left out': 2} and not of['rise']['shown']
  assert ' 2 without a finite score are left out.' in knowledge.text_of('t', of)[1]
  statistics = np.array([[0.0] * 4, *scored])
  with pytest.raises(ValueError, match='1 documents have no finite bits per byte; leave them out'):
    knowledge.rise(['2020'] * 11 + ['2021'] * 20, statistics, measure)


@pytest.mark.slow
def test_dates_are_read_and_told_by_the_command(tmp_path, capsys):
  rows = [{'date': f'{2020 + i % 3}-0{1 + i % 9}-02', 'text': f'text {i}'} for i in range(30)]
  (tmp_path / 'texts.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  own = "from evaluation.knowledge import dated\nfrom evaluation.task import Perplexity, Task\n\n\n"
  own += 'def get_task():\n  return Task(Perplexity(), "texts.jsonl", '
  own += "prompt='{{ text }}', rows=dated, by='year')\n"
  (tmp_path / 'own.py').write_text(own)
  task = Task(Perplexity(), 'texts.jsonl', prompt='{{ text }}', rows=knowledge.dated, by='year')
  manner = Manner(str(tmp_path))
  running.evaluate(generator('llama'), {'own': task}, [0], manner, {'workdir': 'x'}, tmp_path)
  page.write(tmp_path, {'workdir': 'x'}, {})
  flags = [str(tmp_path), f'--data={tmp_path}', f'--tasks={tmp_path}/own.py']
  knowledge.main(flags)
  assert 'No rise is shown' in capsys.readouterr().out
  made = json.loads((tmp_path / knowledge.FILE).read_text())['own-0']
  assert [*made['periods']] == ['2020', '2021', '2022']
  (summary,) = page.read(tmp_path)
  for year, of in made['periods'].items():
    assert of['value'] == pytest.approx(summary.by[year]['bits per byte']['value'])
  knowledge.main([*flags, '--by=month'])
  assert len(json.loads((tmp_path / knowledge.FILE).read_text())['own-0']['periods']) == 9

  for wrong in ('yesterday', '2024-13-01', '20'):
    with pytest.raises(ValueError, match='is no date, as 2024-03-31, 2024-03 or 2024'):
      knowledge.day_of(wrong)
  with pytest.raises(SystemExit, match='no results of tasks of dates'):
    knowledge.main([str(tmp_path), f'--data={tmp_path}'])
