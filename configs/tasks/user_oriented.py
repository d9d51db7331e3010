"""Instructions as people give them to an assistant (instructions/user_oriented_eval.jsonl).

Self-Instruct, Wang et al., arXiv:2212.10560: its authors ask that nobody train on these. There is
more than one good answer, and overlap with the one that is given says little: rate them, too
(docs/ratings.md).
"""

from collections.abc import Iterator

from evaluation.task import Generate, Row, Task


def turns(row: Row) -> Iterator[Row]:
  """What is asked, and the answer that a person gave."""
  asked, answered = (turn['content'] for turn in row['messages'])
  yield {'instruction': asked, 'answer': answered}


def get_task() -> Task:
  return Task(
    Generate('answer', stops=('\n\nInstruction:',), max_new_tokens=192),
    'instructions/user_oriented_eval.jsonl',
    prompt='Instruction: {{ instruction }}\n\nAnswer:',
    metrics=('rougeL_stemmed', 'chrf', 'length'),
    rows=turns,
  )
