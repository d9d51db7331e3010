"""Does each process hear all messages, in order, and is none forgotten before all have heard it?"""

import threading

import jax
import pytest
from jax._src import distributed

from parallel import messages
from parallel.messages import Messages


class Store:
  """What jax's coordinator keeps, without one; the calls of its client that are made."""

  def __init__(self):
    self.values, self.changed = {}, threading.Condition()

  def key_value_set_bytes(self, key, value, allow_overwrite=False):
    with self.changed:
      assert allow_overwrite or key not in self.values
      self.values[key] = value
      self.changed.notify_all()

  def key_value_try_get_bytes(self, key):
    if key not in self.values:
      raise jax.errors.JaxRuntimeError('NOT_FOUND')
    return self.values[key]

  def blocking_key_value_get_bytes(self, key, milliseconds):
    with self.changed:
      if self.changed.wait_for(lambda: key in self.values, milliseconds / 1e3):
        return self.values[key]
    raise jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED')

  def key_value_delete(self, key):
    for each in [each for each in self.values if each.startswith(key)]:
      del self.values[each]

  @property
  def kept(self) -> int:
    return len({key.split('/')[1] for key in self.values if '/pulse/' not in key})


@pytest.fixture
def store(monkeypatch):
  made = Store()
  monkeypatch.setattr(distributed.global_state, 'client', made)
  monkeypatch.setattr(messages, 'PART', 4)
  return made


def test_messages_are_kept_until_all_have_heard_them(store):
  first, slow, quick = (Messages('x') for _ in range(3))
  said = [b'', b'1', b'four', b'more than one part']
  for message in said:
    first.say(message)
  assert [quick.hear() for _ in said] == said and slow.hear() == said[0]
  first._clear(min(slow._number, quick._number))
  assert store.kept == 3
  assert [slow.hear() for _ in said[1:]] == said[1:]
  first._clear(4)
  assert store.kept == 0
  first.say(b'on')
  assert slow.hear() == quick.hear() == b'on'


def living(store, monkeypatch, count: int) -> dict[int, Messages]:
  """The other processes of so many, each of which has said that it lives."""
  monkeypatch.setattr(messages, 'PULSE', 0.01)
  monkeypatch.setattr(jax, 'process_count', lambda: count)
  others = {process: Messages('x') for process in range(1, count)}
  for process, each in others.items():
    with monkeypatch.context() as patch, store.changed:
      patch.setattr(jax, 'process_index', lambda process=process: process)
      each.live()
      assert store.changed.wait_for(
        lambda process=process: f'x/pulse/{process}' in store.values, 60
      )
  return others


def test_what_all_say_that_they_have_heard_is_not_kept(store, monkeypatch):
  first, others = Messages('x'), living(store, monkeypatch, 3)
  first.watch(lambda process: None)
  for message in (b'a', b'b'):
    first.say(message)
  others[1].hear()
  with store.changed:  # process 1 has said that it heard one; process 2 has not heard any
    assert store.changed.wait_for(lambda: store.values['x/pulse/1'].endswith(b' 1'), 60)
  assert store.kept == 2
  assert [others[2].hear(), others[2].hear(), others[1].hear()] == [b'a', b'b', b'b']
  with store.changed:
    assert store.changed.wait_for(lambda: not store.kept, 60)
  for each in (first, *others.values()):
    each.close()


def test_who_says_nothing_any_more_is_named(store, monkeypatch):
  monkeypatch.setattr(messages, 'PATIENCE', 0.1)
  first, lost, named = Messages('x'), [], threading.Event()
  (other,) = living(store, monkeypatch, 2).values()
  other.close()
  first.watch(lambda process: (lost.append(process), named.set()))
  assert named.wait(60) and lost == [1]
