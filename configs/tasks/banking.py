"""What a customer of a bank asks for, ten labels (classification/banking_test.csv).

Banking77, Casanueva et al., arXiv:2003.04807.
"""

from evaluation.task import Classification, Task


def get_task() -> Task:
  return Task(
    Classification('configs/templates/banking.toml', calibration='contextual'),
    'classification/banking_test.csv',
    shots='classification/banking_train.csv',
  )
