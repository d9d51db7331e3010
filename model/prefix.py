"""How do learned keys and values stand in the places of a prefix? (model/soft.py)

B batch · T length · P tokens of the prefix · K key/value heads · H head width
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.weights import read
from parallel import axes as ax


def in_places(
  x: Float[Array, 'B T K H'], learned: nnx.Param, places: Int[Array, 'B T']
) -> Float[Array, 'B T K H']:
  """Keys, normed and turned by their positions, or values, but the learned ones [P, K, H], which
  are neither, where `places` is not negative.
  """
  stored, tokens = read(learned), ('batch', 'length')
  axes = (*tokens, *stored.axes[1:])

  def put(x, stored, places):
    rows = stored.rows(jnp.maximum(places, 0), mode='clip').astype(x.dtype)
    return jnp.where((places >= 0)[..., None, None], rows, x)

  run = ax.local(put, (axes, stored.layout(), tokens), axes)
  return run(ax.place(x, *axes), stored, ax.place(places, *tokens))


def with_prefix(layer, k, v, places):
  """Keys and values with those of a layer's prefix in their places."""
  return in_places(k, layer.prefix_keys, places), in_places(v, layer.prefix_values, places)
