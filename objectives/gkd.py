"""What teaches a model what another one says of the text that it writes itself? On-policy
distillation (GKD, Agarwal et al., arXiv:2306.13649): where a student leaves what the teacher would
have written, it learns to come back.

The loss is that of objectives/distil.py, on answers of the student to prompts; their gradient is of
the laws alone, not of what was drawn.
"""

import dataclasses

import jax.numpy as jnp

from objectives.distil import JSD, SUMMED, Distilling
from objectives.next_token import token_metrics
from objectives.objective import MAIN, Role
from objectives.own_text import OfOwnText

ANSWERS = ('last', 'lengths', 'ended')


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OwnRows(OfOwnText):
  """What objectives.distil.Distilling takes a kind to have."""

  # Its own text tells a student nothing that it does not say already.
  z_loss = 0.0

  def models(self, config):
    return {MAIN: Role(config)}

  def weights(self, batch):
    return {self.term: batch.weights.sum()}

  def metrics(self, terms, weights, sums):
    return token_metrics(sums) | self.of_answers(sums)

  def verdict(self, sums, prepared):
    del prepared
    said = {f'validation_{name}': float(x) for name, x in self.of_answers(sums).items()}
    return said | {'validation_loss': sums['nll'] / sums['tokens']}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GKD(Distilling, _OwnRows):
  """On what the student writes; settings as both have them. `temperature` is that of both laws, and
  answers are drawn at it.
  """

  kind: str = 'gkd'
  divergence: str = JSD
  completed_by = OfOwnText.completed_by
  frozen_passes = 1.0  # the teacher's, of every step
  same_rows = False
  term = 'distil'

  def __post_init__(self):
    super().__post_init__()
    if self.cross_entropy:
      raise ValueError(
        f'objective.cross_entropy={self.cross_entropy} of objective.kind={self.kind!r} would teach '
        'the student what it wrote itself; leave it 0'
      )

  def sums(self, models, batch):
    terms, sums = super().sums(models, batch)
    return terms, sums | self.answer_sums(batch)

  def judged(self, models, batch):
    _, sums = self.sums(models, batch)
    return {name: jnp.float32(sums[name]) for name in (*SUMMED, *ANSWERS)}
