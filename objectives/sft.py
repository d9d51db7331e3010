"""What tunes a model on records? The cross-entropy of what the assistant says, and of nothing else:
supervised finetuning.
"""

import dataclasses

import jax.numpy as jnp

from data import examples
from objectives.next_token import NextToken, summed_loss
from objectives.objective import MAIN


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(NextToken):
  """Packed examples, each made of a record (data/records.py, data/conversations.py); a target that
  is no answer weighs nothing.

  Attributes:
    template: file of the chat template, for a tokenizer that has none; it becomes the run's.
    turns: of the assistant that are learned: 'all' or the 'last' of each conversation.
    too_long: what becomes of an example of more than data.sequence_length tokens: 'drop', or cut
      its 'left' or its 'right' end off.
    packing: of examples into rows: where they 'fit' best, in 'order', or each 'alone'.
    weighting: what counts alike: each learned 'token', or each 'example' (a mean of means).
  """

  kind: str = 'sft'
  template: str = ''
  turns: str = 'all'
  too_long: str = 'drop'
  packing: str = 'fit'
  weighting: str = 'token'
  term = 'sft'

  def __post_init__(self):
    super().__post_init__()
    self._settings()

  def _settings(self) -> examples.Settings:
    return examples.Settings(
      template=self.template,
      turns=self.turns,
      too_long=self.too_long,
      packing=self.packing,
      weighting=self.weighting,
    )

  def read(self, config, log):
    return examples.prepare(config, self._settings(), log)

  def metrics(self, terms, weights, sums):
    metrics = super().metrics(terms, weights, sums)
    if self.weighting == 'example':
      metrics['learned_examples'] = metrics.pop('predicted_tokens')
    return metrics

  def judged(self, models, batch):
    _, sums = summed_loss(models[MAIN], batch, 0.0)
    # A segment of a row is an example.
    count = batch.segments.max(1).sum().astype(jnp.float32)
    return {name: sums[name] for name in ('nll', 'tokens', 'correct')} | {'examples': count}

  def verdict(self, sums, prepared):
    """`validation_loss` in nats, and `accuracy`, a share, of what counts alike; where that is a
    token, `completion_log_likelihood` too, in nats an example.
    """
    del prepared
    verdict = {
      'validation_loss': sums['nll'] / sums['tokens'],
      'validation_accuracy': sums['correct'] / sums['tokens'],
    }
    if self.weighting == 'token':
      verdict['completion_log_likelihood'] = -sums['nll'] / sums['examples']
    return verdict
