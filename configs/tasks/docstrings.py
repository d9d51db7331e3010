"""What a function of the interpreter's library is for, in a line; no data is needed."""

from evaluation.library import functions
from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate('docstring', stops=('\n',), max_new_tokens=32),
    functions,
    prompt='{{ function }}\n\nIn a sentence, this function is to:',
    metrics=('chrf', 'rougeL_stemmed'),
  )
