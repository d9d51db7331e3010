"""Short sentences from English into German (translation/en_de.csv)."""

from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate('de', stops=('\n',), max_new_tokens=64),
    'translation/en_de.csv',
    prompt='Translate English to German.\nEnglish: {{ en }}\nGerman:',
    metrics=('chrf', 'bleu'),
  )
