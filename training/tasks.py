"""What is a run asked while it trains? Tasks (configs/tasks), every so many steps."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """Tasks that a run is asked, as evaluate.py --tasks asks them, by the model that it has in hand.

  Attributes:
    tasks: names of configs/tasks (evaluate.py --tasks=list), or paths of one's own files.
    every: in steps; at the end, too.
    shots: examples before each question. limit: questions of each task, the same each time; 0 asks
      all. data: the directory of the tasks' files. chat: asks by the tokenizer's chat template.
  """

  tasks: tuple[str, ...] = ()
  every: int = 0
  shots: int = 0
  limit: int = 100
  data: str = '.'
  chat: bool = False

  def __post_init__(self):
    if bool(self.tasks) != (self.every > 0) or min(self.shots, self.limit) < 0:
      raise ValueError(
        f'evaluation.tasks={self.tasks}, every={self.every}, shots={self.shots}, '
        f'limit={self.limit}: tasks are asked every so many steps, at least 1; '
        'give both, or neither, and no number below 0'
      )
