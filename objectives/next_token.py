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
from kernels.mask import Mask
from model import loss
from model.transformer import Decoder
from objectives import pipelined
from objectives.experts import EXPERTS, balance, check_apart, routed, router_metrics
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
    if self.of_records:
      check_apart(config)

  def read(self, config, log):
    return prepare(config, log=log)

  def batches(self, prepared, config, rows):
    return loader.train_loader(prepared, config, rows)

  def validation_batches(self, prepared, config, rows):
    return loader.validation_batches(prepared, config, rows)

  def batch_like(self, config):
    return Batch.abstract(config.batch_size, config.sequence_length)

  def tokens(self, batch):
    # Rows that say no segments hold a document each (kernels/mask.py): no padding.
    whole = batch.segments is None
    return jnp.asarray(batch.tokens.size) if whole else jnp.count_nonzero(batch.segments)

  def weights(self, batch):
    return {self.term: jnp.sum(batch.weights), EXPERTS: routed(self.tokens(batch))}

  def sums(self, models, batch):
    total, balanced, sums = losses(models[MAIN], batch, self.z_loss)
    return {self.term: total, EXPERTS: balanced}, sums

  def metrics(self, terms, weights, sums):
    return token_metrics(sums) | router_metrics(sums, weights[EXPERTS])

  def judged(self, models, batch):
    _, sums = summed_loss(models[MAIN], batch, 0.0)
    return {name: sums[name] for name in ('nll', 'tokens')}

  def verdict(self, sums, prepared):
    """`validation_loss` in nats a token, and `bits_per_byte` of the text that these are of."""
    nll, tokens = sums['nll'], sums['tokens']
    # Of sources whose tokens are longer and shorter, a part holds other shares than the whole.
    apart = {name.partition('/')[2]: n for name, n in sums.items() if name.startswith('tokens/')}
    size = prepared.bytes_of(apart or {'': tokens})
    return {'validation_loss': nll / tokens, 'bits_per_byte': nll / math.log(2) / size}


def token_metrics(sums: loss.Sums) -> dict[str, Array]:
  """Of loss.cross_entropy's sums: means over the predicted tokens, and how many these are."""
  tokens = or_one(sums['tokens'])
  return {
    'loss': sums['nll'] / tokens,
    'accuracy': sums['correct'] / tokens,
    'predicted_tokens': sums['tokens'],
  }


def summed_loss(model: Decoder, batch: Batch, z_loss: float) -> tuple[Float[Array, ''], loss.Sums]:
  """The two of `losses` together, and the sums."""
  total, balanced, sums = losses(model, batch, z_loss)
  return total + balanced, sums


def losses(
  model: Decoder, batch: Batch, z_loss: float
) -> tuple[Float[Array, ''], Float[Array, ''], loss.Sums]:
  """Sum of the loss over the batch's targets; that of what balances experts, over its tokens (0
  without any, and by the 1F1B schedule, which knows one loss: there it is part of the first, and
  divided by what is predicted, all tokens but the last of each document); and the sums of
  loss.cross_entropy, with what experts report (see model.moe).
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

  def apart(model, batch):
    x, _, router = model(batch.tokens, batch.positions, batch.segments, laid=Mask(zigzag=parts))
    total, sums = score(model, x, batch)
    return total, balance(router), sums | (router or {})

  def whole(model, batch):
    total, balanced, sums = apart(model, batch)
    return total + balanced, sums

  if pipelined.wanted(model):
    total, sums = pipelined.value(model, batch, parts, score, whole)
    return total, jnp.float32(0), sums
  return apart(model, batch)
