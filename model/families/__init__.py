"""Which architectures of transformers can be read and written?
A family is a config function and a name map.

Each family is a module with
  TYPES          the `model_type`s of config.json that it reads
  config(hf)     the ModelConfig of a parsed config.json; raises for whatever is not supported,
                 naming it
  to_hf(config)  a config.json that transformers loads
  tensors(config)  our leaf -> common.Source: where each parameter lies in a checkpoint
  BUFFERS, TIED  patterns of tensors that hold no parameter; names of one tensor twice
and, where a checkpoint needs it, PREFIXES (a prefix of names -> others in use),
with_tensors(config, names) and flat(hf), the config.json whose keys `config` is to look at.
"""

import dataclasses
from types import ModuleType

import names as names_
from model.config import ModelConfig
from model.families import (
  bert,
  common,
  deepseek,
  gemma2,
  gemma3,
  gpt2,
  gpt_oss,
  llama,
  mistral,
  mixtral,
  qwen2,
  qwen3,
  qwen3_moe,
  t5,
)
from model.families.keys import TRAINING
from model.params import named_leaves

FAMILIES = {
  module.__name__.rpartition('.')[2]: module
  for module in (
    llama,
    mistral,
    qwen2,
    qwen3,
    gemma2,
    gemma3,
    gpt2,
    mixtral,
    qwen3_moe,
    gpt_oss,
    deepseek,
    t5,
    bert,
  )
}
TYPES = {kind: name for name, module in FAMILIES.items() for kind in module.TYPES}


def read(
  hf: dict, tensors: set[str] = frozenset(), ignore: tuple[str, ...] = ()
) -> tuple[ModuleType, ModelConfig]:
  """The family and the ModelConfig of a parsed config.json.

  Args:
    tensors: names in the checkpoint, for families whose config.json does not tell all.
    ignore: keys not to look at.
  Raises: ValueError for an unknown model_type, missing or unknown keys,
    and keys to ignore that are not there; NotImplementedError for values that are not supported.
  """
  kind = names_.check('model_type of config.json', hf.get('model_type'), TYPES)
  family = FAMILIES[TYPES[kind]]
  try:
    hf = family.flat(hf) if hasattr(family, 'flat') else hf
    for key in ignore:
      names_.check('--ignore_key', key, hf)
    config = family.config({key: value for key, value in hf.items() if key not in ignore})
  except (
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    OverflowError,
    ZeroDivisionError,
  ) as error:
    odd = [f'{key}={value!r}' for key, value in hf.items() if value is None or _digits(value)]
    raise ValueError(
      f'config.json has a value of another type than it should be ({type(error).__name__}: {error})'
      + (f'; look at {", ".join(odd)}' if odd else '')
    ) from error
  return family, family.with_tensors(config, tensors) if tensors and hasattr(
    family, 'with_tensors'
  ) else config


def _digits(value) -> bool:
  """Whether a value is a number between quotes."""
  return isinstance(value, str) and value.replace('.', '', 1).lstrip('-').isdigit()


def origin(hf: dict) -> dict:
  """What an export of a parsed config.json's model is to have of it though no ModelConfig tells:
  {'family': .., 'keys': {..}}, JSON-able.
  """
  return {
    'family': TYPES[hf['model_type']],
    'keys': {key: value for key, value in hf.items() if key in TRAINING},
  }


def name_of(family: ModuleType) -> str:
  """What a family is called."""
  return family.__name__.rpartition('.')[2]


def problems(config: ModelConfig, family: ModuleType) -> list[str]:
  """What of a config a family cannot express;
  [] when its config.json reads back as the same model.
  """
  try:
    back = family.config(family.to_hf(config))
  except (ValueError, NotImplementedError) as error:
    return [str(error)]
  wanted, readable = (named_leaves(dataclasses.asdict(common.canonical(c))) for c in (config, back))
  return [
    f'model.{field}={value!r} (it has {readable[field]!r})'
    for field, value in wanted.items()
    if readable[field] != value
  ]


def family_of(config: ModelConfig, name: str = '') -> ModuleType:
  """The family to write a config as: the one called `name`, else the first that can express it.

  Raises ValueError that names the fields that the family, or the nearest of all, cannot express.
  """
  if name:
    among = {name: FAMILIES[names_.check('family', name, FAMILIES)]}
  else:
    among = FAMILIES
  wrong = {name: problems(config, family) for name, family in among.items()}
  nearest = min(wrong, key=lambda name: len(wrong[name]))
  if wrong[nearest]:
    raise ValueError(
      f'family {nearest!r}{"" if name else ", the nearest,"} cannot express '
      + ', '.join(wrong[nearest])
    )
  return FAMILIES[nearest]
