"""Are step times those of completed steps, is every step's number seen, and does a resumed run have
each step once?
"""

import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from workdir import watch as watching
from workdir.metrics import FILE, read_metrics
from workdir.profile import ProfileWindow
from workdir.watch import Watch


class Device:
  """A device with a clock: work queues up, and reading a result waits for it."""

  def __init__(self):
    self.now, self.free, self.events = 100.0, 100.0, []

  def clock(self):
    return self.now

  def run(self, step, seconds, value=1.0):
    self.free = max(self.free, self.now) + seconds
    self.events.append(f'dispatch {step}')
    return Result(self, step, self.free, value)


class Result:
  def __init__(self, device, step, ready, value):
    self.device, self.step, self.ready, self.value = device, step, ready, value

  def __array__(self, dtype=None, copy=None):
    self.device.now = max(self.device.now, self.ready)
    self.device.events.append(f'read {self.step}')
    return np.asarray(self.value, dtype)


def watch(tmp_path, device, steps, **changes):
  settings = dict(
    steps=steps,
    log_every=1,
    tensorboard=False,
    write=True,
    stream=io.StringIO(),
    clock=device.clock,
  )
  return Watch(tmp_path, **settings | changes)


def lines(tmp_path):
  return [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]


def test_a_step_is_read_only_after_the_next_is_dispatched(tmp_path):
  device = Device()
  with watch(tmp_path, device, range(3)) as w:
    done = [w.step(step, {'loss': device.run(step, 1, step)}, 1) for step in range(3)]
    done.append(w.flush())
  assert done == [
    None,
    {'step': 0, 'loss': 0.0},
    {'step': 1, 'loss': 1.0},
    {'step': 2, 'loss': 2.0},
  ]
  assert device.events == ['dispatch 0', 'dispatch 1', 'read 0', 'dispatch 2', 'read 1', 'read 2']


def test_step_seconds_lie_between_completions(tmp_path):
  device, seconds = Device(), [30.0, 1.0, 2.0, 0.5, 4.0]
  with watch(tmp_path, device, range(5), flops_per_token=10, peak=400.0) as w:
    for step, duration in enumerate(seconds):
      w.step(step, {'loss': device.run(step, duration)}, tokens=8)
  first, *others = lines(tmp_path)
  assert first['first_step_seconds'] == 30 and 'step_seconds' not in first and 'mfu' not in first
  assert [line['step_seconds'] for line in others] == seconds[1:]
  assert [line['tokens_per_second'] for line in others] == [8, 4, 16, 2]
  assert [line['mfu'] for line in others] == [0.2, 0.1, 0.4, 0.05]
  assert [line['train_seconds'] for line in lines(tmp_path)] == list(np.cumsum(seconds))
  assert others[-1]['tokens'] == 40


def test_a_slow_host_is_in_the_step_time(tmp_path):
  device = Device()
  with watch(tmp_path, device, range(4)) as w:
    for step in range(4):
      device.now += 5
      w.step(step, {'loss': device.run(step, 1)}, 1)
  assert [line['step_seconds'] for line in lines(tmp_path)[1:-1]] == [5, 5]


def test_pauses_are_not_in_the_step_time_and_wait_for_the_step_in_flight(tmp_path):
  device = Device()
  with watch(tmp_path, device, range(4), peak=None) as w:
    for step in range(4):
      w.step(step, {'loss': device.run(step, 1, step)}, 1)
      if step == 1:
        with w.pause() as done:
          assert done == {'step': 1, 'loss': 1.0}
          device.now += 1000
          w.log(1, {'bits_per_byte': 2.5})
          with w.pause() as nothing:
            assert nothing is None
            device.now += 1000
  written = lines(tmp_path)
  assert [line['step'] for line in written] == [0, 1, 2, 3]
  assert [line['step_seconds'] for line in written[1:]] == [1, 1, 1]
  assert written[1]['bits_per_byte'] == 2.5 and not any('mfu' in line for line in written)
  assert written[-1]['train_seconds'] == 4 and written[-1]['wall_seconds'] == 2004


def test_lines_hold_means_and_every_step_is_counted(tmp_path):
  device = Device()
  with watch(tmp_path, device, range(1, 8), log_every=3) as w:
    for step in range(1, 8):
      w.step(step, {'loss': device.run(step, step, step)}, tokens=10)
      if step == 4:
        with w.pause():
          pass
  written = lines(tmp_path)
  assert [line['step'] for line in written] == [3, 4, 6, 7]
  assert [line['loss'] for line in written] == [2, 4, 5.5, 7]
  assert [line['step_seconds'] for line in written] == [2.5, 4, 5.5, 7]
  assert [line['tokens'] for line in written] == [30, 40, 60, 70]


def test_nonfinite_numbers_reach_the_trainer_and_the_file(tmp_path):
  device = Device()
  losses = [1.0, math.nan, 3.0, math.inf]
  with watch(tmp_path, device, range(1, 5), log_every=3) as w:
    seen = [
      w.step(step, {'loss': device.run(step, 1, losses[step - 1])}, 1) for step in range(1, 5)
    ] + [w.flush()]
  np.testing.assert_equal([done['loss'] for done in seen[1:]], losses)
  assert [(line['loss'], line['nonfinite_steps']) for line in lines(tmp_path)] == [
    (2.0, 1),
    ('inf', 1),
  ]


@pytest.mark.parametrize('killed', [False, True])
def test_resuming_has_each_step_once_and_totals_go_on(tmp_path, killed):
  device, log = Device(), io.StringIO()
  with watch(tmp_path, device, range(0, 8)) as w:
    for step in range(8):
      w.step(step, {'loss': device.run(step, 2, step)}, tokens=5)
  if killed:
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text() + '{"step": 8')
  with watch(tmp_path, device, range(6, 10), stream=log) as w:
    for step in range(6, 10):
      w.step(step, {'loss': device.run(step, 1, -step)}, tokens=5)
  written = lines(tmp_path)
  assert [line['step'] for line in written] == list(range(10))
  assert [line['loss'] for line in written] == [0, 1, 2, 3, 4, 5, -6, -7, -8, -9]
  assert [line['tokens'] for line in written] == [5 * (step + 1) for step in range(10)]
  assert [line['train_seconds'] for line in written] == [2, 4, 6, 8, 10, 12, 13, 14, 15, 16]
  assert f'dropped {2 + killed} line(s) at or after step 6' in log.getvalue()
  assert written[-1]['wall_seconds'] == 16


def test_chips_of_each_start_count_and_so_do_steps_that_were_done_twice(tmp_path):
  """Eight steps of 2 s on one chip, of which two are done again, and two more, on four chips."""
  device = Device()
  for steps, chips in ((range(8), 1), (range(6, 10), 4)):
    with watch(tmp_path, device, steps, chips=chips) as w:
      for step in steps:
        w.step(step, {'loss': device.run(step, 2)}, tokens=5)
      mark = w.mark()
  last = lines(tmp_path)[-1]
  assert last['wall_seconds'] == 20 and last['chip_seconds'] == 8 * 2 + 4 * 2 * 4
  assert mark['totals']['chip_seconds'] == 8 * 2 + 4 * 3 * 2


def test_older_lines_count_by_the_chips_of_now(tmp_path):
  (tmp_path / FILE).write_text('{"step": 0, "loss": 1.0, "wall_seconds": 6.0, "tokens": 1}\n')
  device = Device()
  with watch(tmp_path, device, range(1, 2), chips=2) as w:
    w.step(1, {'loss': device.run(1, 2)}, tokens=5)
  assert lines(tmp_path)[-1]['chip_seconds'] == 16


def test_an_error_keeps_what_completed(tmp_path):
  device = Device()
  with (
    pytest.raises(RuntimeError, match='boom'),
    watch(tmp_path, device, range(9), log_every=100) as w,
  ):
    for step in range(4):
      w.step(step, {'loss': device.run(step, 1, step)}, 1)
    raise RuntimeError('boom')
  assert [(line['step'], line['loss']) for line in lines(tmp_path)] == [(0, 0), (2, 1.5)]


def test_other_processes_time_but_write_nothing(tmp_path):
  device, log = Device(), io.StringIO()
  with watch(tmp_path / 'run', device, range(3), write=False, stream=log) as w:
    w.step(0, {'loss': device.run(0, 1)}, 1)
    with w.pause():
      w.log(0, {'bits_per_byte': 1.0})
    assert w.step(1, {'loss': device.run(1, 1)}, 1) is None
    assert w.step(2, {'loss': device.run(2, 1)}, 1) == {'step': 1, 'loss': 1.0}
  assert not (tmp_path / 'run').exists() and not log.getvalue()


def test_plain_lines_and_a_bar_show_the_numbers(tmp_path, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  monkeypatch.setenv('TERM', 'xterm')
  for terminal in (False, True):
    device, stream = Device(), io.StringIO()
    stream.isatty = lambda terminal=terminal: terminal
    with watch(
      tmp_path / str(terminal),
      device,
      range(1, 401),
      log_every=10,
      flops_per_token=1e6,
      peak=1e12,
      stream=stream,
    ) as w:
      for step in range(1, 11):
        w.step(step, {'loss': device.run(step, 0.5, 2.25)}, tokens=123_456)
      with w.pause():
        w.log(10, {'bits_per_byte': 2.104})
      w.print('a note')
    shown = stream.getvalue()
    assert 'a note' in shown and ('\x1b' in shown) == terminal
    utilisation = 'MFU 25%' if terminal else 'MFU 24.7%'
    for text in ('10/400', 'loss 2.25', '247k tok', utilisation, '0:03:15 left', '2.104 bits/byte'):
      assert text in shown, (terminal, text, shown)


def test_of_a_policy_its_reward_and_how_far_it_is_are_shown(tmp_path, monkeypatch):
  """On a terminal within 80 columns, to the time that is left."""
  monkeypatch.setenv('COLUMNS', '80')
  monkeypatch.setenv('TERM', 'xterm')
  metrics = {'reward': -0.12345, 'kl': 0.01234, 'log_ratio': 2.6e-6}
  for terminal in (False, True):
    device, stream = Device(), io.StringIO()
    stream.isatty = lambda terminal=terminal: terminal
    given = {'flops_per_token': 1e6, 'peak': 1e12, 'stream': stream}
    with watch(tmp_path / str(terminal), device, range(1, 401), **given) as w:
      for step in range(1, 11):
        w.step(step, {'loss': device.run(step, 0.5, 2.25)} | metrics, tokens=123_456)
    shown = stream.getvalue()
    said = ('reward -0.123', 'KL 0.012', 'drift 3e-06', '247k tok/s', '0:03:15 left')
    if not terminal:
      said = ('loss 2.25', 'reward -0.1235', 'KL 0.012', 'log ratio 2.6e-06', '247k tokens/s')
    for text in said:
      assert text in shown, (terminal, text, shown)
    assert ('loss' in shown) != terminal


def test_device_memory_is_shown_where_known(monkeypatch):
  class Chip:
    stats = {'peak_bytes_in_use': 60, 'bytes_limit': 80}

    def memory_stats(self):
      return self.stats

  monkeypatch.setattr(jax, 'local_devices', lambda: [Chip()])
  assert watching.memory()['device_bytes'] == 60 and watching.memory()['device_share'] == 0.75
  Chip.stats = None
  found = watching.memory()
  assert 'device_share' not in found and found['host_bytes'] > 10 * 2**20


def test_tensorboard_has_the_same_numbers(tmp_path):
  from tensorboardX.proto import event_pb2

  device = Device()
  for steps in (range(0, 4), range(2, 5)):
    with watch(tmp_path, device, steps, tensorboard=True) as w:
      for step in steps:
        w.step(step, {'loss': device.run(step, 1, step + steps.start)}, tokens=1)
      w.log(steps[-1], {'validation_loss': 2.0, 'bits_per_byte': 0.5})
      w.write_text(steps[-1], 'samples', 'a text')
  found, purged, texts = {}, [], {}
  for file in sorted((tmp_path / 'tensorboard').iterdir(), key=lambda file: file.suffix):
    data = file.read_bytes()
    while data:
      # A TFRecord: 8 bytes of length, 4 of checksum, the event, 4 of checksum.
      length = int.from_bytes(data[:8], 'little')
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      if event.HasField('session_log'):
        purged.append(event.step)
      for value in event.summary.value:
        found[event.step, value.tag] = value.simple_value
        texts[value.tag] = list(value.tensor.string_val)
  assert sorted(purged) == [0, 2]
  assert texts['samples/text_summary'] == [b'a text']
  evaluated = {'validation_loss': 'validation/loss', 'bits_per_byte': 'validation/bits_per_byte'}
  for line in read_metrics(tmp_path / FILE):
    for name, value in line.items():
      tag = evaluated.get(name, f'train/{name}')
      assert name == 'step' or found[line['step'], tag] == pytest.approx(value), name


def test_real_steps_are_timed_after_they_complete(tmp_path):
  step_function = jax.jit(lambda x: {'loss': (x @ x).sum()})
  x = jnp.ones((64, 64))
  with Watch(tmp_path, steps=range(5), log_every=2, tensorboard=False, stream=io.StringIO()) as w:
    done = [w.step(step, step_function(x), tokens=64) for step in range(5)] + [w.flush()]
  assert [d['loss'] for d in done[1:]] == [64.0**3] * 5
  assert all(line.get('step_seconds', 1) > 0 for line in read_metrics(tmp_path / FILE))


def test_misuse_is_refused(tmp_path):
  with pytest.raises(ValueError, match='log_every=0'):
    watch(tmp_path, Device(), range(3), log_every=0)
  with pytest.raises(ValueError, match='steps=range'):
    watch(tmp_path, Device(), range(0, 9, 3))
  with (
    watch(tmp_path, Device(), range(5, 9)) as w,
    pytest.raises(ValueError, match='step 6 does not follow step 4'),
  ):
    w.step(6, {}, 1)


@pytest.mark.parametrize('text', ['x', '3-', '-3', '1-2-3', '1,2', '1 - 2'])
def test_profile_windows_that_are_no_steps(tmp_path, text):
  with pytest.raises(ValueError, match='names no steps'):
    ProfileWindow(text, tmp_path, range(10))


@pytest.mark.parametrize('text', ['5-4', '8-10', '0', '10'])
def test_profile_windows_outside_the_run(tmp_path, text):
  with pytest.raises(ValueError, match='not within the steps of this run, 1-9'):
    ProfileWindow(text, tmp_path, range(1, 10))


def test_profile_traces_the_steps_named(tmp_path, monkeypatch):
  events = []
  monkeypatch.setattr(
    jax.profiler, 'start_trace', lambda directory: events.append(f'start {directory}')
  )
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: events.append('stop'))
  monkeypatch.setattr(jax, 'block_until_ready', lambda outputs: events.append(f'wait {outputs}'))

  def run(text, stop=8):
    window = ProfileWindow(text, 'out', range(8))
    for step in range(stop):
      window.before(step)
      events.append(step)
      window.after(step, f'outputs {step}')
    window.close()

  run('3-4')
  assert events == [0, 1, 2, 'start out', 3, 4, 'wait outputs 4', 'stop', 5, 6, 7]
  events.clear()
  run('3-6', stop=5)
  assert events == [0, 1, 2, 'start out', 3, 4, 'stop']
  events.clear()
  run('')
  assert events == list(range(8))


@pytest.mark.slow
def test_profile_writes_a_trace(tmp_path):
  window = ProfileWindow('1', tmp_path, range(3))
  for step in range(3):
    window.before(step)
    outputs = jnp.ones(3) * step
    window.after(step, outputs)
  assert list(tmp_path.rglob('*.xplane.pb'))


@pytest.mark.parametrize(
  'number, text',
  [
    (0, '0'),
    (999, '999'),
    (999.6, '1k'),
    (12345, '12.3k'),
    (1.2e6, '1.2M'),
    (0.01234, '0.0123'),
    (3e15, '3P'),
  ],
)
def test_short(number, text):
  assert watching.short(number) == text
