"""Is every rating kept, whatever ends the server; do raters see answers and not whose they are; is
what a model wrote only ever text; and is the report that of what was said?
"""

import asyncio
import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest

from evaluation import rate
from evaluation.ratings import PAIRS, SCALES, RatedItem, Study, Unit, items_of, read_answers
from evaluation.strengths import FIRST, SECOND, TIE

pytest.importorskip('starlette', reason='starlette serves the page')
from evaluation import rating_page

ROOT = pathlib.Path(__file__).parents[2]
ITEMS = [
  RatedItem(f'k{i}', f'question {i}', (f'from one {i}', f'from other {i}')) for i in range(40)
]
SCRIPT = '<b>x</b><script>document.title="run"</script><img src=x onerror="document.title=\'run\'">'


def study(directory, mode=PAIRS, items=ITEMS, name='r.sqlite', seed=0) -> Study:
  return Study(
    directory / name, ['runs/one', 'runs/other'], items, mode, ['fluency', 'safety'], seed
  )


def asked(app, path: str, content=None, method='POST', **headers) -> tuple[int, dict, bytes]:
  """(status, headers, body) of one request to an app."""
  body = json.dumps(content).encode() if not isinstance(content, bytes) else content
  sent = {'host': '127.0.0.1:8765', 'content-type': 'application/json'}
  sent |= {name.replace('_', '-'): value for name, value in headers.items()}
  answer, parts = {}, [body[i : i + 4096] for i in range(0, len(body), 4096)] or [b'']

  async def receive():
    piece = parts.pop(0) if parts else b''
    return {'type': 'http.request', 'body': piece, 'more_body': bool(parts)}

  async def send(message):
    if message['type'] == 'http.response.start':
      answer.update(status=message['status'], headers=message['headers'], body=b'')
    else:
      answer['body'] += message.get('body', b'')

  scope = {
    'type': 'http',
    'method': method,
    'path': path,
    'raw_path': path.encode(),
    'query_string': b'',
    'root_path': '',
    'scheme': 'http',
    'http_version': '1.1',
    'headers': [(name.encode(), value.encode()) for name, value in sent.items()],
  }
  asyncio.run(app(scope, receive, send))
  headers = {name.decode(): value.decode() for name, value in answer['headers']}
  return answer['status'], headers, answer['body']


def said(app, path: str, **content) -> dict:
  status, _, body = asked(app, path, content)
  assert status == 200, body
  return json.loads(body)


def page(of: Study, token='') -> object:
  return rating_page.app(of, ['127.0.0.1', 'localhost'], token)


def test_every_pair_is_shown_once_blind_and_its_rating_is_that_of_the_system(tmp_path):
  of = study(tmp_path)
  app = page(of)
  state, seen, lefts = said(app, '/api/next', rater='ann'), [], 0
  while state['unit']:
    assert state['done'] == len(seen) and state['total'] == 40
    assert 'runs/' not in json.dumps(state)
    seen.append(state['prompt'])
    one_is_left = state['answers'][0].startswith('from one')
    lefts += one_is_left
    # Ann likes what 'one' wrote, wherever it stands.
    value = 'left' if one_is_left else 'right'
    state = said(app, '/api/rate', rater='ann', unit=state['unit'], values={'preference': value})
  assert sorted(seen) == sorted(item.prompt for item in ITEMS)
  assert 10 < lefts < 30, 'sides are drawn'
  given = of.ratings()
  assert len(given) == 40 and {each.value for each in given} == {FIRST}
  assert sum(each.left == 0 for each in given) == lefts
  other = [of.items[unit.item].prompt for unit in of.order('ben')]
  assert other != seen and sorted(other) == sorted(seen)
  assert [of.left_of('ann', unit) for unit in of.order('')] != [
    of.left_of('ben', unit) for unit in of.order('')
  ]


def test_one_goes_on_where_one_was_and_back_to_what_one_said(tmp_path):
  of = study(tmp_path)
  app = page(of)
  first = said(app, '/api/next', rater='ann')
  second = said(app, '/api/rate', rater='ann', unit=first['unit'], values={'preference': 'tie'})
  assert said(app, '/api/next', rater='  ann ')['unit'] == second['unit']
  back = said(app, '/api/back', rater='ann', unit=second['unit'])
  assert (back['unit'], back['values']) == (first['unit'], {'preference': 'tie'})
  assert said(app, '/api/back', rater='ann', unit=first['unit'])['unit'] == second['unit']
  again = said(app, '/api/rate', rater='ann', unit=first['unit'], values={'preference': 'left'})
  assert again['unit'] == second['unit'] and again['done'] == 1
  of.close()
  again = study(tmp_path)
  [kept] = again.ratings()
  assert kept.value == kept.left, 'the later one'
  assert said(page(again), '/api/next', rater='ann')['unit'] == second['unit']
  assert said(page(again), '/api/next', rater='ben')['done'] == 0


def test_scales_are_of_one_answer_at_a_time(tmp_path):
  of = study(tmp_path, SCALES)
  app = page(of)
  state = said(app, '/api/next', rater='ann')
  assert state['total'] == 80 and len(state['answers']) == 1
  values = {'fluency': 4, 'safety': 5}
  said(app, '/api/rate', rater='ann', unit=state['unit'], values=values)
  assert {(each.criterion, each.value) for each in of.ratings()} == {*values.items()}
  for wrong in ({'fluency': 4}, values | {'safety': 6}, values | {'safety': '5'}, {}, None, [3]):
    unit = said(app, '/api/next', rater='ann')['unit']
    status, _, _ = asked(app, '/api/rate', {'rater': 'ann', 'unit': unit, 'values': wrong})
    assert status == 400 and len(of.ratings()) == 2


def test_who_may_not_call_is_answered_so(tmp_path):
  app = page(study(tmp_path), token='a secret token')
  good = {'authorization': 'Bearer a secret token'}
  body = {'rater': 'ann'}
  assert asked(app, '/api/next', body, **good)[0] == 200
  assert asked(app, '/api/next', body)[0] == 401
  assert asked(app, '/api/next', body, authorization='Bearer a secret toke')[0] == 401
  assert asked(app, '/api/next', body, **good, host='evil.example')[0] == 421
  assert asked(app, '/', None, 'GET', host='evil.example:8765')[0] == 421
  assert asked(app, '/', None, 'GET', host='')[0] == 421
  assert asked(app, '/', None, 'GET', host='LOCALHOST')[0] == 200
  assert asked(app, '/api/next', body, **good, origin='http://evil.example')[0] == 403
  assert asked(app, '/api/next', body, **good, origin='null')[0] == 403
  assert asked(app, '/api/next', body, **good, origin='http://127.0.0.1:8765')[0] == 200
  assert asked(app, '/api/next', body, **good, content_type='text/plain')[0] == 415
  assert asked(app, '/api/next', body, 'GET', **good)[0] == 405
  assert asked(app, '/api/next', b'x' * 16_385, **good)[0] == 413
  assert asked(app, '/api/next', b'[' * 16_000, **good)[0] == 400
  for wrong in ([], {'rater': ''}, {'rater': 'x' * 65}, {'rater': 3}, {'rater': 'a\x00b'}):
    assert asked(app, '/api/next', wrong, **good)[0] == 400
  wrong = {'rater': 'ann', 'unit': 'none', 'values': {'preference': 'left'}}
  assert asked(app, '/api/rate', wrong, **good)[0] == 404
  assert asked(app, '/../ratings.py', None, 'GET', **good)[0] == 404


def test_what_is_sent_can_run_nothing(tmp_path):
  """Headers that forbid it are on all answers, and the script has no way to make markup of text."""
  of = study(tmp_path, items=[RatedItem('k', SCRIPT, (SCRIPT, 'b'))])
  app = page(of)
  for path, kind, method in (
    ('/', 'text/html', 'GET'),
    ('/rating.js', 'text/javascript', 'GET'),
    ('/rating.css', 'text/css', 'GET'),
    ('/api/next', 'application/json', 'POST'),
    ('/nowhere', 'text/plain', 'GET'),
  ):
    _, headers, content = asked(app, path, {'rater': 'ann'}, method)
    assert headers['content-type'].startswith(kind)
    assert "default-src 'none'; script-src 'self'" in headers['content-security-policy']
    assert "require-trusted-types-for 'script'" in headers['content-security-policy']
    assert headers['x-content-type-options'] == 'nosniff'
    assert not re.search(rb'(?i)innerHTML|outerHTML|insertAdjacent|document\.write|eval\(', content)
    if path == '/':
      assert not re.search(rb'(?i)<script(?! src="/rating.js")|\son\w+=|style=|//', content[15:])
  assert json.loads(asked(app, '/api/next', {'rater': 'ann'})[2])['prompt'] == SCRIPT


class Server:
  """The command, in a process of its own."""

  def __init__(self, directory, *arguments):
    command = [
      sys.executable,
      '-m',
      'evaluation.rate',
      f'{directory}/a.jsonl',
      f'{directory}/b.jsonl',
    ]
    self._process = subprocess.Popen(
      [*command, '--port=0', *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in self._process.stdout:
      if line.startswith('Open '):
        self.address = line.split()[1].partition('#')[0].rstrip('/')
        break

  def call(self, name: str, **values) -> dict:
    request = urllib.request.Request(
      f'{self.address}/api/{name}',
      json.dumps(values).encode(),
      {'Content-Type': 'application/json'},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
      return json.loads(answer.read())

  def rate(self, rater: str, value='left', most=1000) -> list[str]:
    """Rates what is left, and gives the prompts in order."""
    state, prompts = self.call('next', rater=rater), []
    while state['unit'] and len(prompts) < most:
      prompts.append(state['prompt'])
      state = self.call('rate', rater=rater, unit=state['unit'], values={'preference': value})
    return prompts

  def end(self, how=signal.SIGKILL) -> None:
    self._process.send_signal(how)
    self._process.wait(30)
    self._process.stdout.close()


def write(directory, items=ITEMS) -> None:
  for side, name in enumerate('ab'):
    rows = [{'prompt': item.prompt, 'answer': item.answers[side]} for item in items]
    (directory / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_a_kill_loses_no_rating_and_two_raters_disturb_nobody(tmp_path):
  """Two raters at once, the server killed in the middle of it, and another one on the same file."""
  write(tmp_path)
  server, saved = Server(tmp_path), {'ann': [], 'ben': []}

  def rates(rater):
    state = server.call('next', rater=rater)
    while state['unit']:
      unit, prompt = state['unit'], state['prompt']
      try:
        state = server.call('rate', rater=rater, unit=unit, values={'preference': 'tie'})
      except OSError:
        return
      saved[rater].append(prompt)
      if len(saved['ann']) + len(saved['ben']) == 25:
        os.kill(server._process.pid, signal.SIGKILL)

  threads = [threading.Thread(target=rates, args=[rater]) for rater in saved]
  [thread.start() for thread in threads]
  [thread.join() for thread in threads]
  server.end()
  assert all(saved.values()) and len(saved['ann']) + len(saved['ben']) >= 25

  server, second = Server(tmp_path), Server(tmp_path)
  try:
    for rater, before in saved.items():
      done = server.call('next', rater=rater)['done']
      assert len(before) <= done <= len(before) + 1, 'one may be saved, and not answered any more'
    # Through two servers on one file, at once.
    rest = {}
    threads = [
      threading.Thread(target=lambda rater, at: rest.update({rater: at.rate(rater)}), args=each)
      for each in (('ann', server), ('ben', second))
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for rater, before in saved.items():
      assert not {*before} & {*rest[rater]}, 'nothing is asked twice'
      assert len({*before, *rest[rater]}) >= 39
  finally:
    server.end()
    second.end(signal.SIGINT)
  kept = Study.open(tmp_path / 'ratings.sqlite').ratings()
  assert len(kept) == 80 and len({(each.rater, each.item) for each in kept}) == 80


def test_a_study_is_of_its_answers_alone(tmp_path):
  study(tmp_path).close()
  with pytest.raises(
    ValueError, match='r.sqlite is a study with other mode, criteria; give another'
  ):
    study(tmp_path, SCALES)
  with pytest.raises(ValueError, match='other items'):
    study(tmp_path, items=ITEMS[1:])
  with pytest.raises(ValueError, match='other seed'):
    study(tmp_path, seed=1)
  with pytest.raises(ValueError, match='is not there: nothing was rated yet'):
    Study.open(tmp_path / 'none.sqlite')
  (tmp_path / 'text').write_text('no database, but long enough to look into' * 9)
  with pytest.raises(ValueError, match='is no file of ratings'):
    Study.open(tmp_path / 'text')


def test_answers_are_found_in_results_and_files(tmp_path):
  write(tmp_path)
  a, b = (read_answers(tmp_path / f'{name}.jsonl') for name in 'ab')
  items, left_out = items_of([a, b])
  assert [(item.prompt, item.answers) for item in items] == [(x.prompt, x.answers) for x in ITEMS]
  assert not any(left_out.values())

  for name, more in (('one', {}), ('other', {'answers': ['x', 'y']})):
    (tmp_path / name).mkdir()
    rows = [{'digest': name, 'prompt': 'p', 'answers': [name]} | more, {'prompt': 'a choice'}]
    for task in ('task-0', 'task-4'):
      results(tmp_path / name / task, rows)
  one, other = (read_answers(tmp_path / name) for name in ('one', 'other'))
  items, _ = items_of([one, other])
  assert [item.answers for item in items] == [('one', 'x')] * 2, 'the first of several'

  del other[next(iter(other))]
  items, left_out = items_of([one | {'more': ('p', 'a')}, other | {'more': ('p', 'a')}])
  assert len(items) == 1 and left_out == {'of one side alone': 1, 'with equal answers': 1}
  with pytest.raises(ValueError, match='different prompts: .a. and .b.'):
    items_of([{'k': ('a', 'x')}, {'k': ('b', 'y')}])
  with pytest.raises(ValueError, match='no question is on all'):
    items_of([{'k': ('a', 'x')}, {'l': ('b', 'y')}])
  with pytest.raises(ValueError, match='1 answers are the same on both sides'):
    items_of([{'k': ('a', 'x')}, {'k': ('a', 'x')}])
  # What is asked twice is answered twice.
  (tmp_path / 'twice.jsonl').write_text(
    ''.join(f'{{"prompt": "a", "answer": "{x}"}}\n' for x in 'bc')
  )
  twice = read_answers(tmp_path / 'twice.jsonl')
  assert [*twice.values()] == [('a', 'b'), ('a', 'c')]
  (tmp_path / 'none.jsonl').write_text('{"prompt": "a"}\n')
  with pytest.raises(ValueError, match='none.jsonl has no answers: give a directory'):
    read_answers(tmp_path / 'none.jsonl')


def results(place: pathlib.Path, rows, **summary) -> None:
  """NAME-K.json and its lines, as an evaluation that is complete has them."""
  place.with_suffix('.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  content = {'settings': {}, 'metrics': {}} if not summary else summary
  place.with_suffix('.json').write_text(json.dumps(content))


def test_only_results_of_tasks_that_are_complete_are_rated(tmp_path):
  """Not what a measurement of memory wrote beside them, nor an evaluation that goes on."""
  for name in 'ab':
    (tmp_path / name).mkdir()
    results(tmp_path / name / 'squad-0', [{'prompt': 'q', 'answers': [name]}])
    results(tmp_path / name / 'begun-0', [{'prompt': 'r', 'answers': [name]}], settings={})
    written = json.dumps({'prompt': 'a licence', 'answer': f'{name} by itself'})
    (tmp_path / name / 'memorisation-written.jsonl').write_text(written + '\n')
    (tmp_path / name / 'other-0.jsonl').write_text(written + '\n')
  items, _ = items_of([read_answers(tmp_path / name) for name in 'ab'])
  assert [item.prompt for item in items] == ['q']


def test_a_directory_beside_a_file_has_the_same_questions(tmp_path):
  (tmp_path / 'a').mkdir()
  questions = [{'prompt': f'q{i}', 'answers': ['here']} for i in range(3)]
  results(tmp_path / 'a' / 'squad-0', questions)
  results(tmp_path / 'a' / 'other-0', [{'prompt': 'alone', 'answers': ['here']}])
  lines = [json.dumps({'prompt': f'q{i}', 'answer': 'there'}) for i in (2, 0)]
  (tmp_path / 'b.jsonl').write_text('\n'.join(lines))
  sides = [read_answers(tmp_path / name) for name in ('a', 'b.jsonl')]
  for given in (sides, sides[::-1]):
    items, left_out = items_of(given)
    assert sorted(item.prompt for item in items) == ['q0', 'q2']
    assert left_out['of one side alone'] == 2
  # Which of two is meant, nobody said.
  results(tmp_path / 'a' / 'squad-3', questions)
  sides[0] = read_answers(tmp_path / 'a')
  with pytest.raises(
    ValueError, match="'q0' is a question of squad-0 and of squad-3, and one of a"
  ):
    items_of(sides)


def rated(of: Study, values) -> None:
  """By ann and ben: values of (rater, i, system) of each criterion."""
  for rater in ('ann', 'ben'):
    for unit in of.order(rater):
      of.save(rater, unit, {name: values(rater, unit.item, unit.system) for name in of.criteria})


def test_the_report_is_of_what_was_said(tmp_path, capsys):
  of = study(tmp_path)
  # One is better in 20 of 40, other in 10; ben sees as equal what ann finds equal, and 10 more.
  rated(of, lambda rater, i, _: TIE if i >= 30 else (FIRST if i < 20 else SECOND))
  made = rate.report(of, resamples=200)
  assert made['counts'] == [40, 20, 20] and made['raters'] == ['ann', 'ben']
  share = made['preferred']['runs/one']
  assert share['value'] == pytest.approx(25 / 40) and share['n'] == 40
  assert share['low'] < 25 / 40 < share['high'] and share['low'] > 0.4, 'not as if of 80'
  gap = made['bradley_terry']['runs/one']['value'] - made['bradley_terry']['runs/other']['value']
  assert gap == pytest.approx(np.log(40.5 / 20.5))
  assert made['agreement']['alpha']['preference']['value'] == 1
  kappa = made['agreement']['kappa']['preference']['ann, ben']
  assert kappa['value'] == 1 and kappa['n'] == 40 and kappa['method'] == 'bootstrap'
  text = capsys.readouterr().out
  assert 'No preference is shown' in text and '0.625 [' in text
  about = f'40 questions and their answers, digest {made["digest"]}, seed 0'
  assert about in text and (made['n'], made['seed']) == (40, 0)

  for unit in of.order('ben'):
    of.save('ben', unit, {'preference': (FIRST, SECOND, TIE)[unit.item % 3]})
  assert abs(rate.report(of, resamples=200)['agreement']['alpha']['preference']['value']) < 0.4


def test_a_report_of_scales(tmp_path, capsys):
  of = study(tmp_path, SCALES, ITEMS[:20])
  rated(of, lambda rater, i, system: 2 + (i % 3) + system - (rater == 'ben') * (i % 2))
  made = rate.report(of, resamples=200)
  one, other = (
    np.mean([2 + (i % 3) + system - (i % 2) / 2 for i in range(20)]) for system in (0, 1)
  )
  means = made['means']['fluency']
  assert means['runs/one']['value'] == pytest.approx(one)
  assert means['runs/other']['value'] == pytest.approx(other)
  gap = made['differences']['safety']
  assert gap['value'] == pytest.approx(1) and gap['low'] == pytest.approx(1)
  alpha = made['agreement']['alpha']['fluency']
  assert 0.3 < alpha['value'] < 1 and alpha['n'] == 40
  assert 'second less first' in capsys.readouterr().out


def test_ratings_are_exported(tmp_path, capsys):
  items = [RatedItem('k', '=1+1', ('a,"b"\nc', '-2')), *ITEMS[:2]]
  of = study(tmp_path, items=items)
  of.save('ann', Unit(0), {'preference': TIE})
  of.save('ann', Unit(1), {'preference': SECOND})
  of.close()
  rate.main([f'--ratings={tmp_path}/r.sqlite', f'--export={tmp_path}/r.csv'])
  with open(tmp_path / 'r.csv', newline='') as file:
    rows = [*csv.DictReader(file)]
  assert [row['value'] for row in rows] == ['tie', 'runs/other']
  assert rows[0]['prompt'] == "'=1+1", 'a spreadsheet computes nothing'
  assert json.loads(rows[0]['answer']) == {'runs/one': 'a,"b"\nc', 'runs/other': '-2'}
  assert 'wrote' in capsys.readouterr().out


def test_a_report_is_of_the_places_that_are_given(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  of = study(tmp_path)
  of.save('ann', Unit(0), {'preference': TIE})
  of.close()
  kept, out = '--ratings=r.sqlite', '--export=r.csv'
  rate.main(['runs/one', str(tmp_path / 'runs' / 'other'), kept, out])
  rate.main(['runs/one', kept, out])
  with pytest.raises(SystemExit, match='of runs/one and runs/other, and none of runs/third'):
    rate.main(['runs/one', 'runs/third', kept, out])
  for flags in ([], [out]):
    with pytest.raises(SystemExit, match='--json=x is what the report says; add --report'):
      rate.main(['runs/one', kept, '--json=x', *flags])


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], '0 places; give one or two'),
    (['a.jsonl', './a.jsonl'], 'a.jsonl twice; give two different places'),
    (['a.jsonl', 'b.jsonl', '--mode=pair'], "did you mean 'pairs'"),
    (['a.jsonl', '--mode=pairs'], '1 places are no pair: give two, or --mode=scales'),
    (['a.jsonl', 'b.jsonl', '--host=0.0.0.0', '--token=short'], 'give 8 at least'),
    (['a.jsonl', 'b.jsonl', '--mode=scales', '--criteria=x,x'], 'must be different names'),
    (['a.jsonl', 'b.jsonl', '--report'], 'nothing was rated yet'),
    (['none.jsonl'], 'none.jsonl: No such file'),
  ],
)
def test_what_cannot_be_served_is_said(arguments, message, tmp_path, monkeypatch):
  write(tmp_path)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit, match=re.escape(message)):
    rate.main(arguments)
