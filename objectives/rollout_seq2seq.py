"""What teaches an encoder-decoder by what it writes itself? What teaches a decoder
(objectives/policy.py, objectives/gkd.py), on targets of sources: the encoder reads the prompt.

S, T lengths of a row's sources and targets
"""

import dataclasses

import jax.numpy as jnp

from data.tokenizer import in_utf8
from objectives.gkd import GKD
from objectives.own_text import OfOwnText
from objectives.policy import GRPO
from objectives.rollout_rows import SourceAnswerRows
from objectives.seq2seq import Seq2Seq


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfOwnTargets(OfOwnText):
  """What learns from its own targets of prompts: data.sequence_length is of these, and a row of
  targets has max_new_tokens.

  Attributes:
    prefix: text that stands in front of every prompt: 'summarize: '.
  """

  prefix: str = ''
  of_sources = True
  target_field = 'max_new_tokens'

  def __post_init__(self):
    super().__post_init__()
    in_utf8(self.prefix)
    if self.shared_prompts:
      raise NotImplementedError(
        f'objective.shared_prompts=True with objective.kind={self.kind!r}, whose encoder reads a '
        'prompt for each target: set it to False'
      )

  def _check_network(self, name, network):
    if not network.encoder_layers:
      raise NotImplementedError(
        f'objective.kind={self.kind!r} learns from targets of what an encoder read, and {name!r} '
        'with model.encoder_layers=0 has no encoder; use an encoder-decoder, or objective.kind='
        f'{self.kind.removesuffix("_seq2seq")!r}'
      )

  def room(self, config) -> tuple[int, int]:
    """S and T."""
    return config.sequence_length, self.max_new_tokens

  def longest_prompt(self, config):
    return config.sequence_length

  def answer_rows(self, config, pad):
    source, target = self.room(config)
    return SourceAnswerRows(target, source, pad)

  def tokens(self, batch):
    return super().tokens(batch) + jnp.count_nonzero(batch.source_segments)

  row_tokens = Seq2Seq.row_tokens
  longest_row = Seq2Seq.longest_row
  forward_flops = Seq2Seq.forward_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOSeq2Seq(OfOwnTargets, GRPO):
  """Several targets of each prompt, each credited against the others."""

  kind: str = 'grpo_seq2seq'


@dataclasses.dataclass(frozen=True, kw_only=True)
class GKDSeq2Seq(OfOwnTargets, GKD):
  """What a teacher says of the student's own targets."""

  kind: str = 'gkd_seq2seq'
