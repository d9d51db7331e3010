"""Answers to questions on what was at a date (dated/questions.jsonl: date, question, answer)."""

from evaluation.knowledge import dated
from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate('answer', stops=('\n',), max_new_tokens=32),
    'dated/questions.jsonl',
    prompt='Question: {{ question }}\nAnswer:',
    rows=dated,
    by='year',
    metrics=('exact_match', 'token_f1'),
  )
