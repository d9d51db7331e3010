"""Are a report's figures those of the times and tokens that it was told,
on a clock that is made up?
"""

import importlib.util
import math
import sys
import types

import jax
import pytest

from decode import report
from decode.report import CallTimer
from model import transformer
from model.cache import init_cache
from model.config import ModelConfig
from parallel.mesh import MeshConfig, make_mesh

ROW = types.SimpleNamespace(drafted=0, accepted=0, note='')


@pytest.fixture
def clock(monkeypatch):
  """Seconds, to be moved by hand, that a report and its bandwidth go by."""
  now = types.SimpleNamespace(seconds=0.0)
  now.perf_counter = lambda: now.seconds
  monkeypatch.setattr(report, 'time', now)
  monkeypatch.setattr(report, 'bandwidth', lambda: 1e6)
  return now


@pytest.fixture(scope='module')
def model():
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    return transformer.init(
      ModelConfig(vocabulary=8, width=8, layers=1, heads=1, feed_forward=8, max_length=8), 0
    )


def watched(clock, model, chunks, rows=(ROW,), compiling=0.0):
  """The report of a call whose chunks end at these seconds, when rows have so many tokens."""
  cache = init_cache(model.config, 2, 8)
  timer = CallTimer(model)
  jax.monitoring.record_event_duration_secs(report._COMPILING, compiling)
  timer.began(cache, 5, 5)
  for index, (seconds, lengths) in enumerate(chunks):
    if not index:
      clock.seconds = seconds
      timer.first(())
      clock.seconds += 100.0  # what is dispatched before the first chunk is read is no part of it
    clock.seconds = max(clock.seconds, seconds)
    timer.came(lengths)
  return timer.report(0, rows)


def test_steps_are_timed_from_the_first_token_on(clock, model):
  found = watched(clock, model, [(2.0, [1, 1]), (202.0, [17, 9]), (402.0, [21, 9])], compiling=1.5)
  assert (found.first_token, found.seconds, found.compile_seconds) == pytest.approx(
    (2.0, 402.0, 1.5)
  )
  assert (found.steps, found.new_tokens) == (21, 30)
  assert found.ms_per_token == pytest.approx(400.0 / 20 * 1e3), (
    'twenty more tokens of the longest row'
  )
  assert found.tokens_per_second == pytest.approx(28 / 400.0)
  assert 'then 20000.00 ms a step, 0.1 tokens/s' in str(found)
  assert found.share_of_bandwidth() == pytest.approx(found.read_bytes / 1e6 / 20.0)


def test_a_first_step_may_make_several_tokens(clock, model):
  found = watched(
    clock,
    model,
    [(2.0, [5]), (202.0, [9])],
    [types.SimpleNamespace(drafted=8, accepted=7, note='')],
  )
  assert found.ms_per_token == pytest.approx(
    200.0 / 4 * 1e3
  ) and found.tokens_per_second == pytest.approx(4 / 200.0)


def test_too_few_steps_are_not_timed(clock, model):
  found = watched(clock, model, [(2.0, [1, 1])])
  assert (
    math.isnan(found.ms_per_token)
    and math.isnan(found.tokens_per_second)
    and math.isnan(found.share_of_bandwidth())
  )
  assert 'first token 2000.0 ms, and too few steps behind it to time\n' in str(
    found
  ) and 'nan' not in str(found)


def test_an_import_registers_nothing_and_timers_one_listener(model, monkeypatch):
  """The module, read again under another name."""
  listeners = []
  monkeypatch.setattr(
    jax.monitoring, 'register_event_duration_secs_listener', lambda listen: listeners.append(listen)
  )
  spec = importlib.util.spec_from_file_location('another_report', report.__file__)
  again = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, 'another_report', again)
  spec.loader.exec_module(again)
  assert not listeners
  timers = [again.CallTimer(model) for _ in range(3)]
  assert len(listeners) == 1 and len(timers) == 3
