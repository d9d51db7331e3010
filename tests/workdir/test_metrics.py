"""Does metrics.jsonl keep every number, each step once, and survive a killed process?"""

import errno
import json
import math
import threading

import jax.numpy as jnp
import pytest
from hypothesis import given, settings, strategies as st

from workdir import metrics

numbers = st.one_of(st.integers(-(10**9), 10**9), st.floats())


def write(path, *lines):
  file = metrics.Lines(path)
  for line in lines:
    file.append(line)
  file.close()


@settings(deadline=None)
@given(st.dictionaries(st.text(st.characters(codec='utf-8')), numbers))
def test_round_trip_of_any_number_through_strict_json(tmp_path_factory, values):
  path = tmp_path_factory.mktemp('run') / metrics.FILE
  line = values | {'step': 3}
  write(path, line)

  def refuse(name):
    raise ValueError(name)

  json.loads(path.read_text(), parse_constant=refuse)
  (read,) = metrics.read_metrics(path)
  assert read.keys() == line.keys()
  assert all(
    read[name] == value or math.isnan(read[name]) and math.isnan(value)
    for name, value in line.items()
  )


def test_lines_of_one_step_are_one_and_steps_are_in_order(tmp_path):
  write(
    tmp_path / 'm',
    {'step': 2, 'loss': 1.0},
    {'step': 1, 'loss': 2.0},
    {'step': 2, 'bits_per_byte': 3.0},
  )
  assert metrics.read_metrics(tmp_path / 'm') == [
    {'step': 1, 'loss': 2.0},
    {'step': 2, 'loss': 1.0, 'bits_per_byte': 3.0},
  ]
  assert metrics.read_metrics(tmp_path / 'none') == []


def test_dropping_is_exact_and_takes_a_torn_line_with_it(tmp_path):
  path = tmp_path / 'm'
  write(path, *({'step': step, 'loss': step / 10} for step in range(10)))
  whole = path.read_text().splitlines(keepends=True)
  path.write_text(path.read_text() + '{"step": 10, "lo')
  assert [line['step'] for line in metrics.read_metrics(path)] == list(range(10))
  assert metrics.drop_from(path, 7) == 4
  assert path.read_text() == ''.join(whole[:7])
  assert metrics.drop_from(path, 7) == 0
  assert [file.name for file in tmp_path.iterdir()] == ['m']
  assert metrics.drop_from(tmp_path / 'none', 0) == 0


@pytest.mark.parametrize('broken', ['loss 3', '[1]', '{"loss": 1.0}', '{"step": "one"}x'])
def test_a_broken_line_is_named_and_nothing_is_lost(tmp_path, broken):
  path = tmp_path / 'm'
  write(path, {'step': 0})
  path.write_text(path.read_text() + broken + '\n{"step": 2}\n')
  before = path.read_text()
  with pytest.raises(ValueError, match='m, line 2 is not a line of metrics'):
    metrics.drop_from(path, 1)
  assert path.read_text() == before


def test_scalars_come_to_the_host_flat():
  tree = {
    'loss': jnp.float32(1.5),
    'norm': {'a': jnp.bfloat16(2), 'b': {'c': 3}},
    'count': jnp.int32(4),
    'ok': True,
    'load': jnp.asarray([0.5, 2]),
  }
  found = metrics.scalars(tree)
  assert found == {
    'loss': 1.5,
    'norm/a': 2.0,
    'norm/b/c': 3,
    'count': 4,
    'ok': 1.0,
    'load/0': 0.5,
    'load/1': 2.0,
  }
  assert isinstance(found['count'], int) and isinstance(found['norm/a'], float)
  with pytest.raises(ValueError, match=r"metric 'norm/a' has shape \(1, 2\)"):
    metrics.scalars({'norm': {'a': jnp.ones((1, 2))}})


def test_nonfinite_names():
  assert metrics.nonfinite({'a': 1.0, 'b': math.nan, 'c': -math.inf}) == ['b', 'c']


@pytest.mark.parametrize('failing', ['write', 'flush'])
def test_a_full_disk_under_tensorboard_is_an_error_and_no_wait(tmp_path, monkeypatch, failing):
  """Tried in a thread of its own, which is left behind where it waits for good."""
  from tensorboardX import event_file_writer

  room, works = iter(range(9)), getattr(event_file_writer.RecordWriter, failing)

  def full(*given):
    if failing == 'flush' or next(room, None) is None:
      raise OSError(errno.ENOSPC, 'No space left on device')
    works(*given)

  def lines():
    with pytest.raises(OSError, match='No space left'):
      board = metrics.TensorBoard(tmp_path, 0)
      for step in range(40):
        board.write({'step': step, 'loss': 1.0})
      board.close()
    ended.set()

  monkeypatch.setattr(event_file_writer.RecordWriter, failing, full)
  ended = threading.Event()
  threading.Thread(target=lines, daemon=True).start()
  assert ended.wait(20)


def test_tensorboard_failure_is_not_swallowed(tmp_path):
  (tmp_path / 'tensorboard').write_text('a file where the directory must go')
  board = metrics.TensorBoard(tmp_path / 'tensorboard', 0)
  board.write({'step': 0, 'loss': 1.0})
  with pytest.raises(OSError):
    board.close()
