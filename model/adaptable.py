"""Which settings make an adapter? What is not in their types (model/adaptation.py)."""

import dataclasses
import math

import names
from model.adaptation import KINDS, LOW_RANK, SOFT, AdapterConfig
from model.weights.scheme import Scheme

INITIAL = ('vocabulary', 'random', 'text')
# Of which kinds a field is that others do not read.
READ_BY = dict.fromkeys(('rank', 'alpha', 'stabilised', 'targets', 'dropout'), LOW_RANK) | (
  dict.fromkeys(('tokens', 'initial', 'text'), SOFT)
)


def check(config: AdapterConfig) -> None:
  """Raises ValueError for sizes and names that make none, and for fields that its kind would not
  read.
  """
  if config.base:
    Scheme.parse(config.base)
  if config.rank < 1:
    raise ValueError(f'adapter.rank={config.rank} must be at least 1')
  if not 0 < config.alpha < math.inf:
    raise ValueError(f'adapter.alpha={config.alpha} must be above 0, and finite')
  if not 0 <= config.dropout < 1:
    raise ValueError(f'adapter.dropout={config.dropout} must be at least 0, and below 1')
  if config.dropout and not config.kind:
    raise ValueError(
      f"adapter.dropout={config.dropout} with adapter.kind='' is of no adapter; choose one, or use "
      'train.dropout'
    )
  if not config.targets:
    raise ValueError("adapter.targets=() names no matrix; ('*',) is all in the model's blocks")
  names.check('adapter.initial', config.initial, INITIAL)
  if config.tokens < 1:
    raise ValueError(f'adapter.tokens={config.tokens} must be at least 1')
  if (config.initial == 'text') != bool(config.text.strip()):
    raise ValueError(
      f"adapter.initial={config.initial!r} with adapter.text={config.text!r}: initial='text' "
      'begins with a text, and nothing else does; give both, or neither'
    )
  for field in dataclasses.fields(config):
    kinds, value = READ_BY.get(field.name, KINDS), getattr(config, field.name)
    # Of no adapter, flags of a low-rank one may stay when it is switched off.
    other = config.kind not in kinds and (config.kind or kinds == SOFT)
    if other and value != field.default:
      raise ValueError(
        f'adapter.{field.name}={value!r} would not be read by adapter.kind={config.kind!r}: it is '
        f'of {" and ".join(kinds)}; leave it out'
      )
