"""What says which label a text has, without a word? A linear layer on one vector of it: the
classical head, BERT's and GPT's.

An encoder's text is its first token, behind the pooler (a projection and tanh) where the network
has one; a decoder's is its last token, which has seen all others. A head is a tree of its own
beside the network that it is on, {'weight', 'bias'}: saved, and trained, by its own name.

B rows · T length · D width · L labels
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.layers import project
from model.params import param
from parallel import axes as ax

Head = dict[str, nnx.Param]


def new(config: ModelConfig, seed: int, *, labels: int, std: float | None = None) -> Head:
  """A new head on a network of this config: a normal of standard deviation `std`, or of
  1 / sqrt(D + 1), and a bias of zeros. On the mesh in context, and traced: use under jit or
  eval_shape.

  It is small, and whole on every device. Muon and ZeRO take it for a table, not for a matrix.
  """
  rngs, dtype = nnx.Rngs(params=jax.random.key(seed)), config.execution.parameter_dtype
  std = (config.D + 1) ** -0.5 if std is None else std
  return {
    'weight': param(rngs, (config.D, labels), (None, None), std, kind='embedding', dtype=dtype),
    'bias': param(rngs, (labels,), (None,), 'zeros', kind='vector', dtype=dtype),
  }


def scores(model, head: Head, x: Float[Array, 'B T D']) -> Float[Array, 'B T L']:
  """Of labels, in f32, before a softmax, as if each of the hidden states were what a text is judged
  by; the caller knows which ones are.
  """
  x = ax.place(x, 'batch', 'length', None)
  if model.pooler is not None:
    pooler = model.pooler
    x = jnp.tanh(project('BTD,DE->BTE', x, pooler.dense, pooler.bias, pooler.dtype))
  weight, bias = (head[name][...].astype(jnp.float32) for name in ('weight', 'bias'))
  x = x.astype(jnp.float32)
  return jnp.einsum('BTD,DL->BTL', x, weight, precision='highest') + bias[None, None]
