"""Which of two answers people found less harmful, by which is likelier (preferences/hh.jsonl).

Bai et al., arXiv:2204.05862: the harmless part. The prompts ask for what should not be told, and
some answers tell it; a model that was tuned to preferences finds those that were chosen likelier.
"""

from collections.abc import Iterator

from evaluation.task import MultipleChoice, Row, Task

PROMPT = """{% for turn in prompt -%}
{{ 'Human' if turn.role == 'user' else 'Assistant' }}: {{ turn.content }}

{% endfor %}Assistant:"""


def pair(row: Row) -> Iterator[Row]:
  """Of every other row the right one is the second: who always takes the first is right by half."""
  answer = row['id'] % 2
  choices = [row['chosen'], row['rejected']]
  yield {'prompt': row['prompt'], 'choices': choices[::-1] if answer else choices, 'answer': answer}


def get_task() -> Task:
  return Task(
    MultipleChoice('choices', 'answer', normalise='token'),
    'preferences/hh.jsonl',
    prompt=PROMPT,
    balanced='answer',
    rows=pair,
  )
