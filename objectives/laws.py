"""What does a model say of the tokens of a batch? Its last hidden states, and the law of the next
token that these stand for: what objectives compare models by.

B rows of a batch · T length · A places of a row that meet the head · D width
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import context
from kernels.mask import Mask
from model.logprobs import logprobs
from model.vocabulary import TOKENS, Law
from parallel import axes as ax

SOURCES = ('source', 'source_positions', 'source_segments')
# Logical axes of what there is of a row, of its tokens and of their vectors, on whole rows.
ROW, PLACES, VECTORS = ('batch',), ('batch', None), ('batch', None, None)


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
    besides = {'laid': Mask(zigzag=parts)}
  output = model(batch.tokens, batch.positions, batch.segments, **besides)
  return output.hidden, output.router


def law(model, x: Float[Array, 'B T D'], temperature: float) -> Law:
  """What a model with these final hidden states says, at a temperature."""
  config = model.config
  warmth = None
  if temperature != 1:
    warmth = ax.place(jnp.full(x.shape[0], temperature, jnp.float32), 'batch')
  return Law(*model.scored(x), warmth, config.logit_softcap, config.vocabulary_limit)


def target_logprobs(
  model, x: Float[Array, 'B T D'], batch, temperature: float, most: int, parts: int
) -> Float[Array, 'B T']:
  """log p of the targets of a batch, laid out in these parts, 0 where weights are; differentiable
  in the hidden states x and the head.

  most: targets that count, of each row, which follow one another, at most. What stands before and
    behind them does not meet the head: rows are cut to as many places as this before it, one shape
    whatever the prompts. Where the mesh splits rows along their length, whose devices would wait
    for those with the answers, all places do.
  """
  targets, weights = batch.targets, batch.weights
  length = targets.shape[1]
  if most >= length or parts > 1 or ax.size('length') > 1:
    return logprobs(law(model, x, temperature), targets, weights)
  begins = jnp.minimum((weights > 0).argmax(1), length - most)
  x = ax.local(lambda x, begins: cut(x, begins, most), (VECTORS, ROW), VECTORS)(
    ax.place(x, *VECTORS), begins
  )
  return logprobs_from(model, x, batch, temperature, begins)


def logprobs_from(
  model, x: Float[Array, 'B A D'], batch, temperature: float, begins: Int[Array, 'B']
) -> Float[Array, 'B T']:
  """The same of hidden states of A places of each row, from these on; 0 elsewhere."""
  targets, weights = batch.targets, batch.weights
  length, most = targets.shape[1], x.shape[1]

  def inside(targets, weights, begins):
    return tuple(cut(whole, begins, most) for whole in (targets, weights))

  def spread(part, begins):
    zeros = jnp.zeros((part.shape[0], length), part.dtype)
    put = jax.vmap(lambda row, some, at: jax.lax.dynamic_update_slice_in_dim(row, some, at, 0))
    return put(zeros, part, begins)

  targets, weights = (
    ax.place(places, *TOKENS)
    for places in ax.local(inside, (PLACES, PLACES, ROW), (PLACES, PLACES))(
      targets, weights, begins
    )
  )
  scores = logprobs(law(model, ax.place(x, *TOKENS, 'width'), temperature), targets, weights)
  return ax.local(spread, (PLACES, ROW), PLACES)(ax.place(scores, *PLACES), begins)


def cut(x: Array, begins: Int[Array, 'B'], most: int) -> Array:
  """Of [B, T, ..] so many places of each row, from these on."""
  return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, most))(x, begins)
