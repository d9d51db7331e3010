"""Longer sentences, questions, from English into German (translation/questions_en_de.csv).

XQuAD, Artetxe et al., arXiv:1910.11856: translations by professionals.
"""

from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate('de', stops=('\n',), max_new_tokens=96),
    'translation/questions_en_de.csv',
    prompt='Translate English to German.\nEnglish: {{ en }}\nGerman:',
    metrics=('chrf', 'bleu'),
  )
