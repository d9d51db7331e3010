"""Which fields has a config, what do they mean, which of them does a run read, and which configs
are there? From the code: dataclasses, their defaults, and the `Attributes:` of their docstrings.
"""

import ast
import dataclasses
import inspect
import pathlib
import re
import textwrap
import typing
from collections.abc import Iterator

from data.config import OF_TRAINING
from model.adaptable import READ_BY
from objectives import kinds
from objectives.objective import Objective
from training.config import Config, flat, to_dict
from training.optimizer import DEFAULT

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'

# Sections of which nothing is read until a field of theirs is set, and which one that is.
SWITCHES = {'model.latent': 'width', 'model.moe': 'experts', 'adapter': 'kind'}
SWITCHES['evaluation'] = 'tasks'
# The types of fields that hold several values, by what is said of them.
BY_COMMAS = '{}s, by commas'
SEVERAL = {BY_COMMAS.format(item.__name__): item for item in (str, int, float)}
# What of rotary positions is read by each way to stretch them, besides the frequencies.
STRETCHED = {'none': (), 'linear': ('factor',)}
STRETCHED['llama3'] = ('factor', 'original_length', 'low', 'high')
STRETCHED['yarn'] = (*STRETCHED['llama3'], 'attention_factor', 'truncate')


@dataclasses.dataclass(frozen=True)
class Field:
  """A field as flags name it, behind --config."""

  path: str
  type: str
  default: str
  meaning: str


def fields(cls: type = Config, path: str = '') -> Iterator[Field]:
  """All fields below a config class, in order; of the objective, those of every kind."""
  hints, meanings = typing.get_type_hints(cls), described(cls)
  for field in dataclasses.fields(cls):
    name, hint = f'{path}{field.name}', hints[field.name]
    if hint is Objective:
      for kind in kinds.KINDS:
        yield from fields(kinds.of(kind), f'{name}.')
      continue
    inner = next((x for x in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(x)), None)
    if inner is not None:
      index = '[0]' if typing.get_origin(hint) is tuple else ''
      yield from fields(inner, f'{name}{index}.')
    else:
      yield Field(name, _type(hint), _default(field), meanings.get(field.name, ''))


def described(cls: type) -> dict[str, str]:
  """What the docstrings of a class, and of those that it inherits from, say of its fields."""
  meanings: dict[str, str] = {}
  for base in reversed(cls.__mro__):
    _, _, section = (inspect.cleandoc(base.__doc__ or '')).partition('Attributes:\n')
    lines = [line for line in re.split(r'\n(?=\S)', section)[0].split('\n') if line.strip()]
    for entry in re.split(r'\n(?=  \S)', '\n'.join(lines)):
      # One entry tells of several names, and several short ones may share a line.
      text = ' '.join(entry.split())
      parts = re.split(r'(?:^|(?<=[.;] ))((?:\w+, )*\w+): ', text)[1:]
      for names, meaning in zip(parts[::2], parts[1::2]):
        meanings |= {name: meaning.strip() for name in names.split(', ')}
  return meanings


def read_by(config: Config) -> list[str]:
  """Paths of the fields that a run of this config reads: another value would change what it is. Of
  several sources, those of the first.

  The others are switched off: a dense model has no use for a number of experts.
  """
  paths = flat(to_dict(config))
  return [path for path in paths if not re.search(r'\.[1-9]\d*\.', path) and _reads(config, path)]


def _reads(config, path):
  section, _, name = path.rpartition('.')
  model, optimizer = config.model, config.optimizer
  if section in SWITCHES and name != SWITCHES[section]:
    part = {
      'model.latent': model.latent,
      'model.moe': model.moe,
      'adapter': config.adapter,
      'evaluation': config.evaluation,
    }[section]
    if not getattr(part, SWITCHES[section]):
      return False
  if section == 'adapter' and name in READ_BY:
    return config.adapter.kind in READ_BY[name]
  if path == 'train.spill_dir':
    return config.train.offload_optimizer == 'disk'
  if section == 'data.tokenizer' and name in OF_TRAINING:
    return config.data.tokenizer.trained
  if path == 'model.execution.experts':
    return bool(model.moe.experts)
  if section == 'model.execution.pipeline':
    return config.mesh.stage != 1
  if section == 'optimizer' and type(optimizer).__dataclass_fields__[name].default == DEFAULT:
    return name in optimizer.settings()
  if section == 'model.rope':
    stretches = name in STRETCHED['yarn']
    return model.position == 'rope' and (not stretches or name in STRETCHED[model.rope.scaling])
  return name not in ('relative_buckets', 'relative_distance') or model.position == 'relative'


def item_type(path: str) -> type | None:
  """Of what the field of a path, such as 'train.trained', holds several values; None where it holds
  one.
  """
  path = re.sub(r'\[\d+\]', '[0]', path)
  return next((SEVERAL[x.type] for x in fields() if x.path == path and x.type in SEVERAL), None)


def text(width: int = 100) -> str:
  """All fields for a terminal, by section."""
  lines, section = [], ''
  for field in fields():
    head, _, _ = field.path.rpartition('.')
    if head != section:
      section = head
      switch = SWITCHES.get(section)
      when = f' (read where {section}.{switch} is set)' if switch else ''
      lines.append(f'\n--config.{section}.*{when}')
    lines.append(f'  {field.path.rpartition(".")[2]} ({field.type}, {field.default})')
    if field.meaning:
      lines.append(
        textwrap.fill(field.meaning, width, initial_indent=' ' * 6, subsequent_indent=' ' * 6)
      )
  return '\n'.join(lines).lstrip('\n')


def config_files() -> list[pathlib.Path]:
  """Those under configs/ that build a Config; in rewards/ are judges, in tasks/ questions."""
  apart = {CONFIGS / 'rewards', CONFIGS / 'tasks', CONFIGS / '__init__.py'}
  return sorted(path for path in CONFIGS.rglob('*.py') if not apart & {path, *path.parents})


def configs() -> str:
  """The files under configs/ with the first line of what they say of themselves."""
  lines = []
  for path in config_files():
    name = str(path.relative_to(CONFIGS).with_suffix(''))
    says = ast.get_docstring(ast.parse(path.read_text())) or ''
    lines.append(f'{name:24} {says.split(chr(10))[0]}')
  return '\n'.join(lines)


def _type(hint) -> str:
  if typing.get_origin(hint) is tuple:
    return BY_COMMAS.format(typing.get_args(hint)[0].__name__)
  return getattr(hint, '__name__', str(hint))


def _default(field: dataclasses.Field) -> str:
  value = field.default
  if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
    value = field.default_factory()
  return repr(value)
