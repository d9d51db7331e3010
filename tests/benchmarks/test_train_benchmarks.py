"""Do both sides of the training benchmarks run what they say,
and does a side that cannot run say why? No timing is looked at.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import types

import jax
import pytest

from benchmarks import decode, train_cpu, train_gpu, train_step
from model import params, transformer


def run(*flags, module='benchmarks.train_gpu'):
  return subprocess.run(
    [sys.executable, '-m', module, *flags],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
@pytest.mark.long
def test_a_rehearsal_runs_all_of_it(tmp_path):
  done = run('--rehearse', '--quick', '--steps=1', f'--json={tmp_path / "found.json"}')
  assert done.returncode == 0, done.stdout + done.stderr
  found = json.loads((tmp_path / 'found.json').read_text())['results']
  assert found['rehearsal'] and 'a rehearsal: nothing here is a measurement' in done.stdout
  dense, blocks = (found['sides'][f'{side} 4096'] for side in ('xla', 'blocked'))
  assert (
    dense['losses'] == pytest.approx(blocks['losses'], rel=1e-4)
    and len(dense['steps']) == 1
    and dense['losses'][1] < dense['losses'][0]
  )
  assert (
    found['sides']['pallas_gpu 4096']['error'] == 'it is for GPUs'
    and 'not measured: Tandem, cuDNN, 4096: it is for GPUs' in done.stdout
  )


def test_without_a_gpu_it_says_so():
  done = run()
  assert done.returncode == 1 and done.stdout == (
    "not measured: no GPU at hand, jax sees 'cpu' (cpu); --rehearse runs the harness without one\n"
  )


def test_the_model_has_the_size_that_it_says():
  made = train_gpu.config(16384, 'auto')
  assert (made.data.batch_size, made.data.sequence_length, made.model.execution.dtype) == (
    1,
    16384,
    'bfloat16',
  )
  model = jax.eval_shape(lambda: transformer.init(made.resolve(made.model.vocabulary).model, 0))
  from configs import bench_1b

  assert f'{params.count(model):,}' in bench_1b.__doc__


def test_a_side_that_would_not_run_cudnn_is_no_measurement_of_it():
  with pytest.raises(
    RuntimeError, match='cuDNN does not compute this attention: it is for GPUs, not a cpu'
  ):
    train_gpu.side_of('cudnn', 4096, 1, True, False)


@pytest.mark.slow
def test_rows_that_say_nothing_leave_the_mask_without_segments(one_device):
  """What cuDNN honours; the loss is that of rows that hold one document each and say so."""
  made, losses = train_gpu.config(4096, 'reference', rehearsal=True), []
  for packed in (True, False):
    make_state, step, shapes = train_step.tandem_step(made, packed)
    batch = jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), shapes())
    assert (batch.segments is None) == (not packed)
    losses.append(float(step(jax.jit(make_state)(), batch)[1]['loss']))
  assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_cpus_model_is_the_one_that_was_measured_before():
  made = train_cpu.config()
  model = jax.eval_shape(lambda: transformer.init(made.resolve(made.model.vocabulary).model, 0))
  assert (
    params.count(model) == 31_990_272 and made.data.batch_size * made.data.sequence_length == 4096
  )


OPTIONS = types.SimpleNamespace(steps=1, rehearse=False)


def test_memory_that_is_too_small_is_tried_again_with_less_and_said(monkeypatch):
  tried = []

  def in_process(module, *arguments, **_):
    tried.append('--checkpointed' in arguments)
    if not tried[-1]:
      raise RuntimeError('ended with code 1: torch.OutOfMemoryError: CUDA out of memory')
    return {'step_seconds': 1.0}

  monkeypatch.setattr(train_step, 'in_process', in_process)
  assert train_gpu.measure('torch', 4096, OPTIONS, time.time() + 60) == {
    'step_seconds': 1.0,
    'checkpointed': True,
  } and tried == [False, True]
  tried.clear()
  assert 'out of memory' in train_gpu.measure('xla', 4096, OPTIONS, time.time() + 60)[
    'error'
  ] and tried == [False]
  assert train_gpu.measure('xla', 4096, OPTIONS, time.time() + 5) == {
    'error': 'skipped: no time left'
  }


def test_a_process_that_fails_says_why_and_one_that_hangs_is_ended():
  module = 'benchmarks.train_gpu'
  with pytest.raises(
    RuntimeError,
    match=re.escape('cuDNN does not compute this attention: it is for GPUs, not a cpu'),
  ):
    train_step.in_process(
      module,
      '--side',
      'cudnn',
      '--length',
      '4096',
      '--rehearse',
      environment={'JAX_PLATFORMS': 'cpu'},
    )
  with pytest.raises(RuntimeError, match='took more than 1 s'):
    train_step.in_process(
      module,
      '--side',
      'xla',
      '--length',
      '4096',
      '--rehearse',
      environment={'JAX_PLATFORMS': 'cpu'},
      timeout=1,
    )


def sides_of(module, fails, tmp_path, monkeypatch, found, flags=()):
  """What the benchmark's file says where runs of one side fail, and what it said before each."""
  path, seen = tmp_path / 'found.json', []

  def in_process(_, *arguments, environment):
    seen.append(json.loads(path.read_text())['results'] if path.exists() else {})
    if fails in ' '.join(arguments):
      raise RuntimeError('ended with code 1: ModuleNotFoundError: No module named torch')
    return dict(found)

  monkeypatch.setattr(train_step, 'in_process', in_process)
  monkeypatch.setattr(sys, 'argv', ['benchmark', f'--json={path}', *flags])
  assert module.main() == 1
  return json.loads(path.read_text())['results'], seen


def test_what_a_gpu_did_is_kept_before_the_next_side(tmp_path, monkeypatch):
  path, seen = tmp_path / 'found.json', []

  def measure(side, length, options, ends):
    seen.append([*json.loads(path.read_text())['results']['sides']] if path.exists() else [])
    return {'error': 'no memory'}

  monkeypatch.setattr(train_gpu, 'measure', measure)
  monkeypatch.setattr(train_gpu, 'device', lambda: ('gpu', 'NVIDIA H200'))
  monkeypatch.setattr(
    sys, 'argv', ['train_gpu', '--quick', '--sides=cudnn,torch', f'--json={path}']
  )
  assert train_gpu.main() == 0 and seen == [[], ['cudnn 4096']]


def test_a_side_that_fails_on_a_cpu_loses_itself_alone(tmp_path, monkeypatch, capsys):
  found = {
    'step_seconds': 1.0,
    'gemm': 1e11,
    'peak_bytes': 2**31,
    'first_step_seconds': 2.0,
    'parameters': 32,
  }
  written, seen = sides_of(train_cpu, '--side theirs', tmp_path, monkeypatch, found)
  assert written['best']['ours']['tokens_per_second'] == 4096 and 'theirs' not in written['best']
  assert [len(said) for said in seen] == [0, 1, 1, 1] and len(seen[3]['runs']['ours']) == 2
  said = capsys.readouterr().out
  assert 'Tandem' in said and said.splitlines()[-1].startswith('not measured: theirs: ended with')


def test_a_side_that_fails_to_generate_loses_itself_alone(tmp_path, monkeypatch, capsys):
  found = {'seconds': 1.0, 'first_token': 0.1, 'ms_per_step': 4.0, 'bandwidth': 1e9, 'device': 'x'}
  found |= {'peak_bytes': 2**31, 'read_bytes': 1e6}
  flags = '--batches=1,2', '--sides=ours,static', '--runs=1'
  written, seen = sides_of(decode, '--run static', tmp_path, monkeypatch, found, flags)
  assert written['1']['best']['ours']['tokens_per_second'] == 256 and len(seen) == 4
  assert seen[3]['2']['runs']['ours'] and 'best' not in seen[3]['2']
  assert capsys.readouterr().out.count('not measured: static: ended with code 1') == 2
  assert written['2']['runs']['static'][0]['error'].endswith('No module named torch')


def test_the_table_is_of_what_was_measured(capsys):
  side = {
    'step_seconds': 0.5,
    'tokens': 16384,
    'device_peak_bytes': 31e9,
    'first_step_seconds': 9.0,
    'losses': [10.0, 9.0],
    'checkpointed': False,
  }
  results = {
    'pallas_gpu 4096': side | {'flops_per_token': 7e9},
    'torch 4096': side | {'step_seconds': 1.0, 'checkpointed': True},
    'xla 4096': {'error': 'no memory'},
  }
  train_gpu.show(results, 989.4e12)
  text = capsys.readouterr().out
  assert re.search(r'Tandem, our kernel +32,768 +23\.2% +31\.0', text) and re.search(
    r'transformers, checkpointed +16,384 +11\.6%', text
  )
  assert 'not measured: Tandem, XLA, dense scores, 4096: no memory' in text
  assert dataclasses.asdict(train_gpu.config(4096, 'xla').data)['batch_size'] == 4
