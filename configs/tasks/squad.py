"""The words of a paragraph that answer a question (qa/squad.jsonl).

SQuAD, Rajpurkar et al., arXiv:1606.05250.
"""

from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate('answers', stops=('\n',), max_new_tokens=32),
    'qa/squad.jsonl',
    prompt='{{ context }}\nQuestion: {{ question }}\nAnswer:',
    metrics=('token_f1', 'exact_match'),
  )
