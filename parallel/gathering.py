"""How does every process come to know all of an array, of which it holds a part, or one alone?"""

import jax
import numpy as np

from parallel import hosts


def everywhere(tree):
  """A pytree of global arrays as numpy arrays, whole, in every process."""
  if hosts.count() == 1:
    return jax.device_get(tree)
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(tree, tiled=True)


def of_first(x: np.ndarray) -> np.ndarray:
  """The array of process 0 in every process, bit for bit. All call it, with one of this shape."""
  if hosts.count() == 1:
    return x
  from jax.experimental import multihost_utils

  hosts.barrier('all have an array of the first')  # not on the devices, which have timeouts
  sent = multihost_utils.broadcast_one_to_all(np.frombuffer(x.tobytes(), np.uint8))
  return np.frombuffer(np.asarray(sent).tobytes(), x.dtype).reshape(x.shape)
