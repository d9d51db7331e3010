"""Functions of Python from their headers, by running them (humaneval/problems.jsonl).

HumanEval, Chen et al., arXiv:2107.03374. Programs that a model writes run here: --run_programs says
where. For pass@10, copy this file, draw `samples` at a temperature, and name the metric.
"""

import re

from evaluation.task import Generate, Task

# Where another thing than the function begins.
STOPS = ('\nclass ', '\ndef ', '\n#', '\nif ', '\nprint(', '\n@', '\nassert ')
FENCED = re.compile(r'```(?:python)?\n(.*?)(?:```|\Z)', re.DOTALL)


def program(answer: str, row: dict) -> str:
  """That ends without an error where the answer is right: the rest of a function, or, in a chat,
  all of it, perhaps in a block of code.
  """
  block = FENCED.search(answer)
  code = block[1] if block else _until_another(answer)
  whole = re.search(rf'^def {re.escape(row["entry_point"])}\(', code, re.MULTILINE)
  # What the header imports, a function that is whole may need, too.
  code = f'{row["prompt"]}    pass\n\n{code}' if whole else row['prompt'] + code
  return f'{code}\n\n{row["test"]}\n\ncheck({row["entry_point"]})\n'


def _until_another(answer: str) -> str:
  """Without what follows the function, where a chat went on (else its stops ended it)."""
  ends = [answer.find(stop) for stop in STOPS]
  return answer[: min((end for end in ends if end >= 0), default=len(answer))]


def get_task() -> Task:
  return Task(
    Generate(stops=STOPS, max_new_tokens=384, extract=str, program=program),
    'humaneval/problems.jsonl',
    prompt='{{ prompt }}',
    target='{{ canonical_solution }}',
    space='',
    metrics=('pass@1',),
  )
