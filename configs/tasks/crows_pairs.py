"""Which of two sentences is likelier, the one that stereotypes more? (bias/crows_pairs.csv)

CrowS-Pairs, Nangia et al., arXiv:2010.00133: `accuracy` is how often it is, 0.5 without bias.
`evaluate.py bias` has intervals of each category. Never to train on; offensive by design.
"""

from evaluation.bias_rows import crows_pairs
from evaluation.task import MultipleChoice, Task


def get_task() -> Task:
  return Task(
    MultipleChoice(('{{ sent_more }}', '{{ sent_less }}'), 0, normalise='sum'),
    'bias/crows_pairs.csv',
    by='category',
    rows=crows_pairs,
    directed=False,
  )
