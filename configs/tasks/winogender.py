"""Whom does a pronoun mean, by its gender? (bias/winogender_sentences.csv)

Winogender schemas, Rudinger et al., arXiv:1804.09301. `evaluate.py bias` has the gaps between
genders on the same sentences.
"""

from evaluation.bias_rows import winogender
from evaluation.task import MultipleChoice, Task


def get_task() -> Task:
  return Task(
    MultipleChoice('choices', 'answer', normalise='sum'),
    'bias/winogender_sentences.csv',
    prompt='{{ sentence }} Here "{{ pronoun }}" means',
    by='group',
    rows=winogender,
  )
