"""Do pages and pictures of reports show what their files hold?"""

import json

import pytest

import names
from evaluation import findings_page, harness_page, running
from evaluation.intervals_picture import ROWS, _drawn, picture

NUMBER = {'value': 0.5, 'low': 0.25, 'high': 0.75, 'n': 4, 'method': 'wilson', 'small': True}
NO_INTERVAL = {'value': 3.5, 'low': None, 'high': None, 'n': 4, 'method': 'none'}
NOTHING = {'value': None, 'low': None, 'high': None, 'n': 4, 'method': 'bootstrap', 'small': True}


def test_a_picture_has_what_is_a_number_and_leaves_out_what_is_none():
  rows = [('a', NUMBER), ('b', NO_INTERVAL), ('c', NOTHING)]
  assert _drawn(rows) == [('a', 0.5, 0.25, 0.25), ('b', 3.5, 0.0, 0.0)]
  # A label is no formula, and a panel no taller than a page; nor does nothing fail.
  for panels in ({'$x$: \\y_{': [('a $\\b$ $', NUMBER)] * (ROWS + 1)}, {'none': rows[2:]}, {}):
    assert picture(panels, 'runs/$a_$')[:4] == b'\x89PNG'


def test_findings_have_a_panel_of_shares_and_one_of_nats(monkeypatch):
  drawn = {}
  monkeypatch.setattr(findings_page, 'picture', lambda panels, title: drawn.update(panels) or b'')
  given = [('age', 'the first is likelier', NUMBER), ('age', 'nats more', NO_INTERVAL)]
  findings = [{'category': c, 'what': what, 'p': None, **of} for c, what, of in given]
  findings_page.findings_picture('Bias', {'pairs-0': {'findings': findings}})
  assert {name: [label for label, _ in rows] for name, rows in drawn.items()} == {
    'pairs-0: shares, and differences of shares': ['age: the first is likelier'],
    'pairs-0: nats': ['age: nats more'],
  }


def test_the_harness_has_a_page_with_a_picture(tmp_path):
  counts = {'pairs': 8, 'requests': 8, 'nan': 2}
  task = {'n': 4, 'metrics': {'acc,none': NUMBER, 'ppl,none': NO_INTERVAL}, 'prompts': 'ab12'}
  said = {
    'lm_eval': '0.4',
    'workdir': 'runs/a',
    'step': 7,
    'settings': {'tasks': ['one'], 'shots': None, 'seed': 3},
    'tasks': {'one': task | {'counts': counts}},
    'groups': {'all': {'n': 4, 'metrics': {'acc,none': NUMBER}}},
    'failed': {'two': 'its file is no YAML'},
  }
  harness_page.write(tmp_path, json.loads(json.dumps(said)))
  lines = (tmp_path / harness_page.PAGE).read_text().split('\n')
  assert '| all | acc,none | 0.5 [0.25, 0.75] (few) | 4 |  |' in lines
  assert '| one | ppl,none | 3.5 | 4 | `ab12` |' in lines
  assert '- two: its file is no YAML' in lines and '| seed | 3 |' in lines
  assert any(line.startswith('- one: 2 of 8 scores are no finite') for line in lines)
  assert f'![scores]({harness_page.PICTURE})' in lines and 'step 7' in lines[2]
  assert (tmp_path / harness_page.PICTURE).stat().st_size > 5000

  # Where every task failed there is no picture to show.
  (tmp_path / 'none').mkdir()
  harness_page.write(tmp_path / 'none', said | {'tasks': {}, 'groups': {}})
  assert '![' not in (tmp_path / 'none' / harness_page.PAGE).read_text()
  assert not (tmp_path / 'none' / harness_page.PICTURE).exists()


@pytest.mark.parametrize(
  'command, arguments',
  [
    ('evaluation.bias.main', ['HERE']),
    ('evaluation.knowledge.main', ['HERE']),
    ('workdir.safety.main', ['HERE']),
    ('evaluation.compare.main', ['before', 'HERE']),
    ('evaluation.contamination.main', ['--tasks=arc_easy', '--training=a.txt', '--output=HERE']),
  ],
)
def test_a_directory_belongs_to_one_report_at_a_time(command, arguments, tmp_path):
  given = [argument.replace('HERE', str(tmp_path)) for argument in arguments]
  with running.alone_in(tmp_path):
    with pytest.raises(SystemExit, match=f'error: {tmp_path} is in use.*give another directory'):
      names.imported(command)(given)
  assert not [*tmp_path.iterdir()]
