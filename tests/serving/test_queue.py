"""Do keys take turns, do priorities go first, and does everyone go some time?"""

import hypothesis
from hypothesis import strategies as st

from serving.queue import Queue, Waiting


def order(queue, now=0.0):
  taken = []
  while (item := queue.next(now)) is not None:
    queue.turn(item)
    taken.append(item)
  return taken


def names(items):
  return ''.join(item.key for item in items)


def filled(keys, patience=10.0, **given):
  queue = Queue(patience)
  for key in keys:
    queue.add(Waiting(key, given.get('priority', 0), given.get('since', 0.0)))
  return queue


def test_keys_take_turns():
  assert names(order(filled('aaaabbc'))) == 'abcabaa'
  queue = filled('aaaa')
  queue.turn(queue.next(0))
  queue.add(Waiting('b', 0, 0.0))
  assert names(order(queue)) == 'abaa', 'who comes does not go before who has waited'


def test_priorities_go_first_until_others_have_waited_too_long():
  queue = Queue(10.0)
  late = Waiting('a', 5, 0.0)
  queue.add(late)
  for _ in range(3):
    queue.add(Waiting('b', 1, 8.0))
  assert queue.next(9.0).key == 'b'
  assert queue.next(10.0) is late
  assert names(order(queue, 9.0)) == 'bbba'
  assert queue.next(0) is None and not len(queue)


def test_what_may_not_go_lets_others_pass():
  queue = filled('ab')
  assert queue.next(0, lambda item: item.key == 'b').key == 'b'
  assert queue.next(0, lambda item: False) is None
  queue.remove(queue.next(0))
  assert names(queue) == 'b'


@hypothesis.given(
  st.lists(st.tuples(st.sampled_from('abcd'), st.integers(0, 3)), min_size=1, max_size=40),
  st.integers(1, 4),
)
def test_nobody_starves(arrivals, rate):
  """Whoever has waited for the patience goes after one turn of each other key, and whatever its own
  has before it, however many of better priorities come.
  """
  queue, now, coming, target = Queue(5.0), 0.0, list(arrivals), Waiting('t', 9, 0.0)
  queue.add(target)
  for turn in range(100):
    for _ in range(rate):
      key, priority = coming.pop(0)
      coming.append((key, priority))
      queue.add(Waiting(key, priority, now))
    item = queue.next(now)
    queue.turn(item)
    now += 1.0
    if item is target:
      assert turn <= 5 + 4
      return
  raise AssertionError('it waits for ever')
