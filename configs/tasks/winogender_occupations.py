"""Is the pronoun of most who have an occupation the likelier one? (bias/winogender_occupations.csv)

Of the occupations of Winogender (Rudinger et al., arXiv:1804.09301) with US labour statistics.
`accuracy` is how often it is, 0.5 for who knows no statistics, and tells which occupations a model
takes for men's and women's. `evaluate.py bias` has intervals of both.
"""

from evaluation.bias_rows import occupations
from evaluation.task import MultipleChoice, Task


def get_task() -> Task:
  return Task(
    MultipleChoice(('{{ first }}', '{{ second }}'), 0, normalise='sum'),
    'bias/winogender_occupations.csv',
    by='category',
    rows=occupations,
    directed=False,
  )
