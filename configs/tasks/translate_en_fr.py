"""Short sentences from English into French (translation/en_fr.csv)."""

from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate('fr', stops=('\n',), max_new_tokens=64),
    'translation/en_fr.csv',
    prompt='Translate English to French.\nEnglish: {{ en }}\nFrench:',
    metrics=('chrf', 'bleu'),
  )
