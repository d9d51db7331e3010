"""How good at tasks is the model while it learns? Those of config.evaluation, asked every so many
steps as evaluate.py asks them; each time a directory below evaluations/ of the run's, and numbers
in metrics.jsonl.
"""

import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax

import names
from data.tokenizer import Tokenizer
from evaluation import page, running, task
from evaluation.examples import Manner, examples, ways
from evaluation.measures import measures
from training.config import Config
from workdir.in_hand import InHand

DIRECTORY = 'evaluations'


class TaskAsker:
  """Asks the model that a run has in hand. It draws by seeds of its own, so that a run that is
  asked trains as one that is not.
  """

  def __init__(
    self, config: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, directory, first
  ):
    """first: the step after which the run goes on; what was said after later ones is removed.

    Raises ValueError and NotImplementedError for tasks that cannot be asked, for data that is not
    there, and for a train.best that none of them says.
    """
    asked = config.evaluation
    self._in_hand = InHand(config, tokenizer, mesh, directory)
    self._manner = Manner(asked.data, asked.limit, chat=asked.chat)
    self._tasks = dict(task.read(name) for name in asked.tasks)
    if len(self._tasks) < len(asked.tasks):
      said = ','.join(asked.tasks)
      raise ValueError(
        f'evaluation.tasks={said} names a task twice, or two files of one name; rename one'
      )
    self._shots = asked.shots
    lower = {}
    for name, each in self._tasks.items():
      (k,), _ = ways(each, [asked.shots])
      examples(each, k, self._manner)
      lower |= {f'{name}-{k}/{m.name}': m.lower_is_better for m in measures(each)}
    _check_best(config.train.best, lower)
    self._workdir, self._place = pathlib.Path(directory), pathlib.Path(directory) / DIRECTORY
    for later in self._place.glob('*'):
      # What is asked before the first step is asked again, perhaps of another model.
      if later.name.isdecimal() and (int(later.name) > first or not first):
        shutil.rmtree(later)

  def __call__(
    self, step: int, models: Mapping[str, Any], log: Callable[[str], Any]
  ) -> dict[str, float]:
    """Scores with the models as they are after a step: {'TASK-SHOTS/METRIC': value}, those that are
    numbers. A task that fails is named, and the others go on.
    """
    output = self._place / str(step)
    output.mkdir(parents=True, exist_ok=True)
    of = {'workdir': str(self._workdir), 'step': step, 'weights': ''}
    generator = self._in_hand.generator(models)
    arguments = generator, self._tasks, [self._shots], self._manner, of, output, log
    summaries, failed = running.evaluate(*arguments)
    page.write(output, of, failed)
    return {
      f'{summary.name}/{name}': metric['value']
      for summary in summaries
      for name, metric in summary.metrics.items()
      if metric['value'] is not None
    }


def _check_best(best: str, lower: Mapping[str, bool]) -> None:
  """Raises ValueError where train.best is of a task and none says it, or the other way round.

  lower: whether lower is better, by what tasks say.
  """
  extreme, name = best.split(maxsplit=1)
  if '/' not in name or name.startswith('validation_'):
    return
  names.check('train.best: the metric', name, lower)
  better = 'lowest' if lower[name] else 'highest'
  if extreme != better:
    raise ValueError(f"train.best={best!r}: of {name} the {better} is best; say '{better} {name}'")
