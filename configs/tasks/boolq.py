"""Yes or no, by a paragraph (qa/boolq.jsonl).

BoolQ, Clark et al., arXiv:1905.10044. More answers are yes than no: who always says
so has the share of these, not `chance`.
"""

from evaluation.task import MultipleChoice, Task


def get_task() -> Task:
  return Task(
    MultipleChoice(('yes', 'no'), 'answer', normalise='sum'),
    'qa/boolq.jsonl',
    prompt='{{ context }}\nQuestion: {{ question }}?\nAnswer:',
    balanced='answer',
    by='answer',
  )
