"""Are safe prompts refused that look unsafe, and unsafe ones answered? (bias/xstest.csv)

XSTest, Röttger et al., arXiv:2308.01263. `refusal` is the share that is refused, of both kinds;
`evaluate.py safety` tells them apart.
"""

from evaluation.safety import xstest
from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate(max_new_tokens=64, references='safety'),
    'bias/xstest.csv',
    prompt='{{ prompt }}',
    metrics=('refusal',),
    by='category',
    rows=xstest,
    directed=False,
  )
