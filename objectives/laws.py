"""What does a model say of the tokens of a batch? Its last hidden states, and the law of the next
token that these stand for: what objectives compare models by.

B rows of a batch · T length · D width
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import context
from model.vocabulary import Law
from parallel import axes as ax

SOURCES = ('source', 'source_positions', 'source_segments')


def laid_out(model, batch):
  """The batch as a model on this mesh reads it, and in how many parts (kernels.context)."""
  parts = parts_of(model)
  return (batch if model.config.encoder_layers else context.lay_out(batch, parts)), parts


def parts_of(model) -> int:
  """In how many parts the rows that it reads are laid out; 1 of an encoder-decoder."""
  config = model.config
  if config.encoder_layers:
    return 1
  return context.groups(config.execution.context, config.N, config.K)


def final(model, batch, parts: int) -> tuple[Float[Array, 'B T D'], dict | None]:
  """Final hidden states of a decoder, an encoder or an encoder-decoder, and what its router
  reports, or None; parts: as kernels.context.lay_out laid the batch out.
  """
  besides = {name: getattr(batch, name) for name in SOURCES if hasattr(batch, name)}
  if not besides:
    besides = {'zigzag': parts}
  output = model(batch.tokens, batch.positions, batch.segments, **besides)
  return output.hidden, output.router


def law(model, x: Float[Array, 'B T D'], temperature: float) -> Law:
  """What a model with these final hidden states says, at a temperature."""
  config = model.config
  warmth = None
  if temperature != 1:
    warmth = ax.place(jnp.full(x.shape[0], temperature, jnp.float32), 'batch')
  return Law(*model.scored(x), warmth, config.logit_softcap, config.vocabulary_limit)
