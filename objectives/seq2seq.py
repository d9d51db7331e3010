"""What tunes an encoder-decoder on records? The cross-entropy of a target, its end included, given
its source: summaries, translations, any text to text.

S, T lengths of a row's sources and targets
"""

import dataclasses

from data import examples, pairs
from data.batch import SourceBatch
from model import flops
from objectives.sft import OfExamples
from objectives.targets import Targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2Seq(OfExamples, Targets, pairs.PairSettings):
  """Packed pairs of a source and a target, each made of a record (data/pairs.py), with teacher
  forcing: the decoder reads its start token and the target, and learns each token of it.
  """

  kind: str = 'seq2seq'
  term = 'seq2seq'
  does = 'gives a target for what an encoder read'

  def __post_init__(self):
    super().__post_init__()
    pairs.PairSettings.__post_init__(self)

  def read(self, config, log, prompt=()):
    prepared = examples.prepare(config, self, log, prompt)
    read = pairs.Pairs(**vars(prepared), form=self.rows_of(config, prepared.tokenizer))
    fills = ', '.join(f'{side} {fill:.1%}' for side, fill in read.fills.items())
    log(f'data: rows of {read.form.size} are filled with {fills}')
    return read

  def batches(self, prepared, config, rows):
    return pairs.PairLoader(prepared, config, rows)

  def validation_batches(self, prepared, config, rows):
    return pairs.PairValidation(prepared, config, rows)

  def batch_like(self, config):
    source, target = self.room(config)
    return SourceBatch.abstract(config.batch_size, target, source)

  def row_tokens(self, config):
    return sum(self.room(config))

  def longest_row(self, config):
    return max(self.room(config))

  def forward_flops(self, network, config, document_length):
    """document_length: data.pairs.PairLengths; None: a pair fills its row."""
    source, target = self.room(config)
    seen = document_length or pairs.PairLengths(source, target, source, target, source)
    spent = flops.pair_flops(network, seen.source, seen.target, seen[2:])
    return spent / (seen.source + seen.target)
