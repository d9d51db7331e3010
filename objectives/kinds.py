"""Which objectives are there? The only list, by the name that --config.objective.kind takes.

A kind is imported when it is asked for: who reads train.py meets what an objective is, and of those
that there are the one that the run names.
"""

import dataclasses

import names
from objectives.objective import Objective

KINDS = {
  'next_token': 'objectives.next_token.NextToken',
  'sft': 'objectives.sft.SFT',
  'seq2seq': 'objectives.seq2seq.Seq2Seq',
  'classify': 'objectives.classify.Classify',
  'classify_seq2seq': 'objectives.classify_seq2seq.ClassifySeq2Seq',
  'classify_head': 'objectives.classify_head.ClassifyHead',
  'preference': 'objectives.preference.Preference',
  'preference_seq2seq': 'objectives.preference_seq2seq.PreferenceSeq2Seq',
  'kto': 'objectives.kto.KTO',
  'kto_seq2seq': 'objectives.preference_seq2seq.KTOSeq2Seq',
  'span_corruption': 'objectives.denoise.SpanCorruption',
  'masked_lm': 'objectives.denoise.MaskedLM',
  'reward': 'objectives.reward.Reward',
  'grpo': 'objectives.policy.GRPO',
  'grpo_seq2seq': 'objectives.rollout_seq2seq.GRPOSeq2Seq',
  'ppo': 'objectives.ppo.PPO',
  'distil': 'objectives.distil.Distil',
  'distil_sft': 'objectives.distil.DistilSFT',
  'distil_seq2seq': 'objectives.distil.DistilSeq2Seq',
  'distil_span_corruption': 'objectives.distil.DistilSpanCorruption',
  'distil_masked_lm': 'objectives.distil.DistilMaskedLM',
  'gkd': 'objectives.gkd.GKD',
  'gkd_seq2seq': 'objectives.rollout_seq2seq.GKDSeq2Seq',
}
DEFAULT = 'next_token'


def of(kind: str) -> type[Objective]:
  """The kind of this name. Raises ValueError for a name that none has."""
  return names.imported(KINDS[names.check('objective.kind', kind, KINDS)])


def default() -> Objective:
  """What a run minimises that does not say."""
  return of(DEFAULT)()


def fields(kind: str) -> list[str]:
  """The settings of a kind, without its tag."""
  return [field.name for field in dataclasses.fields(of(kind)) if field.name != 'kind']


def foreign(kind: str, name: str) -> str:
  """What to say of a field that this kind has not: which it has, and whose it is. '' for one that
  it has, or that no kind has.
  """
  others = [other for other in KINDS if other != kind and name in fields(other)]
  if name in fields(kind) or not others:
    return ''
  return (
    f'config.objective.{name} is a field of {" and ".join(others)}, not of '
    f'objective.kind={kind!r}, whose fields are: {", ".join(fields(kind)) or "none"}'
  )
