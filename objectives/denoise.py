"""What makes a model put noise right? Pretraining of encoder-decoders (T5's span corruption) and of
encoders (BERT's masked language modelling), on the corpora that decoders are trained on.

B rows of a batch · T length · S length of a source
"""

import dataclasses

import numpy as np

from data.batch import SourceBatch
from data.chunks import Chunked, ChunkLoader, ChunkValidation
from data.extra import extended, id_of
from data.masking import Masking
from data.prepare import prepare
from data.spans import Lengths, Spans
from model import flops
from objectives.experts import check_apart
from objectives.next_token import NextToken
from objectives.objective import MAIN, Objective
from objectives.targets import Targets

MASK = '<mask>'  # of a tokenizer that has none


class _Chunked(Objective):
  """What both have of `data.chunks`."""

  def batches(self, prepared, config, rows):
    return ChunkLoader(prepared, config, rows)

  def validation_batches(self, prepared, config, rows):
    return ChunkValidation(prepared, config, rows)

  def verdict(self, sums, prepared):
    """`validation_loss` in nats, and `validation_accuracy`, a share, of the tokens that are
    scored.
    """
    del prepared
    tokens = sums['tokens']
    return {
      'validation_loss': sums['nll'] / tokens,
      'validation_accuracy': sums['correct'] / tokens,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption(_Chunked, Targets):
  """Texts with spans of noise, which the decoder gives back (data/spans.py); one term, of all
  tokens of the targets alike.

  A row is an example: a source of data.sequence_length tokens, and a target that is shorter.

  Attributes:
    noise_density: share of a text that is noise, at most 0.5.
    mean_span: tokens of a span of noise on average, at least 1.
    sentinels: how many <extra_id_..> a tokenizer gets, behind its own ids and counted down to the
      first of these, that has no <extra_id_0> (T5's SentencePiece model: 100 make the ids of T5's
      checkpoints).
  """

  kind: str = 'span_corruption'
  noise_density: float = 0.15
  mean_span: float = 3.0
  sentinels: int = 100
  term = 'span_corruption'
  does = 'gives back what an encoder read without it'

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.noise_density <= 0.5:
      raise ValueError(
        f'objective.noise_density={self.noise_density} must be above 0 and at most 0.5: a target '
        'is no longer than its source'
      )
    self._check_least(mean_span=1, sentinels=1)

  def lengths(self, config) -> Lengths:
    """Of an example. Raises ValueError where data.sequence_length has room for no span."""
    return Lengths.of_source(config.sequence_length, self.noise_density, self.mean_span)

  def read(self, config, log):
    lengths = self.lengths(config)
    prepared = prepare(config, log=log)
    tokenizer = prepared.tokenizer
    if id_of(tokenizer, sentinel(0)) is None:
      tokenizer = extended(tokenizer, [sentinel(i) for i in reversed(range(self.sentinels))])
    ids = [id_of(tokenizer, sentinel(i)) for i in range(lengths.spans)]
    if None in ids:
      raise ValueError(
        f'an example of data.sequence_length={config.sequence_length} has {lengths.spans} spans of '
        f'noise, and the tokenizer {ids.index(None)} sentinels {sentinel(0)}, ..., one for each; '
        'lower data.sequence_length, raise objective.mean_span or, where the tokenizer has none of '
        'its own, objective.sentinels'
      )
    key = f'{config.sequence_length}-{self.kind}-{self.noise_density!r}-{self.mean_span!r}'
    noise = Spans(lengths, key, tuple(ids), tokenizer.eos, tokenizer.pad)
    chunked = Chunked.of(prepared, tokenizer, noise)
    log(
      f'data: {chunked.rows:,} examples to train on, {len(chunked.validation):,} held out, each of '
      f'{lengths.text} tokens, {lengths.noise} of them noise in {lengths.spans} spans: a source of '
      f'{lengths.source} and a target of {lengths.target}; sentinels {ids[0]} to {ids[-1]}'
    )
    return chunked

  def batch_like(self, config):
    lengths = self.lengths(config)
    return SourceBatch.abstract(config.batch_size, lengths.target, lengths.source)

  def row_tokens(self, config):
    lengths = self.lengths(config)
    return lengths.source + lengths.target

  def forward_flops(self, network, config, document_length):
    del document_length  # the documents of a row see each other
    lengths = self.lengths(config)
    return flops.pair_flops(network, lengths.source, lengths.target) / self.row_tokens(config)


def sentinel(span: int) -> str:
  """The name of the id that stands for a span, counted from 0."""
  return f'<extra_id_{span}>'


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM(_Chunked, NextToken):
  """Texts with masks, under which an encoder guesses the tokens (data/masking.py); one term, of all
  tokens that were drawn to be guessed alike.

  A row is data.sequence_length tokens of documents as they follow one another, each between its bos
  and its eos, and not seeing the others.

  Attributes:
    masked: share of the tokens of text that are guessed.
    replaced, random: of these, the shares that the mask and any other token stand for; the rest
      stays as it is.
  """

  kind: str = 'masked_lm'
  masked: float = 0.15
  replaced: float = 0.8
  random: float = 0.1
  term = 'masked_lm'

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.masked <= 1:
      raise ValueError(f'objective.masked={self.masked} must be above 0 and at most 1')
    if min(self.replaced, self.random) < 0 or self.replaced + self.random > 1:
      raise ValueError(
        f'objective.replaced={self.replaced} and objective.random={self.random} are shares of the '
        'same tokens: both at least 0, and at most 1 together'
      )

  def accepts(self, models):
    config = models[MAIN]
    if config.causal:
      raise NotImplementedError(
        f'objective.kind={self.kind!r} guesses a token by both sides of it, and model.causal=True '
        'sees one; set model.causal=False and model.encoder_layers=0'
      )
    check_apart(config)

  def read(self, config, log):
    prepared = prepare(config, log=log)
    tokenizer = prepared.tokenizer
    name = tokenizer.special_tokens.get('mask_token', MASK)
    if id_of(tokenizer, name) is None:
      tokenizer = extended(tokenizer, [name])
    length, mask = config.sequence_length, id_of(tokenizer, name)
    text = np.array([i for i, spelled in enumerate(tokenizer.token_bytes) if spelled])
    key = f'{length}-{self.kind}-{self.masked!r}-{self.replaced!r}-{self.random!r}'
    noise = Masking(length, key, self.masked, self.replaced, self.random, text, mask)
    chunked = Chunked.of(prepared, tokenizer, noise)
    log(
      f'data: {chunked.rows:,} examples to train on, {len(chunked.validation):,} held out, of '
      f'{length} tokens each; the mask is id {mask}'
    )
    return chunked

  def forward_flops(self, network, config, document_length):
    # Only what is guessed is scored.
    unscored = (1 - self.masked) * 2 * network.D * network.V
    return super().forward_flops(network, config, document_length) - unscored

  def judged(self, models, batch):
    _, sums = self.sums(models, batch)
    return {name: sums[name] for name in ('nll', 'tokens', 'correct')}
