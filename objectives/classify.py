"""What tunes a model to classify as it is asked to? The cross-entropy of the label's word behind a
text, or in it, of all words that there are or of those of the labels.

B rows of a batch · T length · W words of the labels · V vocabulary · E width of the scored table
"""

import dataclasses

import jax
import jax.numpy as jnp

import names
from data import examples
from data.batch import Batch, LabelBatch
from data.labelled import OVER, LabelLoader, LabelValidation, LabelWriter
from data.template import CLOZE, PREFIX, Asking, Template, form_of, with_mask
from kernels import context
from kernels.mask import Mask
from objectives.experts import EXPERTS, balance, check_apart
from objectives.next_token import NextToken, summed_loss
from objectives.objective import MAIN
from parallel import axes as ax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(NextToken, examples.Sequences):
  """Packed examples, each made of a text with a label (data/labelled.py), as evaluate.py asks by
  the same template.

  Attributes:
    template: file of the pattern and of the labels' words (data/template.py).
    form: how the model is asked: a decoder goes on from a 'prefix', an encoder finds what is masked
      in a 'cloze'.
    over: what the word is to be the likeliest of: all 'tokens' (of a decoder its end of text is
      learned, too), or the words of all 'labels', of one token each.
  """

  tells_labels = 'words'
  kind: str = 'classify'
  template: str = 'configs/templates/sentiment.toml'
  form: str = PREFIX
  over: str = 'tokens'
  term = tunes = 'classify'
  formats = ('label',)
  of_records = prompted = True

  def __post_init__(self):
    super().__post_init__()
    examples.Sequences.__post_init__(self)
    names.check('objective.form', self.form, (PREFIX, CLOZE))
    names.check('objective.over', self.over, OVER)
    if self.too_long == 'right' or self.form == CLOZE and self.too_long != 'drop':
      raise ValueError(
        f'objective.too_long={self.too_long!r} with form={self.form!r} would cut off the question; '
        "use 'drop'" + (" or 'left'" if self.form == PREFIX else '')
      )
    if self.over == 'labels' and self.z_loss:
      raise ValueError(
        f"objective.z_loss={self.z_loss} is of all tokens, and objective.over='labels' looks at "
        'those of labels; set it to 0'
      )

  def accepts(self, models):
    config = models[MAIN]
    form = form_of(config.causal, config.encoder_layers)
    if form != self.form:
      needed = f'set objective.form={form!r}'
      if config.encoder_layers:
        needed = "objective.kind='classify_seq2seq' tunes one by the same template"
      raise NotImplementedError(
        f'objective.form={self.form!r} is not how a model with model.causal={config.causal} and '
        f'model.encoder_layers={config.encoder_layers} is tuned to classify; {needed}'
      )
    check_apart(config)
    if self.over == 'labels' and config.execution.pipeline.schedule == '1f1b':
      raise NotImplementedError(
        "objective.over='labels' with model.execution.pipeline.schedule='1f1b'; use 'gpipe', or "
        "objective.over='tokens'"
      )

  def writer(self, tokenizer):
    if self.form == CLOZE:
      # As masked_lm gives the model's one that has none.
      tokenizer = with_mask(tokenizer)
    return LabelWriter(Template.read(self.template), tokenizer, self.form, self.over), tokenizer

  def facts(self, config):
    return {
      'template': Template.read(self.template).values(),
      'form': self.form,
      'over': self.over,
      'too_long': [self.too_long, config.sequence_length],
    }

  def read(self, config, log, prompt=()):
    return examples.prepare(config, self, log, prompt)

  def _asking(self, prepared) -> Asking:
    return Asking(Template.read(self.template), prepared.tokenizer, self.form)

  def batches(self, prepared, config, rows):
    return LabelLoader(prepared, config, rows, self._asking(prepared), self.over)

  def validation_batches(self, prepared, config, rows):
    return LabelValidation(prepared, config, rows, self._asking(prepared), self.over)

  def batch_like(self, config):
    if self.over == 'tokens':
      return super().batch_like(config)
    count = sum(len(words) for _, words in Template.read(self.template).words)
    return LabelBatch.abstract(config.batch_size, config.sequence_length, count)

  def sums(self, models, batch):
    if self.over == 'tokens':
      return super().sums(models, batch)
    total, balanced, sums = label_loss(models[MAIN], batch)
    return {self.term: total, EXPERTS: balanced}, sums

  def judged(self, models, batch):
    if self.over == 'tokens':
      sums = summed_loss(models[MAIN], batch, 0.0)[1]
    else:
      sums = label_loss(models[MAIN], batch)[-1]
    return {name: sums[name] for name in ('nll', 'tokens', 'correct')}

  def verdict(self, sums, prepared):
    """`validation_loss` in nats, and `validation_accuracy`, a share, of what counts alike: of
    tokens, which a word may have several of, or of labels.
    """
    del prepared
    return {
      'validation_loss': sums['nll'] / sums['tokens'],
      'validation_accuracy': sums['correct'] / sums['tokens'],
    }


def label_loss(model, batch: LabelBatch):
  """Sum over what is learned of -log p(label), where p is of the words of all labels and a label
  has the sum of its words'; what balances experts; and the sums of loss.cross_entropy.
  """
  config = model.config
  parts = context.groups(config.execution.context, config.N, config.K)
  fields = [field.name for field in dataclasses.fields(Batch)]
  plain = context.lay_out(Batch(**{name: getattr(batch, name) for name in fields}), parts)
  x, _, router = model(plain.tokens, plain.positions, plain.segments, laid=Mask(zigzag=parts))
  with jax.named_scope('loss'):
    # All rows say the same of labels.
    words, labels = (ax.place(x, 'batch', None).max(0) for x in (batch.choices, batch.labels))
    total, sums = _of_words(*model.scored(x), words, labels, plain, config.logit_softcap)
  return total, balance(router), sums | (router or {})


def _of_words(x, head, words, labels, batch, softcap):
  learned = batch.weights != 0
  x = jnp.where(learned[..., None], x, 0)
  # A product and no lookup: rows of a table that is split by ids are on many devices.
  chosen = ax.place((words[:, None] == jnp.arange(head.shape[0])[None]), None, 'vocab')
  rows = ax.einsum('WV,VE->WE', chosen.astype(head.dtype), head, (None, None), precision='highest')
  logits = jnp.einsum('BTE,WE->BTW', x, rows, preferred_element_type=jnp.float32)
  if softcap:
    logits = softcap * jnp.tanh(logits / softcap)

  truth = jnp.where(batch.targets[..., None] == words[None, None], labels[None, None], -1).max(-1)
  mine = labels[None, None] == truth[..., None]
  mine |= ~learned[..., None]  # where nothing is learned, a loss of 0 and no NaN in its slope
  nll = jax.nn.logsumexp(logits, -1) - jax.nn.logsumexp(logits, -1, where=mine)

  same = (labels[:, None] == labels[None]).astype(jnp.float32)
  shares = jnp.einsum('BTW,WX->BTX', jax.nn.softmax(logits), same)
  right = jnp.where(mine, shares, 0).max(-1) >= shares.max(-1)
  total = (nll * batch.weights).sum()
  return total, {
    'nll': total,
    'tokens': batch.weights.sum(),
    'correct': (right * batch.weights).sum(),
  }
