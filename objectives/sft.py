"""What tunes a model on records? The cross-entropy of what the assistant says, and of nothing else:
supervised finetuning.
"""

import dataclasses

import jax.numpy as jnp

from data import examples
from objectives.next_token import NextToken
from objectives.objective import Objective


class OfExamples(Objective):
  """What is said of examples that are learned, whoever reads them: packed rows whose segments are
  examples, with settings of data.examples.Packed.
  """

  of_records = True
  prompted = True

  def metrics(self, terms, weights, sums):
    metrics = super().metrics(terms, weights, sums)
    if self.weighting == 'example':
      metrics['learned_examples'] = metrics.pop('predicted_tokens')
    return metrics

  def judged(self, models, batch):
    _, sums = self.sums(models, batch)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(OfExamples, NextToken, examples.Settings):
  """Packed examples, each made of a record (data/records.py, data/conversations.py); a target that
  is no answer weighs nothing.

  Attributes:
    neftune_alpha: of noise on embeddings in training, U(-1, 1) alpha / sqrt(tokens of the example x
      width), which makes answers longer and better liked (NEFTune, Jain et al., arXiv:2310.05914,
      with 5 to 15); 0: none.
  """

  kind: str = 'sft'
  neftune_alpha: float = 0.0
  term = 'sft'
  of_pairs = 'seq2seq'

  def __post_init__(self):
    super().__post_init__()
    examples.Settings.__post_init__(self)
    self._check_least(neftune_alpha=0)

  def read(self, config, log, prompt=()):
    return examples.prepare(config, self, log, prompt)
