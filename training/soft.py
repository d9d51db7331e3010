"""Which runs can have soft tokens before their texts (model/soft.py), and with which ids?"""

from model import soft
from training.config import Config


def check(config: Config) -> None:
  """Raises NotImplementedError or ValueError where they would stand before nothing."""
  adapter, length = config.adapter, config.data.sequence_length
  soft.check(config.model, adapter)
  if not config.objective.prompted:
    raise NotImplementedError(
      f'adapter.kind={adapter.kind!r} stands before every example, and the rows of '
      f"objective.kind={config.objective.kind!r} are none; use an objective of records, or "
      "adapter.kind='lora'"
    )
  if adapter.tokens >= length:
    raise ValueError(
      f'adapter.tokens={adapter.tokens} leave no room for an example in '
      f'data.sequence_length={length}, which counts them; raise it, or take fewer'
    )
  if adapter.text and not config.init:
    raise ValueError(
      f'adapter.text={adapter.text!r} is of the tokenizer of config.init, and the model begins '
      "anew; name a run by config.init, or use adapter.initial='vocabulary'"
    )


def ids(config: Config) -> dict[str, tuple[int, ...]]:
  """What Objective.read takes besides: the virtual ids that stand before every text.

  Raises ValueError for an open vocabulary, behind which they are.
  """
  if not config.model.vocabulary:
    raise ValueError(
      f'adapter.kind={config.adapter.kind!r} has ids behind the vocabulary, and '
      'model.vocabulary=0 leaves it open; begin with a run (config.init), or set it'
    )
  first = config.model.table_rows
  return {'prompt': tuple(range(first, first + config.adapter.tokens))}
