"""How does process 0 tell the others what to do, one thing after another, and how is it known that
one of them is gone? By the store that jax's coordinator keeps for all: no port and no protocol of
its own, and no device takes part, so that who has nothing to hear may wait for days.

Messages are numbered; each other process hears all of them, in order. That it lives a process says
every PULSE seconds, from a thread of its own, whatever its devices do, and with that how many it
has heard: what all have, the store need not keep.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import jax

PULSE = 1.0  # seconds
PATIENCE = 20.0  # seconds without a pulse after which a process is lost
PART = 2**19  # bytes of a value; a longer message is several
WAIT = 1000  # milliseconds that a look for the next message lasts, in which no signal is heeded


class Messages:
  """One line of them, by its name; the same in every process."""

  def __init__(self, name: str):
    from jax._src import distributed

    self._client: Any = distributed.global_state.client
    self._name = name
    self._number = 0  # of the next message
    self._cleared = 0  # messages before this one are not kept any more: all have heard them
    self._over = threading.Event()

  # Of process 0.

  def say(self, message: bytes) -> None:
    parts = [message[at : at + PART] for at in range(0, len(message), PART)] or [b'']
    # The first one, which is waited for, comes last.
    for index in range(len(parts) - 1, 0, -1):
      self._client.key_value_set_bytes(self._key(self._number, index), parts[index])
    head = b'%d ' % len(parts)
    self._client.key_value_set_bytes(self._key(self._number, 0), head + parts[0])
    self._number += 1

  def watch(self, lost: Callable[[int], None]) -> None:
    """lost: hears, once, from a thread of its own, which process gives no sign of life."""
    threading.Thread(target=self._watch, args=(lost,), name='pulses', daemon=True).start()

  # Of the others.

  def hear(self) -> bytes:
    """The next message, when there is one. Raises what jax does once process 0 is gone."""
    first = self._waited(self._key(self._number, 0))
    count, _, message = first.partition(b' ')
    for index in range(1, int(count)):
      message += self._waited(self._key(self._number, index))
    self._number += 1
    return message

  def live(self) -> None:
    """From now on this process says that it does."""
    threading.Thread(target=self._beat, name='pulse', daemon=True).start()

  def close(self) -> None:
    """Neither lives nor watches any more."""
    self._over.set()

  def _key(self, number: int, index: int) -> str:
    return f'{self._name}/{number}/{index}'

  def _pulse(self, process: int) -> str:
    return f'{self._name}/pulse/{process}'

  def _waited(self, key: str) -> bytes:
    while True:
      try:
        return self._client.blocking_key_value_get_bytes(key, WAIT)
      except jax.errors.JaxRuntimeError as error:
        if 'DEADLINE_EXCEEDED' not in str(error):
          raise

  def _beat(self) -> None:
    count, key = 0, self._pulse(jax.process_index())
    while not self._over.wait(PULSE if count else 0):
      count += 1
      self._client.key_value_set_bytes(key, b'%d %d' % (count, self._number), allow_overwrite=True)

  def _watch(self, lost: Callable[[int], None]) -> None:
    seen = {process: (b'', time.monotonic()) for process in range(1, jax.process_count())}
    while not self._over.wait(PULSE):
      for process, (before, since) in seen.items():
        try:
          pulse = self._client.key_value_try_get_bytes(self._pulse(process))
        except jax.errors.JaxRuntimeError:  # none has come yet
          pulse = b''
        now = time.monotonic()
        if pulse != before:
          seen[process] = pulse, now
        elif now - since > PATIENCE:
          lost(process)
          return
      self._clear(min(int(pulse.split()[1]) if pulse else 0 for pulse, _ in seen.values()))

  def _clear(self, heard: int) -> None:
    """Messages before this one were heard by all."""
    for number in range(self._cleared, heard):
      self._client.key_value_delete(f'{self._name}/{number}/')
    self._cleared = heard
