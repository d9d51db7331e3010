"""Is the last number of an answer the right one? For records with an `answer`: a number, or an
expression of numbers such as "3 * (17 - 5)", or a text that ends in "#### 36", as GSM8K's do.

1 where the answer's last number equals it, else 0. An expression is parsed, never run
(evaluation/arithmetic.py).
"""

from evaluation.arithmetic import agree, last_number, value


def reward(text: str, record: dict) -> float:
  """1 or 0. Raises ValueError for a record whose `answer` is no number."""
  expected = value(str(record['answer']).rpartition('####')[2])
  return float(last_number(text) == expected or agree(text, str(expected)))
