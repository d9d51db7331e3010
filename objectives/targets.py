"""What do all objectives of encoder-decoders share? Targets that the decoder gives for what the
encoder read: who can train on them, what they weigh, their loss.

B rows of a batch · T length of a target · S length of a source
"""

import dataclasses

import jax
import jax.numpy as jnp

from data.batch import SourceBatch
from model import loss
from objectives.next_token import token_metrics
from objectives.objective import MAIN, Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets(Objective):
  """Rows of sources and targets (data.batch.SourceBatch); one term, of what the targets weigh.

  Attributes:
    z_loss: weight of log(Z)^2 (model/loss.py).
  """

  z_loss: float = 0.0
  term = ''
  # For messages: what it does.
  does = ''

  def __post_init__(self):
    super().__post_init__()
    self._check_least(z_loss=0)

  def accepts(self, models):
    config = models[MAIN]
    if not config.encoder_layers:
      raise NotImplementedError(
        f'objective.kind={self.kind!r} {self.does}, and model.encoder_layers=0 has no encoder; set '
        'model.encoder_layers'
      )
    if config.execution.pipeline.schedule == '1f1b':
      raise NotImplementedError(
        "model.execution.pipeline.schedule='1f1b' runs one stack of layers, and "
        f"model.encoder_layers={config.encoder_layers} is a second; use 'gpipe' or 'circular'"
      )

  def tokens(self, batch):
    return jnp.count_nonzero(batch.segments) + jnp.count_nonzero(batch.source_segments)

  def weights(self, batch):
    return {self.term: jnp.sum(batch.weights)}

  def sums(self, models, batch):
    total, sums = given_back(models[MAIN], batch, self.z_loss)
    return {self.term: total}, sums

  def metrics(self, terms, weights, sums):
    return token_metrics(sums)

  def judged(self, models, batch):
    return given_back(models[MAIN], batch, 0.0)[1]


def given_back(model, batch: SourceBatch, z_loss: float):
  """Sum of an encoder-decoder's loss over the batch's targets, and the sums of
  loss.cross_entropy.
  """
  config = model.config
  x = model(
    batch.tokens,
    batch.positions,
    batch.segments,
    source=batch.source,
    source_positions=batch.source_positions,
    source_segments=batch.source_segments,
  ).hidden
  with jax.named_scope('loss'):
    return loss.cross_entropy(
      *model.scored(x),
      batch.targets,
      batch.weights,
      z_loss,
      config.logit_softcap,
      vocabulary=config.vocabulary_limit,
    )
