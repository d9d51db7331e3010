"""Problems of school mathematics, by the number that an answer ends in (gsm8k/test.jsonl).

GSM8K, Cobbe et al., arXiv:2110.14168. The last number that is written is the answer.
"""

from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate('answer', stops=('\n\n', 'Question:'), max_new_tokens=256),
    'gsm8k/test.jsonl',
    prompt='Question: {{ question }}\nAnswer:',
    metrics=('number_match',),
  )
