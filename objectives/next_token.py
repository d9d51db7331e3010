"""What minimises the cross-entropy of every next token within its document? Pretraining, and tuning
on text as it is.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from data import loader
from data.batch import Batch
from data.prepare import prepare
from kernels import context
from model import loss
from model.transformer import Decoder
from objectives import pipelined
from objectives.objective import MAIN, Objective, or_one


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(Objective):
  """Packed rows of text (data.batch.Batch); one term, of all predicted tokens alike.

  Attributes:
    z_loss: weight of log(Z)^2 (model/loss.py).
  """

  kind: str = 'next_token'
  z_loss: float = 0.0
  term = 'next_token'
  # What does the same to an encoder-decoder.
  of_pairs = 'span_corruption'

  def __post_init__(self):
    super().__post_init__()
    self._check_least(z_loss=0)

  def accepts(self, models):
    config = models[MAIN]
    if not config.causal or config.encoder_layers:
      kind, other = ('an encoder', 'masked_lm')
      if config.encoder_layers:
        kind, other = ('an encoder-decoder', self.of_pairs)
      raise NotImplementedError(
        f'objective.kind={self.kind!r} predicts the next token and model.causal={config.causal}, '
        f'model.encoder_layers={config.encoder_layers} is {kind}; use a decoder, or '
        f'objective.kind={other!r}'
      )

  def read(self, config, log):
    return prepare(config, log=log)

  def batches(self, prepared, config, rows):
    return loader.train_loader(prepared, config, rows)

  def validation_batches(self, prepared, config, rows):
    return loader.validation_batches(prepared, config, rows)

  def batch_like(self, config):
    return Batch.abstract(config.batch_size, config.sequence_length)

  def tokens(self, batch):
    return jnp.count_nonzero(batch.segments)

  def weights(self, batch):
    return {self.term: jnp.sum(batch.weights)}

  def sums(self, models, batch):
    total, sums = summed_loss(models[MAIN], batch, self.z_loss)
    return {self.term: total}, sums

  def metrics(self, terms, weights, sums):
    return token_metrics(sums) | router_metrics(sums)

  def judged(self, models, batch):
    _, sums = summed_loss(models[MAIN], batch, 0.0)
    return {name: sums[name] for name in ('nll', 'tokens')}

  def verdict(self, sums, prepared):
    """`validation_loss` in nats a token, and `bits_per_byte` of the text that these are of."""
    nll, tokens = sums['nll'], sums['tokens']
    # Bytes of the tokens read: exact for all of them, in proportion for a part.
    pairs = prepared.report['packing']['validation']['pairs']
    bytes_read = prepared.validation_bytes * tokens / pairs
    return {'validation_loss': nll / tokens, 'bits_per_byte': nll / math.log(2) / bytes_read}


def token_metrics(sums: loss.Sums) -> dict[str, Array]:
  """Of loss.cross_entropy's sums: means over the predicted tokens, and how many these are."""
  tokens = or_one(sums['tokens'])
  return {
    'loss': sums['nll'] / tokens,
    'accuracy': sums['correct'] / tokens,
    'predicted_tokens': sums['tokens'],
  }


def router_metrics(sums: loss.Sums) -> dict[str, Array]:
  """Of a model with experts, {} without: `expert_load` [E], 1 where an expert has its share, of all
  layers together; `expert_load_max`, of the busiest expert of all layers; `dropped`, the share of
  choices that found no room; the two losses, per token.
  """
  if 'load' not in sums:
    return {}
  load, E = sums['load'], sums['load'].shape[1]
  shares = load / jnp.maximum(load.sum(1, keepdims=True), 1) * E
  return {
    'expert_load': shares.mean(0),
    'expert_load_max': shares.max(),
    'dropped': sums['dropped'].sum() / jnp.maximum(load.sum(), 1),
    **{
      name: sums[name] / jnp.maximum(sums['tokens'], 1)
      for name in ('balance_loss', 'router_z_loss')
    },
  }


def summed_loss(model: Decoder, batch: Batch, z_loss: float) -> tuple[Float[Array, ''], loss.Sums]:
  """Sum of the loss over the batch's targets, and the sums of loss.cross_entropy; divide by
  `tokens` for means.

  Of a model with experts the sum holds what balances them, and the sums what they report (see
  model.moe).
  """
  config = model.config
  # What causal attention takes is then the same for all devices of a row.
  parts = context.groups(config.execution.context, config.N, config.K)
  batch = context.lay_out(batch, parts)

  def score(model, x, batch):
    with jax.named_scope('loss'):
      return loss.cross_entropy(
        *model.scored(x),
        batch.targets,
        batch.weights,
        z_loss,
        config.logit_softcap,
        vocabulary=config.vocabulary_limit,
      )

  def whole(model, batch):
    x, _, router = model(batch.tokens, batch.positions, batch.segments, zigzag=parts)
    total, sums = score(model, x, batch)
    if router is None:
      return total, sums
    return total + router['balance_loss'] + router['router_z_loss'], sums | router

  if pipelined.wanted(model):
    return pipelined.value(model, batch, parts, score, whole)
  return whole(model, batch)
