"""What trains a classifier in the classical way? The cross-entropy of labels, which a linear layer
on one vector of a text gives (model/heads.py): the peer of classification by prompting.

B rows of a batch · T length · L labels
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import names
from data import examples
from data.batch import Batch
from data.classes import ClassWriter, FirstLoader, FirstValidation, within
from data.conversations import Example
from data.loader import Loader, ValidationBatches
from data.shards import Rows
from data.template import Template
from kernels import context
from kernels.mask import Mask
from model import heads
from objectives.experts import EXPERTS, balance, routed, router_metrics
from objectives.next_token import token_metrics
from objectives.objective import MAIN, Objective, Role

HEAD = 'head'  # its name among a run's models
FIRST, LAST = 'first', 'last'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyHead(Objective, examples.Packed):
  """Packed texts, each with a label (data/classes.py); one term, of all texts alike.

  Attributes:
    template: file whose labels, in its order, the head tells apart (data/template.py); its pattern
      and its words are for models that are asked.
    pooled: what of a text the head reads: an encoder's 'first' token, or a decoder's 'last'.
  """

  tells_labels = HEAD
  kind: str = 'classify_head'
  template: str = 'configs/templates/sentiment.toml'
  pooled: str = LAST
  term = tunes = 'classify_head'
  formats = ('label',)
  of_records = True

  def __post_init__(self):
    super().__post_init__()
    examples.Packed.__post_init__(self)
    names.check('objective.pooled', self.pooled, (FIRST, LAST))

  # 1. Models.

  @property
  def labels(self) -> tuple[str, ...]:
    """By the numbers that they are learned as."""
    return Template.read(self.template).labels

  def models(self, config):
    # Not before a head is wanted: an export names it where no template lies any more.
    def make(config, seed):
      return heads.new(config, seed, labels=len(self.labels))

    return {MAIN: Role(config), HEAD: Role(config, made=make)}

  def accepts(self, models):
    check_head(self, models[MAIN], "objective.kind='classify_seq2seq'")

  # 2. Batches.

  def writer(self, tokenizer):
    template = Template.read(self.template)
    return ClassWriter(template, tokenizer, self.pooled == LAST), tokenizer

  def facts(self, config):
    return {
      'head': [*self.labels],
      'pooled': self.pooled,
      'too_long': [self.too_long, config.sequence_length],
    }

  def fitted(self, example, config, reserved=0):
    limit = config.sequence_length - reserved
    if len(example.ids) <= limit + 1:  # the label is no token of a row
      return examples.Fitted(example)
    if self.too_long == 'drop':
      return examples.Fitted(None, dropped='too_long')
    *read, label = example.ids.tolist()
    ids = [*within(read, limit, self.too_long, self.pooled == LAST), label]
    learned = example.scored[-len(ids) :]
    return examples.Fitted(Example(np.array(ids, np.int32), learned), self.sides)

  def rows_of(self, config, tokenizer):
    del tokenizer
    return Rows(config.sequence_length, self.packing)

  def read(self, config, log):
    return examples.prepare(config, self, log)

  def batches(self, prepared, config, rows):
    return (Loader if self.pooled == LAST else FirstLoader)(prepared, config, rows)

  def validation_batches(self, prepared, config, rows):
    return (ValidationBatches if self.pooled == LAST else FirstValidation)(prepared, config, rows)

  def batch_like(self, config):
    return Batch.abstract(config.batch_size, config.sequence_length)

  def tokens(self, batch):
    return jnp.count_nonzero(batch.segments)

  def forward_flops(self, network, config, document_length):
    return super().forward_flops(network, config, document_length) + unscored(network)

  # 3. Loss, and what is said of it.

  def weights(self, batch):
    return {self.term: jnp.sum(batch.weights), EXPERTS: routed(self.tokens(batch))}

  def sums(self, models, batch):
    total, balanced, sums = head_loss(models[MAIN], models[HEAD], batch)
    return {self.term: total, EXPERTS: balanced}, sums

  def metrics(self, terms, weights, sums):
    metrics = token_metrics(sums) | router_metrics(sums, weights[EXPERTS])
    metrics['learned_examples'] = metrics.pop('predicted_tokens')
    return metrics

  def judged(self, models, batch):
    *_, sums = head_loss(models[MAIN], models[HEAD], batch)
    return {name: sums[name] for name in ('nll', 'tokens', 'correct')}

  def verdict(self, sums, prepared):
    """`validation_loss` in nats a text, and `validation_accuracy`, a share of them."""
    del prepared
    return {
      'validation_loss': sums['nll'] / sums['tokens'],
      'validation_accuracy': sums['correct'] / sums['tokens'],
    }


def check_head(objective, config, instead: str) -> None:
  """Raises NotImplementedError or ValueError where a head cannot be on a network of this config;
  objective: has `kind` and `pooled`; instead: what to use for an encoder-decoder.
  """
  if config.encoder_layers:
    raise NotImplementedError(
      f'objective.kind={objective.kind!r} of an encoder-decoder (model.encoder_layers='
      f'{config.encoder_layers}), which answers; use {instead}'
    )
  pooled = LAST if config.causal else FIRST
  if objective.pooled != pooled:
    raise ValueError(
      f'objective.pooled={objective.pooled!r} of a model with model.causal={config.causal}, which '
      f'has seen all of a text in its {pooled} token; set objective.pooled={pooled!r}'
    )
  if config.execution.pipeline.schedule == '1f1b':
    raise NotImplementedError(
      f'objective.kind={objective.kind!r} has a second model, the head, and '
      "model.execution.pipeline.schedule='1f1b' is of one; use 'gpipe' or 'circular'"
    )


def unscored(network) -> float:
  """FLOPs of a token that a head takes besides the layers, less the vocabulary, which nobody
  scores.
  """
  return 2.0 * network.D * (network.D * network.pooler - network.V)


def head_loss(model, head: heads.Head, batch: Batch):
  """Sum over texts of -log p(label); what balances experts; and the sums of loss.cross_entropy."""
  config = model.config
  parts = context.groups(config.execution.context, config.N, config.K)
  batch = context.lay_out(batch, parts)
  x, _, router = model(batch.tokens, batch.positions, batch.segments, laid=Mask(zigzag=parts))
  with jax.named_scope('loss'):
    learned = batch.weights != 0
    # What is not read off is 0: no NaN of padding, whose weight is 0, reaches a slope.
    logits = heads.scores(model, head, jnp.where(learned[..., None], x, 0))
    number = jnp.arange(logits.shape[-1])[None, None]
    truth = jnp.where(number == batch.targets[..., None], logits, 0).sum(-1)
    nll = (jax.nn.logsumexp(logits, -1) - truth) * batch.weights
    correct = (logits.argmax(-1) == batch.targets) * batch.weights
  total = nll.sum()
  sums = {'nll': total, 'tokens': batch.weights.sum(), 'correct': correct.sum()}
  return total, balance(router), sums | (router or {})
