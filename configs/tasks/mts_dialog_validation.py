"""The same as mts_dialog, of dialogues to choose a model by (mts_dialog/validation.csv).

What is chosen by these questions is judged by those of mts_dialog, which nothing was chosen by.
"""

import dataclasses

from evaluation.task import Task, read


def get_task() -> Task:
  return dataclasses.replace(read('mts_dialog')[1], data='mts_dialog/validation.csv')
