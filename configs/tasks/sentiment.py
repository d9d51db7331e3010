"""Whether a review of a film is positive (classification/sentiment.csv).

Pang and Lee 2005, arXiv:cs/0506075.
"""

from evaluation.task import Classification, Task


def get_task() -> Task:
  return Task(Classification('configs/templates/sentiment.toml'), 'classification/sentiment.csv')
