"""What makes an encoder-decoder prefer a target to another, of the same source, or give more of
those that were wanted? What makes a decoder (objectives/preference.py, objectives/kto.py), on rows
of sources and targets.
"""

import dataclasses

import jax.numpy as jnp

from data.source_choices import (
  SourceChoiceBatch,
  SourceChoiceLoader,
  SourceChoices,
  SourceChoiceSettings,
  SourceChoiceValidation,
)
from data.source_judged import SourceJudgedSettings
from objectives.answers import OfAnswers
from objectives.kto import Judging
from objectives.preference import Comparing
from objectives.seq2seq import Seq2Seq


class OfSources(OfAnswers):
  """What is read of rows of sources and two targets each."""

  def _check_network(self, name, network):
    if not network.encoder_layers:
      raise NotImplementedError(
        f'objective.kind={self.kind!r} compares targets of a source, and {name!r} with '
        'model.encoder_layers=0 has no encoder; use an encoder-decoder, or objective.kind='
        f'{self.kind.removesuffix("_seq2seq")!r}'
      )

  def read(self, config, log):
    prepared = super().read(config, log)
    form = self.rows_of(config, prepared.tokenizer)
    return SourceChoices(**vars(prepared), form=form)

  def batches(self, prepared, config, rows):
    return SourceChoiceLoader(prepared, config, rows)

  def validation_batches(self, prepared, config, rows):
    return SourceChoiceValidation(prepared, config, rows)

  def batch_like(self, config):
    source, target = self.room(config)
    return SourceChoiceBatch.abstract(config.batch_size, target, source)

  def tokens(self, batch):
    return jnp.count_nonzero(batch.segments) + jnp.count_nonzero(batch.source_segments)

  row_tokens = Seq2Seq.row_tokens
  longest_row = Seq2Seq.longest_row
  forward_flops = Seq2Seq.forward_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSeq2Seq(OfSources, Comparing, SourceChoiceSettings):
  """Packed pairs of targets, each with its source (data/source_choices.py)."""

  kind: str = 'preference_seq2seq'

  def __post_init__(self):
    super().__post_init__()
    SourceChoiceSettings.__post_init__(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTOSeq2Seq(OfSources, Judging, SourceJudgedSettings):
  """Packed targets that were judged, each with its source (data/source_judged.py)."""

  kind: str = 'kto_seq2seq'

  def __post_init__(self):
    super().__post_init__()
    SourceJudgedSettings.__post_init__(self)
