"""What a function of the interpreter's library is for, in a line; without any data."""

from evaluation.library import functions
from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate('docstring', stops=('\n',), max_new_tokens=32),
    functions,
    prompt='{{ function }}\n\n# What the function above does, in a line:\n#',
    metrics=('chrf', 'rougeL_stemmed'),
  )
