"""What do an engine's rows hold before anybody has come?

B rows · V vocabulary
"""

import jax
import jax.numpy as jnp

from decode import loop
from decode.loop import DecodeState, Rules
from decode.sampling import History
from decode.sizes import Sizes
from model.cache import init_cache
from model.config import ModelConfig
from parallel import axes as ax


def idle_state(config: ModelConfig, sizes: Sizes) -> tuple[DecodeState, Rules]:
  """The state of rows that are all free, and their rules without an automaton; with the mesh in
  context.
  """
  B, V = sizes.rows, config.table_rows

  def zeros(dtype, *more):
    axes = 'batch', *(None,) * len(more)
    return ax.place(jnp.zeros((B, *more), dtype, out_sharding=ax.out(*axes)), *axes)

  def split(x):
    return ax.place(jnp.asarray(x), 'batch', *(None,) * (x.ndim - 1))

  of_cache = sizes.capacity, sizes.cache_dtype, sizes.read_tokens, sizes.pages, sizes.block
  of_cache += (sizes.source,)
  state = DecodeState(
    cache=init_cache(config, B, *of_cache),
    logits=zeros(jnp.float32, V),
    done=~zeros(bool),
    stop_at=zeros(jnp.int32),
    history=History(zeros(jnp.int32, V), zeros(bool, V)),
    places=zeros(jnp.int32),
    adapters=zeros(jnp.int32) if sizes.adapters else None,
  )
  sampling = jax.tree.map(split, loop.idle_sampling(B, sizes.bias))
  return state, Rules(sampling, zeros(jnp.int32, sizes.ends) - 1)
