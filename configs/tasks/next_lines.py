"""The next line of a module of the interpreter's library; without any data.

pass@1 is how often it is the line to the letter, but for white space around it.
"""

from evaluation.library import next_lines
from evaluation.task import Generate, Task


def same(answer: str, row: dict) -> bool:
  return answer == row['line']


def get_task() -> Task:
  return Task(
    Generate('line', stops=('\n',), max_new_tokens=48, passed=same),
    next_lines,
    prompt='{{ before }}',
    target='{{ written }}',
    space='',
    metrics=('chrf', 'pass@1'),
  )
