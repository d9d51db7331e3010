"""How do a checkpoint of transformers and a run's directory become each other?

    python -m model.checkpoint import --from DIR --workdir RUN     config.json + *.safetensors (+ tokenizer) -> a run
    python -m model.checkpoint export --workdir RUN --to DIR       a run -> what transformers loads
    python -m model.checkpoint inspect DIR                         family, parameters, dtype, memory per chip count

Tensors stream: a piece of one at a time goes from its file to the devices that hold it, and back.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

import files
import names
from model import families, transformer
from model.config import ModelConfig
from model.families.layout import Layout, sizes
from model.params import abstract, named_leaves
from model.stream import Filling, Region, fetch
from model.tensorfiles import DTYPES, TensorFiles, write
from parallel.mesh import NO_MESH, MeshConfig, make_mesh

PIECE = 2**20  # entries moved at a time
SHARD_BYTES = 2_000_000_000  # of a file that is written
KINDS = {str(dtype): kind for kind, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Part:
  """One tensor's share of a parameter: the leaf, its index into stacked layers and experts, the layout of the rest."""

  leaf: str
  index: tuple[int, ...]
  layout: Layout

  def region(self, start: int, stop: int) -> Region:
    """Ranges of the leaf's dimensions that come from `start` to `stop` of the tensor's first name."""
    return tuple((i, i + 1) for i in self.index) + self.layout.region(start, stop)


def parts_of(family, config: ModelConfig) -> dict[str, list[Part]]:
  """Tensor name -> the parts of parameters that it holds."""
  lengths, found = sizes(config), {}
  for leaf, source in family.tensors(config).items():
    layout = Layout.of(source, lengths)
    for i, layer in enumerate(source.layers) if source.layers else ((None, None),):
      for expert in range(config.E) if '{expert}' in source.name else (None,):
        name = source.name.format(layer=layer, expert=expert)
        index = tuple(n for n in (i, expert) if n is not None)
        found.setdefault(name, []).append(Part(leaf, index, layout))
  return found


def load(
  directory: str | os.PathLike,
  config: ModelConfig | None = None,
  mesh: Mesh | None = None,
  *,
  dtype: str = '',
  compute_dtype: str = '',
  ignore: str = '',
  ignore_keys: tuple[str, ...] = (),
  log=print,
) -> tuple[ModelConfig, transformer.Decoder]:
  """The model of a checkpoint of transformers, sharded over a mesh, and its config.

  Args:
    directory: with config.json and *.safetensors.
    config: default: what config.json says. mesh: default: all devices, parameters split as far as the width allows.
    dtype: of the parameters where `config` is not given; default: the checkpoint's (float32 for float16).
      compute_dtype:
      default: the same.
    ignore: a pattern of tensors to leave out. ignore_keys: of config.json not to look at.
  Raises: FileNotFoundError, ValueError or NotImplementedError: for what is not supported, and with one list of all
    tensors that are missing, left over, or of another shape or kind.
  """
  directory = pathlib.Path(directory)
  tensors = TensorFiles(directory)
  family, found = families.read(_json(directory), set(tensors.tensors), ignore_keys)
  if config is None:
    dtype = dtype or _dtype(tensors, log)
    config = dataclasses.replace(found, parameter_dtype=dtype, dtype=compute_dtype or dtype)
  parts = parts_of(family, config)
  called = _resolve(parts, tensors, family)
  tied = check(parts, called, tensors, family, ignore)
  for name, other in tied.items():
    _check_equal(tensors, name, called[other])
  mesh = mesh or default_mesh(config)
  with jax.set_mesh(mesh):
    target = abstract(functools.partial(transformer.init, config, 0), mesh)
    leaves = named_leaves(target)
    mapped = {part.leaf for shares in parts.values() for part in shares}
    if mapped != leaves.keys():
      raise RuntimeError(
        f'the name map of {family.__name__} and the model differ in {sorted(mapped ^ leaves.keys())}'
      )
  with jax.set_mesh(NO_MESH):
    built = {leaf: Filling(x) for leaf, x in leaves.items()}
    place = {name: tensors.tensors[called[name]] for name in parts}
    for name in sorted(parts, key=lambda name: (str(place[name].path), place[name].offset)):
      first = parts[name][0].layout
      for start, stop in first.chunks(PIECE):
        wanted = [part for part in parts[name] if built[part.leaf].wants(part.region(start, stop))]
        if wanted:
          rows = tensors.read(called[name], *first.rows(start, stop))
          for part in wanted:
            built[part.leaf].put(part.layout.bring(rows), part.region(start, stop))
  return config, jax.tree.unflatten(
    jax.tree.structure(target), [built[leaf].array() for leaf in leaves]
  )


def save(
  model: transformer.Decoder,
  config: ModelConfig,
  directory: str | os.PathLike,
  *,
  family: str = '',
  dtype: str = '',
  shard_bytes: int = SHARD_BYTES,
  special: dict | None = None,
) -> None:
  """Writes a model as transformers keeps it: config.json and *.safetensors; whole, or not at all.

  Args:
    directory: must not exist. family: default: the first that can express the config. dtype: default: the parameters'.
    special: bos_token_id and others for config.json.
  Raises ValueError for a config that no family expresses, FileExistsError for a directory that is there.
  """
  with _whole(directory) as partial:
    _save(
      model,
      config,
      partial,
      families.family_of(config, family),
      dtype or config.parameter_dtype,
      shard_bytes,
      special or {},
    )


def _save(model, config, directory, family, dtype, shard_bytes, special):
  leaves, parts = named_leaves(model), parts_of(family, config)
  if not all(x.is_fully_addressable for x in leaves.values()):
    raise ValueError(
      'some shards of this model lie on devices of other processes; export in one process'
    )

  def produce(name):
    first = parts[name][0].layout
    for start, stop in first.chunks(PIECE):
      low, high = first.rows(start, stop)
      rows = np.empty((high - low, *first.shape[1:]), DTYPES[KINDS[dtype]])
      written = sum(
        part.layout.send(
          fetch(leaves[part.leaf], part.region(start, stop)).reshape(
            [high - low for low, high in part.layout.region(start, stop)]
          ),
          rows,
        )
        for part in parts[name]
      )
      if written != rows.size:
        raise RuntimeError(
          f'{name}: the name map of {family.__name__} gives {written} of {rows.size} entries'
        )
      yield rows

  with jax.set_mesh(NO_MESH):
    write(
      directory,
      {name: shares[0].layout.shape for name, shares in parts.items()},
      KINDS[dtype],
      produce,
      shard_bytes,
    )
  hf = (
    family.to_hf(config)
    | {'torch_dtype': dtype}
    | {f'{name}_token_id': special.get(name) for name in ('bos', 'eos', 'pad')}
  )
  files.replace(directory / 'config.json', json.dumps(hf, indent=2) + '\n')


def check(
  parts: dict[str, list[Part]],
  called: dict[str, str],
  tensors: TensorFiles,
  family,
  ignore: str = '',
) -> dict[str, str]:
  """Tensors of the file that repeat others, by those. Raises ValueError that lists all that does not fit.

  Args: called: name of a tensor -> in the files. ignore: a pattern of tensors in the files that may be left out.
  """
  have, used, tied, wrong = tensors.tensors, {*called.values()}, {}, []
  if ignore and not any(re.fullmatch(ignore, name) for name in have):
    raise ValueError(
      f'--ignore={ignore} matches no tensor in {tensors.directory}; it has to match a whole name'
    )
  for name, there in called.items():
    if there not in have:
      wrong.append(f'missing: {there}')
      continue
    tensor, shape = have[there], parts[name][0].layout.shape
    if tensor.shape != shape:
      wrong.append(
        f'mis-shaped: {there} is {list(tensor.shape)}, config.json makes it {list(shape)}'
      )
    if tensor.kind not in DTYPES:
      wrong.append(
        f'of an unsupported dtype: {there} is {tensor.kind}; supported: {", ".join(DTYPES)}'
      )
  for name in have:
    if (
      name in used
      or any(re.fullmatch(pattern, name) for pattern in family.BUFFERS)
      or (ignore and re.fullmatch(ignore, name))
    ):
      continue
    other = family.TIED.get(name)
    if (
      other in parts
      and have[name].shape == parts[other][0].layout.shape
      and have[name].kind in DTYPES
    ):
      tied[name] = other
    else:
      wrong.append(f'extra: {name} {list(have[name].shape)}')
  if wrong:
    remedy = (
      '\n--ignore=PATTERN leaves out extra tensors'
      if any(line.startswith('extra') for line in wrong)
      else ''
    )
    raise ValueError(
      f'the tensors in {tensors.directory} are not those of its config.json:\n  '
      + '\n  '.join(wrong)
      + remedy
    )
  return tied


def _resolve(parts, tensors, family) -> dict[str, str]:
  """Tensor -> what it is called in this checkpoint, whose names may have another prefix."""
  spellings = [{name: name for name in parts}]
  for ours, others in getattr(family, 'PREFIXES', {}).items():
    spellings += [
      {name: other + name.removeprefix(ours) if name.startswith(ours) else name for name in parts}
      for other in others
    ]
  return max(spellings, key=lambda called: sum(name in tensors.tensors for name in called.values()))


def _check_equal(tensors: TensorFiles, one: str, other: str) -> None:
  rows = tensors.tensors[one].shape[0]
  step = max(1, PIECE * rows // max(1, math.prod(tensors.tensors[one].shape)))
  for start in range(0, rows, step):
    if not np.array_equal(
      tensors.read(one, start, min(start + step, rows)),
      tensors.read(other, start, min(start + step, rows)),
    ):
      raise ValueError(
        f'{one} differs from {other}, to which config.json ties it; set tie_word_embeddings to false '
        'there, or leave it out '
        f'with --ignore={re.escape(one)}'
      )


def _dtype(tensors: TensorFiles, log) -> str:
  """The dtype to keep a checkpoint's parameters in: bfloat16 where most of it is, else float32."""
  bits = {}
  for tensor in tensors.tensors.values():
    bits[tensor.kind] = bits.get(tensor.kind, 0) + math.prod(tensor.shape)
  most = max((kind for kind in bits if kind in DTYPES), key=bits.get, default='F32')
  dtype = 'bfloat16' if most == 'BF16' else 'float32'
  wider = (
    sum(bits.get(kind, 0) for kind in ('F32', 'F64', 'F16'))
    if dtype == 'bfloat16'
    else bits.get('F64', 0)
  )
  if wider:
    log(
      f'NOTE: {wider:,} parameters have more digits than {dtype} keeps; --dtype=float32 keeps what it can'
    )
  elif most == 'F16':
    log('NOTE: float16 parameters become float32, which holds them exactly')
  return dtype


def default_mesh(config: ModelConfig) -> Mesh:
  """All devices, parameters split over as many as divide the width."""
  return make_mesh(MeshConfig(fsdp=math.gcd(jax.device_count(), config.D)))


def _json(directory: pathlib.Path) -> dict:
  path = directory / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(f'{path} does not exist: {directory} is no checkpoint of transformers')
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  if not isinstance(found, dict):
    raise ValueError(f'{path} holds {type(found).__name__}, not the keys of a config')
  return found


@contextlib.contextmanager
def _whole(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A directory beside the named one, which takes its name at the end; after an error nothing stays."""
  directory = pathlib.Path(directory).absolute()
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise FileExistsError(
      f'{directory} is there already, and not empty; name another, or remove it'
    )
  partial = directory.with_name(f'.{directory.name}.{os.getpid()}.partial')
  partial.mkdir(parents=True)
  try:
    yield partial
    os.replace(partial, directory)
  except BaseException:
    shutil.rmtree(partial)
    raise


def _import(options) -> None:
  # Imports run one way: data and training use the model, so that only the commands know them.
  from data.config import DataConfig, TokenizerConfig
  from training import config as configs
  from training.checkpoint import Checkpoints

  if jax.process_count() > 1:
    raise ValueError(
      'import runs in one process; import on one host, and let the others read the run'
    )
  workdir, source = pathlib.Path(options.workdir), pathlib.Path(getattr(options, 'from'))
  with _whole(workdir) as partial:
    config, model = load(
      source,
      dtype=options.dtype,
      compute_dtype=options.compute_dtype,
      ignore=options.ignore,
      ignore_keys=tuple(options.ignore_key),
    )
    data = DataConfig(
      sequence_length=min(
        config.max_length or DataConfig.sequence_length, DataConfig.sequence_length
      )
    )
    tokenizer = (
      None
      if options.tokenizer == 'none'
      else _tokenizer(pathlib.Path(options.tokenizer or source), bool(options.tokenizer))
    )
    if tokenizer:
      tokenizer.save(partial / 'tokenizer')
      data = dataclasses.replace(
        data, tokenizer=TokenizerConfig(kind=tokenizer.kind, path=str(workdir / 'tokenizer'))
      )
    run = configs.Config(model=config, data=data).resolve(
      tokenizer.vocabulary if tokenizer else config.V
    )
    checkpoints = Checkpoints(
      partial, log=_log, chunk_bytes=2**21
    )  # small: a file lies in memory while it is written
    checkpoints.save(0, {'model': model}, data={}, progress={}, donated=False)
    checkpoints.wait()
    configs.save(run, partial)
  title = families.TYPES[_json(source)['model_type']]
  _log(
    f'{workdir}: {title}, {_count(model):,} parameters in {config.parameter_dtype}, '
    f'tokenizer {repr(tokenizer.kind) if tokenizer else "none: generate.py needs one"}'
  )


def _tokenizer(path: pathlib.Path, wanted: bool):
  """The tokenizer at a path, or in a checkpoint's directory; None where there is none and none was asked for."""
  from data import tokenizer as tokenizers

  models = [
    path / name
    for name in ('tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model')
    if (path / name).is_file()
  ]
  if (path / 'tokenizer.json').is_file() or not models:
    try:
      return tokenizers.load(path)
    except FileNotFoundError:
      if wanted:
        raise
      _log(f'NOTE: {path} holds no tokenizer.json and no SentencePiece model')
      return None
  return tokenizers.load(models[0])


def _export(options) -> None:
  from data import tokenizer as tokenizers
  from training import config as configs
  from training.checkpoint import Checkpoints

  workdir, target = pathlib.Path(options.workdir), pathlib.Path(options.to)
  config = configs.load(workdir).model
  family = families.family_of(config, options.family)
  checkpoints = Checkpoints(workdir, log=_log)
  steps = {'last': checkpoints.latest(), 'best': checkpoints.best()} | {
    str(step): step for step in checkpoints.steps()
  }
  steps = {name: step for name, step in steps.items() if step is not None}
  step = steps[names.check('checkpoint', options.checkpoint, steps)]
  tokenizer = tokenizers.load(workdir / 'tokenizer') if (workdir / 'tokenizer').is_dir() else None
  with _whole(target) as partial:
    mesh = default_mesh(config)
    with jax.set_mesh(mesh):
      model = checkpoints.model(
        abstract(functools.partial(transformer.init, config, 0), mesh), step
      )
    special = (
      {name: getattr(tokenizer, name) for name in ('bos', 'eos', 'pad')} if tokenizer else {}
    )
    _save(
      model, config, partial, family, options.dtype or config.parameter_dtype, SHARD_BYTES, special
    )
    if tokenizer and tokenizer.kind == 'huggingface':
      tokenizer.save(partial)
    elif tokenizer and tokenizer.kind == 'sentencepiece':
      files.replace(partial / 'tokenizer.model', tokenizer.model)
    else:
      reason = f'{tokenizer.kind!r} is unknown to transformers' if tokenizer else 'the run has none'
      _log(f'NOTE: no tokenizer is written: {reason}')
  _log(
    f'{target}: {families.name_of(family)}, step {step}, {_count(model):,} parameters in '
    f'{options.dtype or config.parameter_dtype}'
  )


def _inspect(options) -> None:
  from training import config as configs

  directory = pathlib.Path(options.directory)
  hf = _json(directory)
  if 'model_type' in hf:
    tensors = TensorFiles(directory)
    family, config = families.read(hf, set(tensors.tensors), tuple(options.ignore_key))
    parts, title = parts_of(family, config), families.name_of(family)
    check(parts, _resolve(parts, tensors, family), tensors, family, options.ignore)
    kinds = sorted({tensor.kind for tensor in tensors.tensors.values()})
    config = dataclasses.replace(config, parameter_dtype=_dtype(tensors, _log))
  else:
    config = configs.load(directory).model
    kinds = [KINDS[config.parameter_dtype]]
    try:
      title = families.name_of(families.family_of(config))
    except ValueError:
      title = 'a model of no family'
  leaves = jax.tree.leaves(jax.eval_shape(functools.partial(transformer.init, config, 0)))
  size = sum(x.size * x.dtype.itemsize for x in leaves)
  count = sum(x.size for x in leaves)
  _log(f'{directory}: {title}, {count:,} parameters, {"/".join(kinds)} in the files')
  _log(f'memory per chip in GiB, parameters ({config.parameter_dtype}) split over the chips:')
  _log('   chips  parameters  and AdamW\'s state')
  # Two moments in the parameters' dtype; vectors, which are not split, are too small to count.
  chips = 1
  while chips == 1 or 6 * size / chips > 2**30:  # until a chip holds half a GiB
    _log(f'{chips:8}  {size / chips / 2**30:10.3f}  {3 * size / chips / 2**30:17.3f}')
    chips *= 2


def _count(model) -> int:
  return sum(x.size for x in jax.tree.leaves(model))


_log = functools.partial(print, flush=True)


def main(arguments: list[str] | None = None) -> None:
  """The command line; what its user can mend ends it with a message, not a traceback."""
  parser = argparse.ArgumentParser(
    prog='python -m model.checkpoint',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(required=True)

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
    made = commands.add_parser(name, help=help_, parents=parents)
    made.set_defaults(run=run)
    return made

  made = command('import', _import, 'a checkpoint of transformers -> a run', reading)
  made.add_argument('--from', required=True, metavar='DIR')
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
  made.add_argument('--checkpoint', default='last', help="'last', 'best', or a step")
  command('inspect', _inspect, 'family, parameters, dtype, memory', reading).add_argument(
    'directory', metavar='DIR'
  )
  options = parser.parse_args(arguments)
  try:
    options.run(options)
  except re.error as error:
    sys.exit(f'error: --ignore={options.ignore!r} is not a regular expression: {error}')
  except (ValueError, NotImplementedError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
