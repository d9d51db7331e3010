"""How do several processes serve one model? The first speaks HTTP and decides, as a server of one
process does; the others have the same model on the same mesh, and make each call of its engine as
it does, in the same order, as they hear of it.

What an engine does depends on the calls alone (decode.engine): so all of them have the same rows,
prefixes and pages, and run the same programs on their devices. Only what was decided is said:
requests with their ids and numbers, no texts. What is heard is data: no message makes another
object than those of OBJECTS.
"""

import collections
import contextlib
import dataclasses
import io
import itertools
import pickle
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from decode.constrain import Constraint
from decode.loaded import LoadedModel
from decode.loop import Chunk
from decode.sizes import Request, Sizes
from parallel import hosts
from parallel.messages import PATIENCE, Messages
from serving.call import EngineLost
from serving.rows import EngineRows, sizes_for

NAME = 'serving'
LOST = (
  'a device of {} processes has failed, or one of them is gone, and what the others have done by '
  'then is not known; start all of them again'
)
# What the others hear of, and what they do then.
CALLS = ('begin', 'join', 'read', 'seat', 'decode', 'taken', 'forget', 'release', 'end')
OBJECTS = {
  ('decode.sizes', 'Request'),
  ('decode.sampling', 'Sampling'),
  ('decode.sampling', 'Bias'),
  ('numpy', 'ndarray'),
  ('numpy', 'dtype'),
  ('numpy._core.multiarray', '_reconstruct'),
  ('numpy._core.multiarray', 'scalar'),
  ('numpy._core.numeric', '_frombuffer'),
}


class LeadingRows(EngineRows):
  """Of process 0: says what it does, before it does it.

  An error of a device is the end: what the others have done by then is not known.
  """

  def __init__(self, model: LoadedModel, sizes: Sizes, scores: bool = False, pooling: str = ''):
    """As of EngineRows. Raises NotImplementedError for what is read besides texts that are
    written, and ValueError where processes have not the same.
    """
    super().__init__(model, sizes, scores, pooling)
    _check(self, scores, pooling)
    self._messages, self._sent = Messages(NAME), Sent()

  def watch(self, lost: Callable[[str], None]) -> None:
    """lost: hears, from another thread, that a process is gone, and what to do."""

    def told(process: int) -> None:
      lost(
        f'process {process} of {hosts.count()} has given no sign of life for {PATIENCE:g} s; start '
        'all of them again'
      )

    self._messages.watch(told)

  def begin(self, came: Callable[[int, int], None]) -> None:
    self._say('begin')
    super().begin(came)

  def end(self) -> None:
    self._messages.close()
    self._say('end')
    super().end()

  def join(self, row: int, request: Request) -> None:
    self.check(request)  # or others would hear of what no row takes
    sampling = jax.tree.map(np.asarray, request.sampling)
    request = dataclasses.replace(request, sampling=sampling)
    self._say('join', row, request)
    # A constraint that no tables take, now or ever, is refused by the others as well.
    with _ending(but=ValueError):
      super().join(row, request)

  def read(self) -> list[int]:
    return self._do('read')

  def seat(self) -> list[int]:
    return self._do('seat')

  def decode(self, count: int, alternatives: bool) -> Any:
    return self._do('decode', count, alternatives)

  def taken(self, chunk: Any) -> Chunk:
    self._say('taken')
    with _ending():
      return super().taken(chunk)

  def forget(self, row: int) -> None:
    self._do('forget', row)

  def release(self, rows: Sequence[int]) -> None:
    self._do('release', list(rows))

  def reset(self) -> None:
    raise EngineLost(LOST.format(hosts.count()))

  def _do(self, name: str, *arguments: Any) -> Any:
    """What EngineRows does, with the others."""
    self._say(name, *arguments)
    with _ending():
      return getattr(super(), name)(*arguments)

  def _say(self, name: str, *arguments: Any) -> None:
    self._messages.say(self._sent.packed((name, *arguments)))


class FollowingRows(EngineRows):
  """Of the other processes."""

  def __init__(self, model: LoadedModel, sizes: Sizes, scores: bool = False, pooling: str = ''):
    """As of LeadingRows."""
    super().__init__(model, sizes, scores, pooling)
    _check(self, scores, pooling)

  def follow(self) -> None:
    """Until process 0 ends. Raises what jax does where it is gone."""
    messages, heard = Messages(NAME), HeardCalls()
    messages.live()
    chunks: collections.deque[Any] = collections.deque()
    while True:
      name, *arguments = heard.unpacked(messages.hear())
      if name not in CALLS:
        raise ValueError(f'process 0 says {name!r}, which is none of {", ".join(CALLS)}')
      if name == 'begin':
        self.begin(lambda done, total: None)
      elif name == 'decode':
        chunks.append(self.decode(*arguments))
      elif name == 'taken':
        self.taken(chunks.popleft())
      elif name == 'join':
        with contextlib.suppress(ValueError):  # which process 0 finds as well
          self.join(*arguments)
      else:
        getattr(self, name)(*arguments)
      if name == 'end':
        messages.close()
        return


def following(
  model: LoadedModel, *, scores: bool = False, pooling: str = '', **sizes: int
) -> FollowingRows:
  """Rows of another process than the first, for what serving.running.Running is asked there."""
  return FollowingRows(model, sizes_for(model, **sizes), scores, pooling)


def heed(say: Callable[[str], None]) -> None:
  """In another process than the first, what asks to stop is for that one, whose end is everyone's;
  asked twice, it ends.
  """
  asked = []

  def act(number, _):
    if asked:
      hosts.leave_by(number)
    asked.append(number)
    name = signal.Signals(number).name
    say(f'{name}: this process ends when process 0 does; {name} again ends it, and with it all')

  for number in hosts.heeded((signal.SIGTERM, signal.SIGINT)):
    signal.signal(number, act)


@contextlib.contextmanager
def _ending(but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
  """Within, an error is EngineLost. but: errors that the others find as well."""
  try:
    yield
  except but:
    raise
  except Exception as error:
    raise EngineLost(LOST.format(hosts.count())) from error


def _check(rows: EngineRows, scores: bool, pooling: str) -> None:
  count = hosts.count()
  if scores or pooling:
    asked = 'scores of prompts' if scores else 'embeddings'
    raise NotImplementedError(
      f'{asked} of a server of {count} processes: so far these only write texts; leave out '
      '--prompt_logprobs and --pooling'
    )
  mesh, owners = rows.model.mesh, {device.process_index for device in rows.model.mesh.devices.flat}
  if len(owners) < count:
    raise ValueError(
      f'a mesh of {mesh.size} devices, which are those of {len(owners)} of {count} processes; give '
      '--mesh a product of all their devices, or start fewer processes'
    )
  # Each has read files of its own, and adapters have places in the order in which they were named.
  model, config = rows.model, rows.model.model.config
  told = config, model.identity, [*model.adapters], rows.sizes, mesh.shape
  hosts.check_same('the model, its weights, sizes or adapters', repr(told))


class Sent:
  """Packs what process 0 says. A constraint is known by a number, for an engine keeps each once, by
  who it is; what it is goes along.
  """

  def __init__(self):
    self._numbers: weakref.WeakKeyDictionary[Constraint, int] = weakref.WeakKeyDictionary()
    self._next = itertools.count()

  def packed(self, message: Any) -> bytes:
    buffer = io.BytesIO()
    _Writer(buffer, self._known).dump(message)
    return buffer.getvalue()

  def _known(self, x: Constraint) -> tuple:
    if x not in self._numbers:
      self._numbers[x] = next(self._next)
    return self._numbers[x], x.regex, np.asarray(x.classes), np.asarray(x.next)


class HeardCalls:
  """Unpacks it: a constraint that the tables have still is the one that it was."""

  def __init__(self):
    self._constraints: weakref.WeakValueDictionary[int, Constraint] = weakref.WeakValueDictionary()

  def unpacked(self, message: bytes) -> Any:
    return _Reader(io.BytesIO(message), self._constraint).load()

  def _constraint(self, known: tuple) -> Constraint:
    number, *parts = known
    made = self._constraints.get(number)
    if made is None:
      made = Constraint.__new__(Constraint)
      made.regex, made.classes, made.next = parts
      self._constraints[number] = made
    return made


class _Writer(pickle.Pickler):
  def __init__(self, file: io.BytesIO, known: Callable[[Constraint], tuple]):
    super().__init__(file, protocol=5)
    self._known = known

  def persistent_id(self, x: Any) -> tuple | None:
    return self._known(x) if isinstance(x, Constraint) else None


class _Reader(pickle.Unpickler):
  def __init__(self, file: io.BytesIO, known: Callable[[tuple], Constraint]):
    super().__init__(file)
    self._known = known

  def persistent_load(self, known: tuple) -> Constraint:
    return self._known(known)

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in OBJECTS:
      raise pickle.UnpicklingError(f'a message of process 0 has a {module}.{name}')
    return super().find_class(module, name)
