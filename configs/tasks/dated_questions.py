"""Answers to questions on what was at a date (dated/questions.jsonl: date, question, answer)."""

from evaluation.knowledge import dated
from evaluation.task import Generate, Task


def first_line(text: str) -> str:
  """Of an answer; some models begin one with an empty line."""
  return text.strip().partition('\n')[0]


def get_task() -> Task:
  return Task(
    Generate('answer', stops=('Question:',), max_new_tokens=32, extract=first_line),
    'dated/questions.jsonl',
    prompt='Question: {{ question }}\nAnswer:',
    rows=dated,
    by='year',
    metrics=('token_f1', 'exact_match'),
  )
