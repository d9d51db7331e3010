"""Questions of school science with four answers, the harder ones (choices/arc_challenge.jsonl).

ARC, Clark et al., arXiv:1803.05457.
"""

from evaluation.task import MultipleChoice, Task


def get_task() -> Task:
  return Task(
    MultipleChoice('choices', 'answer', normalise='character'),
    'choices/arc_challenge.jsonl',
    prompt='Question: {{ question }}\nAnswer:',
  )
