"""What does pretraining minimise? The cross-entropy of every next token within its document."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from data.batch import Batch
from kernels import context
from model import loss
from model.config import ModelConfig
from model.transformer import Decoder
from objectives import pipelined


def check_model(config: ModelConfig) -> None:
  """Raises NotImplementedError for a model that does not predict the next token of its own input."""
  if not config.causal or config.encoder_layers:
    what = 'an encoder' if not config.causal else 'an encoder-decoder'
    raise NotImplementedError(
      f'pretraining predicts the next token and model.causal={config.causal}, '
      f'model.encoder_layers={config.encoder_layers} is {what}; use a decoder'
    )


def router_metrics(sums: loss.Sums) -> dict[str, Array]:
  """Of a model with experts: `expert_load` [E], 1 where an expert has its share, of all layers together; `expert_load_max`, of the
  busiest expert of all layers; `dropped`, the share of choices that found no room; the two losses, per token. {} without experts.
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


def pretrain(model: Decoder, batch: Batch, z_loss: float) -> tuple[Float[Array, ''], loss.Sums]:
  """Sum of the loss over the batch's targets, and the sums of loss.cross_entropy; divide by `tokens` for means.

  Of a model with experts the sum holds what balances them, and the sums what they report (see model.moe).
  """
  config = model.config
  parts = context.groups(
    config.context, config.N, config.K
  )  # what causal attention takes is then the same for all devices of a row
  batch = context.lay_out(batch, parts)

  def score(model, x, batch):
    with jax.named_scope('loss'):
      return loss.cross_entropy(
        *model.scored(x), batch.targets, batch.weights, z_loss, config.logit_softcap
      )

  def whole(model, batch):
    x, _, router = model(batch.tokens, batch.positions, batch.segments, zigzag=parts)
    total, sums = score(model, x, batch)
    return (
      (total, sums)
      if router is None
      else (total + router['balance_loss'] + router['router_z_loss'], sums | router)
    )

  return (
    pipelined.value(model, batch, parts, score, whole)
    if pipelined.wanted(model)
    else whole(model, batch)
  )
