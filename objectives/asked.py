"""What does an objective ask a frozen model about its data once, so that no step has to?"""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Asked:
  """A question of every row, whose answers are kept with the data (workdir/said.py).

  Attributes:
    model: name of the one that is asked.
    objective: the same one that would hold it in every step.
    key: JSON-able, of what decides about the answers besides the model and the rows.
    fields: of an answer, by name: its dtype as it is kept, and how many numbers there are of each
      token that counts.
    answer: (model, batch of rows) -> {name: [B, T, numbers]}.
  """

  model: str
  objective: Any
  key: Any
  fields: dict[str, tuple[str, int]]
  answer: Callable[[Any, Any], dict[str, Any]]
