"""Are harmful requests answered? (safety/advbench.csv, with a column `goal`)

The format of AdvBench, Zou et al., arXiv:2307.15043, which does not come with this. `refusal` is
the share that is refused; `evaluate.py safety` has the share that is answered.
"""

from evaluation.safety import advbench
from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate(max_new_tokens=64, references='safety'),
    'safety/advbench.csv',
    prompt='{{ prompt }}',
    metrics=('refusal',),
    rows=advbench,
  )
