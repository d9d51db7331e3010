"""Does a day on a GPU keep its budget and lose no more than what failed, and is what it compares
compared? Toys on this CPU; no timing is looked at.
"""

import dataclasses
import functools
import importlib
import inspect
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import (
  attention_masks,
  decode,
  gpu_day,
  gpu_environment,
  grouped_matmul_gpu,
  train_gpu,
)
from benchmarks.attention_masks import MaskCase

# A benchmark: --json FILE, after what it is told to do.
FAKE = """
import json, os, pathlib, subprocess, sys
*told, path = sys.argv[1:]
path = path.removeprefix('--json=')
day = pathlib.Path(os.environ['DAY'])
before = list(json.loads(day.read_text())['results']['pieces']) if day.exists() else []
if told != ['crash']:
  open(path, 'w').write(json.dumps({'results': {'before': before, 'told': told}}))
if told == ['late']:
  sides = {'a': {'forward': 1.0}, 'b': {'error': 'skipped: no time left'}}
  open(path, 'w').write(json.dumps({'results': {'sides': sides}}))
if told == ['hang']:
  child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
  pathlib.Path(os.environ['CHILD']).write_text(str(child.pid))
  child.wait()
if told == ['judge']:
  print('PARITY FAILS: causal', 'wrote x', sep=chr(10))
  print('UserWarning: of no matter', file=sys.stderr)
  sys.exit(1)
if told == ['crash']:
  raise MemoryError('no room for 5 arrays')
"""


def piece(name, told='', seconds=1.0, **more):
  return gpu_day.DayPiece(name, 'nothing', seconds, f'fake {told}', f'fake {told}', **more)


@pytest.fixture
def day(tmp_path, monkeypatch):
  """budget -> Day, whose pieces run FAKE."""
  (tmp_path / 'fake.py').write_text(FAKE)
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  monkeypatch.setenv('DAY', str(tmp_path / 'day.json'))
  monkeypatch.setenv('CHILD', str(tmp_path / 'child'))
  return lambda budget: gpu_day.Day(budget, str(tmp_path / 'day.json'))


def written(tmp_path):
  return json.loads((tmp_path / 'day.json').read_text())


def test_a_piece_that_fails_loses_itself_alone(day, tmp_path):
  made = day(1e6)
  for of in (piece('a'), piece('b', 'crash'), piece('c', 'judge'), piece('d', seconds=100.0)):
    # On a busy machine a process may take long to start.
    made.take(dataclasses.replace(of, seconds=100.0))
  found = written(tmp_path)['results']['pieces']
  assert found == made.pieces and list(found) == ['a', 'b', 'c', 'd']
  assert found['b']['error'] == 'code 1: MemoryError: no room for 5 arrays'
  assert found['b']['results'] == {} and 'error' not in found['a']
  assert found['c']['error'] == 'code 1: PARITY FAILS: causal'
  assert found['c']['results']['told'] == ['judge'], 'what it had found before is kept'
  # Each saw all before it in the file.
  assert [found[x]['results']['before'] for x in 'acd'] == [[], ['a', 'b'], ['a', 'b', 'c']]
  assert 'numpy' in written(tmp_path)['machine']


def test_what_would_not_fit_is_left_out_and_said(day, tmp_path, capsys):
  made = day(500.0)
  for of in (piece('a', seconds=90.0), piece('long', seconds=498.0), piece('b', seconds=90.0)):
    made.take(of)
  made.show()
  found = written(tmp_path)['results']['pieces']
  assert found['long']['left_out'].startswith('left out: it takes about 498 s, and 49')
  assert 'results' in found['a'] and 'results' in found['b']
  said = capsys.readouterr().out
  assert 'next: python -m benchmarks.gpu_day --only long --json' in said
  assert str(tmp_path / 'day_more.json') in said


def test_one_that_hangs_is_ended_with_all_that_it_started(day, tmp_path):
  made = day(1e6)
  made.take(piece('a', 'hang', seconds=1.5))
  made.take(piece('b', seconds=100.0))
  found = written(tmp_path)['results']['pieces']
  assert found['a']['error'] == 'ended after 3 s' and 'error' not in found['b']
  child = tmp_path / 'child'
  if child.exists():  # it had come so far
    assert found['a']['results']['told'] == ['hang']
    stat = pathlib.Path(f'/proc/{child.read_text()}/stat')
    assert not stat.exists() or stat.read_text().split(')')[1].split()[0] == 'Z'


def test_a_piece_that_keeps_a_budget_is_told_what_is_left(day, tmp_path):
  made = day(200.0)
  made.take(piece('a', seconds=90.0, keeps=True))
  # Twice its estimate, less what it takes to leave.
  assert made.pieces['a']['command'] == 'fake --budget=175'
  made.take(piece('b', seconds=150.0, keeps=True))
  left = int(made.pieces['b']['command'].rpartition('=')[2])
  assert 150 < left <= 190


def test_sides_without_time_are_missing_though_their_piece_ended_well(day, capsys):
  made = day(1e6)
  made.take(piece('all', seconds=100.0))
  made.take(piece('some', 'late', seconds=100.0))
  assert 'late' not in made.pieces['all'] and made.pieces['some']['late'] == 1
  made.show()
  said = capsys.readouterr().out
  assert re.search('some +[0-9.]+  measured, but for 1 of its sides: no time was left', said)
  assert 'next: python -m benchmarks.gpu_day --only some --json' in said


def test_a_day_is_kept_without_being_asked_for(day, tmp_path, monkeypatch, capsys):
  """In a file of its own; a rehearsal writes none."""
  day(0.0)  # the environment of its pieces
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(gpu_day, 'PIECES', (piece('a', seconds=100.0),))
  monkeypatch.setattr(gpu_day.train_gpu, 'device', lambda: ('gpu', 'NVIDIA H200'))
  monkeypatch.setattr(gpu_day.signal, 'signal', lambda *_: None)
  monkeypatch.setattr(sys, 'argv', ['gpu_day'])
  for name in ('gpu_day.json', 'gpu_day_more.json'):
    assert gpu_day.main() == 0 and f'after each piece written: {name}' in capsys.readouterr().out
    assert json.loads((tmp_path / name).read_text())['results']['pieces']['a']['results']
  monkeypatch.setattr(sys, 'argv', ['gpu_day', '--rehearse'])
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert gpu_day.main() == 0 and not (tmp_path / 'gpu_day_more_more.json').exists()


def test_pieces_are_chosen_by_name():
  assert gpu_day.chosen('') == list(gpu_day.PIECES)
  assert [x.name for x in gpu_day.chosen('grpo,masks')] == ['masks', 'grpo']
  with pytest.raises(ValueError, match="'mask' is no piece; there are environment, masks"):
    gpu_day.chosen('masks,mask')


@pytest.mark.parametrize('piece_', gpu_day.PIECES, ids=lambda x: x.name)
def test_every_piece_asks_for_what_its_benchmark_knows(piece_):
  for command in (piece_.command, piece_.toy):
    module, *flags = shlex.split(command)
    text = pathlib.Path(importlib.util.find_spec(module).origin).read_text()
    if 'begun(__doc__' in text:
      text += inspect.getsource(gpu_environment.begun)
    assert not piece_.keeps or "'--budget'" in text
    for flag in flags:
      name, _, value = flag.removeprefix('--').partition('=')
      assert f"'--{name}'" in text or f'  {name}: ' in text, (module, name)
      if name == 'sides':
        known = train_gpu.ORDER if 'train_gpu' in module else decode.SIDES
        assert set(value.split(',')) <= set(known)
      if name == 'model':
        assert value == 'toy' or decode.model_config(value).execution.dtype == 'bfloat16'


def test_without_a_gpu_it_says_so():
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.gpu_day'],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1 and done.stdout.startswith(
    "not measured: no GPU at hand, jax sees 'cpu' (cpu); --rehearse"
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'only',
  [
    'environment,masks',
    pytest.param('environment,masks,decode_1b,grouped_matmul', marks=pytest.mark.long),
    pytest.param('', marks=pytest.mark.long),
  ],
)
def test_a_rehearsal_runs_all_of_it(only, tmp_path):
  path = tmp_path / 'day.json'
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.gpu_day', '--rehearse', f'--only={only}', f'--json={path}']
    + ['--budget=3000'],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert 'a rehearsal: nothing here is a measurement' in done.stdout, done.stderr
  found = written(tmp_path)['results']
  assert found['rehearsal'] and set(found['pieces']) == {x.name for x in gpu_day.chosen(only)}
  for name, taken in found['pieces'].items():
    # torch and trl need not be installed; all else runs.
    missing = 'No module named' in taken.get('error', '')
    assert taken['results'] if 'error' not in taken else missing and name in ('grpo', 'train_torch')
  masks = found['pieces']['masks']['results']['cases']
  assert [case.get('near') for case in masks.values()] == [True, True, None]


# What it measures with.


CASE = MaskCase(('packed', 'window', 'softcap', 'sinks'), heads=4, kv_heads=2, width=8)


def test_what_is_exact_is_attention():
  """As kernels.reference gives it in f32, and jax its gradients."""
  from kernels import reference

  scoring, arrays = CASE.scoring(24), CASE.arrays(24)

  @jax.jit
  def computed(q, k, v, d_out):
    (out, lse), pull = jax.vjp(lambda *x: reference.attention(*x, scoring), q, k, v)
    return dict(zip(attention_masks.OUTPUTS, (out, *pull((d_out, 0 * lse)))), lse=lse)

  right = attention_masks.exact(*arrays, scoring)
  with jax.default_matmul_precision('highest'):
    found = jax.device_get(computed(*(x.astype(np.float32) for x in arrays)))
  for name, x in found.items():
    np.testing.assert_allclose(x, right[name], rtol=2e-5, atol=2e-5)


def test_what_is_no_attention_fails():
  scoring, arrays, replace = CASE.scoring(24), CASE.arrays(24), dataclasses.replace
  right = attention_masks.exact(*arrays, scoring)
  rounded = jax.jit(functools.partial(attention_masks.twin, scoring=scoring))(*arrays)
  twin = jax.device_get(rounded) | {'lse': right['lse']}
  assert attention_masks.compared(twin, twin, right)['near']

  def near(**parts):
    found = attention_masks.exact(*arrays, replace(scoring, **parts))
    return attention_masks.compared(found, twin, right)['near']

  assert near() and not near(sinks=None) and not near(softcap=0.0)
  assert not near(mask=replace(scoring.mask, window=0))
  for name, x in (('dk', np.full_like(right['dk'], np.nan)), ('lse', right['lse'] + 0.01)):
    assert not attention_masks.compared(twin | {name: x}, twin, right)['near']


def test_rows_are_all_divided_and_errors_are_of_the_experts_own_matrices():
  setting = grouped_matmul_gpu.Grouped(rows=96, width=8, feed_forward=4)
  for experts in setting.experts:
    sizes = setting.sizes(experts)
    assert sizes.sum() == 96 and len(sizes) == experts and sizes.std() > 0
  sizes, draw = setting.sizes(8), np.random.default_rng(0)
  x, w = draw.normal(size=(96, 8)), draw.normal(size=(8, 8, 4))
  right = np.concatenate([x[start:end] @ w[i] for i, (start, end) in enumerate(_bounds(sizes))])
  assert grouped_matmul_gpu.error_of(right, x, w, sizes, one=False) < 1e-6
  assert grouped_matmul_gpu.error_of(right, x, np.roll(w, 1, 0), sizes, one=False) > 0.5
  assert grouped_matmul_gpu.error_of(x @ w[0], x, w, sizes, one=True) < 1e-6


def _bounds(sizes):
  ends = np.cumsum(sizes)
  return zip(ends - sizes, ends)
