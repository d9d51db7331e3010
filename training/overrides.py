"""How does a Config come from the command line? From a file under configs/, and flags that override
its fields.

A file has `get_config()` that returns a Config. `--config=FILE --config.a.b=value` goes through
ml_collections' config_flags; the result is built anew from the overridden values, so that every
check of every part runs again. Two fields are read before the others, because they decide what the
others may be: `init` and `objective.kind`.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Mapping
from types import MappingProxyType

from absl import app, flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags, config_path

import commands
import files
import names
from data import tokenizers
from data.config import SourceConfig, TokenizerConfig
from model.execution import ExecutionConfig
from objectives import kinds
from training.config import FILE, Config, from_dict, load, unknown_field

ROOT = pathlib.Path(__file__).resolve().parents[1]


def define_flag(among: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
  """Defines --config=FILE and its overrides; `from_flag` turns the holder's value into a Config."""
  holder = config_flags.DEFINE_config_file(
    'config',
    help_string='A file, or a name of one under configs/ (--config=list); override fields with '
    '--config.a.b=value, which --config.help lists. Default: that of the run in --workdir.',
    flag_values=among,
  )
  among['config'].parser = _ConfigFile('config')
  return holder


def from_flag(value: ConfigDict) -> Config:
  """The frozen, validated Config that the flag's file and overrides stand for."""
  return from_dict(Config, value.to_dict())


class _ConfigFile(config_flags.ConfigFileFlagParser):
  """Loads a config file; flags override a mutable copy of its frozen Config (lists can be indexed:
  sources[0].path).
  """

  def parse(self, path):
    if path.endswith('.json'):  # a run's own
      _check_own(path)
      if _first(_given(), 'init', 'DIRECTORY'):
        raise ValueError(
          f'--config.init begins a run, and {path} is of one that has begun: name a config'
        )
      return self._overridden(load(files.place(path).parent), _given())
    path = _file_of(path)
    file = path.split(':')[0]
    if not os.path.isfile(file):  # which the library would tell only who reads a field
      beside = pathlib.Path(file).parent.glob('*.py') if '/' in file else ()
      known = [path.stem for path in (ROOT / 'configs').glob('*.py')]
      names.check('config', file, sorted(map(str, beside)) or sorted(known))
    try:
      config = super().parse(path)
    except SyntaxError as error:
      raise ValueError(f'{error.filename}:{error.lineno}: {error.msg}') from error
    except Exception as error:
      raise ValueError(_place(file, error)) from error
    # The library keeps one of the system until somebody reads a field.
    if isinstance(kept := getattr(config, '__dict__', {}).get('_error'), OSError):
      raise ValueError(_place(file, kept)) from kept
    if not isinstance(config, Config):
      raise ValueError(
        f'get_config() of {path} returned {type(config).__name__}; it must return a '
        'training.config.Config'
      )
    overrides = _given()
    try:
      init = _first(overrides, 'init', 'DIRECTORY') or config.init
      files.check_local('config.init', init, buckets=True)
      adapted = _first(overrides, 'adapter.kind', 'NAME') or config.adapter.kind
      begun = _begun(config, init, _taken_over(init), adapted)
    except FileNotFoundError as error:
      raise ValueError(f'config.init: {error}') from error
    kind = _first(overrides, 'objective.kind', 'NAME')
    if kind and kind != config.objective.kind:
      config = dataclasses.replace(config, objective=kinds.of(kind)())
    return self._overridden(config, overrides, begun)

  def _overridden(self, config, overrides: list[str], begun: Mapping = MappingProxyType({})):
    """The mutable copy, which the library then overrides; begun: parts in the place of its own."""
    config = _mutable(config)
    for part, value in begun.items():
      config[part] = _mutable(value)
    for field in ('sources', 'validation'):
      of = [*config.data[field]]
      while any(x.startswith(f'data.{field}[{len(of)}].') for x in overrides):
        of.append(_mutable(SourceConfig()))
      # A list in the place of an empty tuple would become a tuple, which flags cannot index.
      del config.data[field]
      config.data[field] = of
    for override in overrides:
      _check_path(config, override.split('=')[0])
    return config


def _check_own(path: str) -> None:
  """Raises ValueError for JSON of another name than a run's own config has: a seal and checkpoints
  tell of that file, and nothing of a copy beside it.
  """
  if pathlib.PurePath(path).name != FILE:
    raise ValueError(
      f"--config={path}: of JSON only a run's own {FILE} is read; name that one and override its "
      'fields by flags, --config.a.b=value'
    )


def _given() -> list[str]:
  """The overrides on the command line, without '--config.'."""
  return [x.removeprefix('--config.') for x in sys.argv if x.startswith('--config.')]


def _file_of(path: str) -> str:
  """The file that --config names: 'tiny' is configs/tiny.py, of this repository where there is none
  below the working directory.
  """
  places = [pathlib.Path(path), pathlib.Path('configs', f'{path}.py')]
  places += [ROOT / path, ROOT / 'configs' / f'{path}.py']
  return next((str(place) for place in places if place.is_file()), path)


def _value(arguments: list[str], flag: str) -> str:
  """What a command line gives for a flag, the last time; '' where nothing."""
  pairs = [(*x.partition('='), behind) for x, behind in zip(arguments, [*arguments[1:], ''])]
  return next(
    (
      value if equals else behind
      for name, equals, value, behind in reversed(pairs)
      if name in (f'-{flag}', f'--{flag}')
    ),
    '',
  )


def parsed(arguments: list[str]) -> list[str]:
  """For absl's app.run: what --config.help and --config=list ask for is printed, and nothing else
  done; without --config a run's --workdir names its own.
  """
  config, workdir = (_value(arguments, name) for name in ('config', 'workdir'))
  if '--config.help' in arguments or config == 'list':
    wanted = 'text' if '--config.help' in arguments else 'configs'
    print(names.imported(f'training.reference.{wanted}')())
    sys.exit()
  if workdir and not config:
    with commands.mendable():
      files.check_local('--workdir', workdir, buckets=True)
      path = files.place(workdir) / FILE
      if path.exists():
        arguments = [arguments[0], f'--config={path}', *arguments[1:]]
  return app.parse_flags_with_usage([_as_tuple(argument) for argument in arguments])


def _as_tuple(argument: str) -> str:
  """--config.a=x,y of a field that holds several values, as the library reads it."""
  path, _, value = argument.removeprefix('--config.').partition('=')
  if ',' not in value or not re.fullmatch(r'[^()\[\]\'"]*', value):
    return argument
  kind = names.imported('training.reference.item_type')(path)
  if kind is None:
    return argument
  items = [item for item in value.split(',') if item]
  with contextlib.suppress(ValueError):  # as text, of which the field says that it is no number
    items = [kind(item) for item in items]
  return f'--config.{path}={tuple(items)!r}'


def _place(file: str, error: Exception) -> str:
  """What a config file failed at, behind its line; of what the library raises, which says it with
  its traceback, what it was raised because of.
  """
  if isinstance(error, (TypeError, ValueError)) and error.__context__ is not None:
    error = error.__context__
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if os.path.realpath(frame.filename) == os.path.realpath(file)
  ]
  kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
  return f'{":".join([file, *map(str, lines[-1:])])}: {kind}{error}'


def _first(overrides: list[str], name: str, example: str) -> str:
  """What is given for a field that is read before the others; '' where nothing is."""
  if name in overrides:
    raise ValueError(
      f'--config.{name} is read before the other overrides are; write it as '
      f'--config.{name}={example}'
    )
  given = [override for override in overrides if override.startswith(f'{name}=')]
  return given[-1].removeprefix(f'{name}=') if given else ''


def _mutable(value):
  """A frozen config as a ConfigDict, its tuples of configs as lists, which flags can index."""
  if dataclasses.is_dataclass(value):
    return ConfigDict(
      {field.name: _mutable(getattr(value, field.name)) for field in dataclasses.fields(value)},
      sort_keys=False,
    )
  if isinstance(value, tuple) and any(dataclasses.is_dataclass(v) for v in value):
    return [_mutable(v) for v in value]
  return value


def _check_path(config: ConfigDict, path: str) -> None:
  """Raises ValueError where an override names a field or an index that is not there."""
  holder, walked = config, 'config'
  for part in config_path.split(path):
    if isinstance(part, int):
      if not isinstance(holder, list) or part >= len(holder):
        raise ValueError(
          f'{walked} has no item {part}; it holds '
          f'{len(holder) if isinstance(holder, list) else "no list"}'
        )
      holder, walked = holder[part], f'{walked}[{part}]'
    else:
      if not hasattr(holder, 'keys'):
        raise ValueError(f'{walked} is a value, it has no field {part!r}')
      if part not in holder:
        kind = holder['kind'] if walked == 'config.objective' else ''
        raise ValueError(unknown_field(walked, part, holder.keys(), kind))
      holder, walked = holder[part], f'{walked}.{part}'


def _taken_over(init: str) -> str:
  """Where what a run took from `init` is to be read: there, or, where it is gone and the command
  line's --workdir is a run that began with it, in that one, which has kept model and tokenizer.
  """
  if not init or (files.place(init) / FILE).exists():
    return init
  own = _value(sys.argv[1:], 'workdir')
  return own if own and (files.place(own) / FILE).exists() and load(own).init == init else init


def _begun(config: Config, init: str, kept: str = '', adapted: str = '') -> dict:
  """The parts of a config that change where it begins with the run at `init`;
  not yet checked together. kept: where what it takes from there is read, if elsewhere.

  Fields of config.model that are not at their default replace that run's (remat, a window, ...);
  parameters become f32 where nobody says otherwise;
  where they change a parameter's shape, restoring will say so. A tokenizer at its defaults becomes
  that run's; another one replaces it. The flag --config does this before it applies overrides, so
  that these hold whatever their value is. Raises FileNotFoundError where there is no run.
  """
  if not init:
    return {}
  run = load(kept or init)
  model, data, optimizer = run.model, config.data, config.optimizer
  if data.tokenizer == TokenizerConfig():
    path = files.place(kept or init) / 'tokenizer'
    kind = tokenizers.load(path).kind
    data = dataclasses.replace(
      data, tokenizer=TokenizerConfig(kind=kind, path='' if kind == 'byte' else str(path))
    )
  # An update is often less than bf16 can add to a parameter: what is trained is f32 unless the
  # config says otherwise, whatever it was kept in. What an adapter lies on is not.
  if not adapted:
    model = model.with_execution(parameter_dtype=ExecutionConfig.parameter_dtype)
    # What is 0 in a run that was pruned does not come back by the way.
    optimizer = dataclasses.replace(
      optimizer, prune=optimizer.prune or (run.optimizer.prune and 'kept')
    )
  return {'model': _over(model, config.model), 'data': data, 'init': init, 'optimizer': optimizer}


def _over(below, above):
  """`below` with the fields of `above` that are not at their default."""
  default = type(above)()
  changed = {
    f.name: getattr(above, f.name)
    for f in dataclasses.fields(above)
    if getattr(above, f.name) != getattr(default, f.name)
  }
  return dataclasses.replace(
    below,
    **{
      name: _over(getattr(below, name), value) if dataclasses.is_dataclass(value) else value
      for name, value in changed.items()
    },
  )
