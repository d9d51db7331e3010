"""How does a Ray cluster do the tasks of data/engine.py? Each is a remote task of one CPU that Ray
never repeats by itself: what becomes of one that is lost is decided in one place, data.engine.run.
"""

import contextlib
from typing import Any

from data.engine import Done, Lost, Task, outcome_of

STORE = 100 * 2**20  # bytes: only tasks and their reports pass through it


class OnRay:
  """An engine: a cluster that runs, or one of this machine's that ends with it.

  Args:
    address: as ray.init's: 'auto', HOST:PORT, ray://HOST:PORT; '' begins one here.
    workers: CPUs of the one that begins here; of a cluster, how many tasks at once, 0 for one on
      each CPU that it has at the moment.

  Raises ValueError where ray is not installed, or no cluster answers.
  """

  def __init__(self, address: str, workers: int):
    try:
      import ray
    except ImportError as error:
      raise ValueError(f'--engine=ray needs Ray: pip install -e .[ray] ({error})') from error
    self._ray, self._workers = ray, workers
    own = {'num_cpus': workers, 'object_store_memory': STORE, 'include_dashboard': False}
    # What Ray shows of logs may be those of others on the same machines.
    quiet = {'log_to_driver': False, 'logging_level': 'warning'}
    try:
      ray.init(address=address or 'local', **quiet, **({} if address else own))
    except (ConnectionError, RuntimeError, ValueError) as error:
      raise ValueError(
        f'--ray_address={address}: no Ray answers ({error}); begin one by ray start --head, or '
        'leave the flag out for one on this machine'
      ) from error
    self._call = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy='SPREAD')(outcome_of)
    self._numbers: dict[Any, int] = {}

  @property
  def slots(self) -> int:
    """Of the cluster as it is: machines may come and go."""
    return self._workers or max(1, int(self._ray.cluster_resources().get('CPU', 1)))

  def submit(self, number: int, task: Task) -> None:
    self._numbers[self._call.remote(task)] = number

  def next(self, seconds: float) -> tuple[int, Done | Exception] | None:
    ready, _ = self._ray.wait([*self._numbers], num_returns=1, timeout=seconds)
    if not ready:
      return None
    number = self._numbers.pop(ready[0])
    try:
      return number, self._ray.get(ready[0])
    except self._ray.exceptions.RayError as error:
      return number, Lost(f'{type(error).__name__}: {str(error).splitlines()[0]}')

  def close(self) -> None:
    with contextlib.suppress(Exception):  # whatever is left of it
      self._ray.shutdown()
