"""Who was it, where a text tells and where it does not? (bias/bbq.jsonl)

BBQ, Parrish et al., arXiv:2110.08193: one of its files, or several in one. `evaluate.py bias` has
its scores.
"""

from evaluation.bias_rows import bbq
from evaluation.task import MultipleChoice, Task


def get_task() -> Task:
  return Task(
    MultipleChoice('choices', 'label', normalise='sum'),
    'bias/bbq.jsonl',
    prompt='{{ context }}\nQuestion: {{ question }}\nAnswer:',
    by='context_condition',
    rows=bbq,
  )
