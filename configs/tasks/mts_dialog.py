"""Summaries of what doctors and patients say (mts_dialog/test.csv).

MTS-Dialog, Ben Abacha et al. 2023.
"""

from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate('section_text', stops=('\n\n',), max_new_tokens=96),
    'mts_dialog/test.csv',
    prompt='{{ dialogue }}\n\nSummary:',
    shots='mts_dialog/train.csv',
    metrics=('rouge1_stemmed', 'rouge2_stemmed', 'rougeL_stemmed', 'length'),
  )
