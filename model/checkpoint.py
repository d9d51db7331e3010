"""How do a checkpoint of transformers and a model become each other? `load` and `save`;
convert.py has the commands.

Tensors stream: a piece of one at a time goes from its file to the devices that hold it, and back.
"""

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
from data.gguf import GGUF
from model import families, filled, transformer
from model.config import ModelConfig
from model.families.layout import Layout, sizes
from model.gguf import GGUFTensors
from model.params import abstract, by_name, named_leaves
from model.quantised_files import KEY, QuantisedTensors
from model.quantised_files.fitted import KeptCodes, fitted
from model.quantised_files.outgoing import FORMAT, outgoing
from model.stream import Region, fetch
from model.tensorfiles import DTYPES, TensorFiles, write
from parallel.mesh import NO_MESH, MeshConfig, make_mesh

PIECE = 2**20  # entries moved at a time
SHARD_BYTES = 2_000_000_000  # of a file that is written
KINDS = {str(dtype): kind for kind, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorShare:
  """One tensor's share of a parameter: the leaf, its index into stacked layers and experts,
  the layout of the rest.
  """

  leaf: str
  index: tuple[int, ...]
  layout: Layout

  def region(self, start: int, stop: int) -> Region:
    """Ranges of the leaf's dimensions: what comes from `start` to `stop` of the tensor's first
    name.
    """
    return tuple((i, i + 1) for i in self.index) + self.layout.region(start, stop)


@dataclasses.dataclass(frozen=True)
class Opened:
  """A checkpoint that was opened: its parsed config.json, and its tensors, which are not read."""

  hf: dict
  tensors: 'Tensors'


Tensors = TensorFiles | GGUFTensors | QuantisedTensors


def parts_of(family, config: ModelConfig) -> dict[str, list[TensorShare]]:
  """Tensor name -> the parts of parameters that it holds."""
  lengths, parts = sizes(config), {}
  for leaf, source in family.tensors(config).items():
    layout = Layout.of(source, lengths)
    for i, layer in enumerate(source.layers) if source.layers else ((None, None),):
      for expert in range(config.E) if '{expert}' in source.name else (None,):
        name = source.name.format(layer=layer, expert=expert)
        index = tuple(n for n in (i, expert) if n is not None)
        parts.setdefault(name, []).append(TensorShare(leaf, index, layout))
  return parts


def load(
  directory: str | os.PathLike | Opened,
  config: ModelConfig | None = None,
  mesh: Mesh | None = None,
  *,
  dtype: str = '',
  compute_dtype: str = '',
  vocabulary_multiple: int = 1,
  ignore: str = '',
  ignore_keys: tuple[str, ...] = (),
  codes: str = 'exact',
  log=print,
) -> tuple[ModelConfig, transformer.Decoder]:
  """The model of a checkpoint of transformers, sharded over a mesh, and its config.

  Args:
    directory: with config.json and *.safetensors; a GGUF file; or what `opened` makes of those.
    config: default: what config.json says.
    mesh: default: all devices, parameters split as far as the width allows.
    dtype: of the parameters where `config` is not given; default: the checkpoint's (float32 for
      float16). compute_dtype: default: the same. vocabulary_multiple: see ModelConfig; likewise.
    ignore: a pattern of tensors to leave out. ignore_keys: of config.json not to look at.
    codes: of what lies in codes there, what stays so, one of quantised_files.fitted.KEPT; where
      `config` is given, what that says.
  Raises: FileNotFoundError, ValueError or NotImplementedError: for what is not supported,
    and with one list of all tensors that are missing, left over, or of another shape or kind.
  """
  source = directory if isinstance(directory, Opened) else opened(directory)
  tensors = source.tensors
  family, network = families.read(source.hf, set(tensors.tensors), ignore_keys)
  given = config
  config = given or dataclasses.replace(network, vocabulary_multiple=vocabulary_multiple)
  parts = parts_of(family, config)
  called = resolve(parts, tensors, family)
  tied = check(parts, called, tensors, family, ignore)
  if given is None:
    kept = fitted(config, parts, called, tensors, codes)
    for line in (*getattr(tensors, 'notes', ()), *kept.lines):
      log(line)
    dtype = dtype or stored_dtype(tensors, log, in_codes(kept, parts, called))
    config = config.with_execution(
      parameter_dtype=dtype, dtype=compute_dtype or dtype, stored=kept.stored
    )
  for name, other in tied.items():
    _check_equal(tensors, name, called[other])
  mesh = mesh or default_mesh(config)
  with jax.set_mesh(mesh):
    target = abstract(functools.partial(transformer.init, config, 0), mesh)
  params = by_name(target)
  mapped = {part.leaf for shares in parts.values() for part in shares}
  if mapped != params.keys():
    raise RuntimeError(
      f'the name map of {family.__name__} and the model differ in {sorted(mapped ^ params.keys())}'
    )
  with jax.set_mesh(NO_MESH):
    built = {leaf: filled.filling(p) for leaf, p in params.items()}
    place = {name: tensors.tensors[called[name]] for name in parts}
    for name in sorted(parts, key=lambda name: (str(place[name].path), place[name].offset)):
      _fill(built, parts[name], tensors, called[name])
  leaves = jax.tree.leaves([built[leaf].value() for leaf in params])
  return config, jax.tree.unflatten(jax.tree.structure(target), leaves)


def _fill(built: dict, shares: list[TensorShare], tensors: Tensors, name: str) -> None:
  """Brings a tensor, piece by piece, to the parameters that have shares of it.

  name: in the files.
  """
  first = shares[0].layout
  step = math.lcm(*(built[part.leaf].step(part.layout) for part in shares))
  for start, stop in first.chunks(PIECE, step):
    rows = {}  # of codes, and of numbers: what is wanted is read once
    for part in shares:
      target, region = built[part.leaf], part.region(start, stop)
      if not target.wants(region):
        continue
      if target.of_codes not in rows:
        low, high = first.rows(start, stop)
        rows[target.of_codes] = (
          tensors.coded[name].piece(low, high) if target.of_codes else tensors.read(name, low, high)
        )
      target.put(part.layout, rows[target.of_codes], region)


def in_codes(
  kept: KeptCodes, parts: dict[str, list[TensorShare]], called: dict[str, str]
) -> set[str]:
  """Tensors in the files that stay in codes."""
  return {
    called[name] for name, shares in parts.items() if all(s.leaf in kept.leaves for s in shares)
  }


def save(
  model: transformer.Decoder,
  config: ModelConfig,
  directory: str | os.PathLike,
  *,
  family: str = '',
  dtype: str = '',
  shard_bytes: int = SHARD_BYTES,
  special: dict | None = None,
  form: str = '',
) -> None:
  """Writes a model as transformers keeps it: config.json and *.safetensors; whole, or not at all.

  Args:
    directory: must not exist. family: default: the first that can express the config.
    dtype: default: the parameters'.
    special: bos_token_id and others for config.json. form: see write_files.
  Raises ValueError for a config that no family expresses,
  FileExistsError for a directory that is there.
  """
  with new_directory(directory) as partial:
    write_files(
      model,
      config,
      partial,
      families.family_of(config, family),
      dtype or config.execution.parameter_dtype,
      shard_bytes,
      special or {},
      form,
    )


def write_files(model, config, directory, family, dtype, shard_bytes, special, form=''):
  """form: '', which writes numbers, or compressed-tensors for a model in codes."""
  leaves, parts, coded = named_leaves(model), parts_of(family, config), None
  if form:
    names.check('--format', form, [FORMAT])
    params = by_name(model)
    coded = outgoing(params, config.execution.stored, parts, family.TIED, PIECE)
  if not all(x.is_fully_addressable for x in leaves.values()):
    raise ValueError(
      'some shards of this model lie on devices of other processes; export in one process'
    )

  mapped = {share.leaf for shares in parts.values() for share in shares}
  if unmapped := by_name(model).keys() - mapped:
    raise RuntimeError(f'the name map of {family.__name__} has no place for {sorted(unmapped)}')

  def kind(name):
    # Steps move it by less than what bfloat16 tells apart (model.moe).
    wide = all(share.leaf.endswith('.selection_bias') for share in parts[name])
    return 'F32' if wide else KINDS[dtype]

  def produce(name):
    if coded and name in coded.tensors:
      yield from coded.tensors[name].pieces()
      return
    first = parts[name][0].layout
    for start, stop in first.chunks(PIECE):
      low, high = first.rows(start, stop)
      rows = np.empty((high - low, *first.shape[1:]), DTYPES[kind(name)])
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
    made = coded.tensors if coded else {}
    instead = coded.instead if coded else ()
    shapes = {name: of[0].layout.shape for name, of in parts.items() if name not in instead}
    write(
      directory,
      shapes | {name: tensor.shape for name, tensor in made.items()},
      {name: kind(name) for name in shapes} | {name: tensor.kind for name, tensor in made.items()},
      produce,
      shard_bytes,
    )
  hf = family.to_hf(config) | {'torch_dtype': dtype}
  hf |= _special_ids(special, hf) | ({KEY: coded.settings} if coded else {})
  files.replace(directory / 'config.json', json.dumps(hf, indent=2) + '\n')


def _special_ids(special: dict, hf: dict) -> dict:
  """Ids for a config.json. A decoder that is told what to begin with begins with padding, as
  decode.generator does.
  """
  ids = {f'{name}_token_id': special.get(name) for name in ('bos', 'eos', 'pad')}
  if 'decoder_start_token_id' in hf and ids['pad_token_id'] is not None:
    ids['decoder_start_token_id'] = ids['pad_token_id']
  return ids


def check(
  parts: dict[str, list[TensorShare]],
  called: dict[str, str],
  tensors: Tensors,
  family,
  ignore: str = '',
) -> dict[str, str]:
  """Tensors of the file that repeat others, by those.

  Raises ValueError that lists all that does not fit.

  Args:
    called: name of a tensor -> in the files.
    ignore: a pattern of tensors in the files that may be left out.
  """
  have, used, tied, wrong = tensors.tensors, {*called.values()}, {}, []
  if ignore and not any(re.fullmatch(ignore, name) for name in have):
    raise ValueError(
      f'--ignore={ignore} matches no tensor in {tensors.directory}; it has to match a whole name'
    )
  for name, stored in called.items():
    if stored not in have:
      wrong.append(f'missing: {stored}')
      continue
    tensor, shape = have[stored], parts[name][0].layout.shape
    if tensor.shape != shape:
      wrong.append(
        f'mis-shaped: {stored} is {list(tensor.shape)}, config.json makes it {list(shape)}'
      )
    if tensor.kind not in DTYPES:
      wrong.append(
        f'of an unsupported dtype: {stored} is {tensor.kind}; supported: {", ".join(DTYPES)}'
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


def resolve(parts, tensors, family) -> dict[str, str]:
  """Tensor -> what it is called in this checkpoint, whose names may have another prefix."""
  spellings = [{name: name for name in parts}]
  for ours, others in getattr(family, 'PREFIXES', {}).items():
    spellings += [
      {name: other + name.removeprefix(ours) if name.startswith(ours) else name for name in parts}
      for other in others
    ]
  called = max(spellings, key=lambda each: sum(name in tensors.tensors for name in each.values()))
  for new, old in getattr(family, 'FORMERLY', {}).items():
    for name, stored in called.items():
      before = stored.removesuffix(new) + old
      if stored.endswith(new) and stored not in tensors.tensors and before in tensors.tensors:
        called[name] = before
  return called


def _check_equal(tensors: Tensors, name: str, other: str) -> None:
  rows = tensors.tensors[name].shape[0]
  step = max(1, PIECE * rows // max(1, math.prod(tensors.tensors[name].shape)))
  for start in range(0, rows, step):
    if not np.array_equal(
      tensors.read(name, start, min(start + step, rows)),
      tensors.read(other, start, min(start + step, rows)),
    ):
      raise ValueError(
        f'{name} differs from {other}, to which config.json ties it; set tie_word_embeddings to '
        f'false there, or leave it out with --ignore={re.escape(name)}'
      )


def stored_dtype(tensors: Tensors, log, apart: set[str] = frozenset()) -> str:
  """The dtype to keep a checkpoint's parameters in: bfloat16 where most of it is, else float32.

  apart: tensors that do not count, as they stay in codes.
  """
  bits = {}
  for name, tensor in tensors.tensors.items():
    if name in apart:
      continue
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
      f'NOTE: {wider:,} parameters have more digits than {dtype} keeps; --dtype=float32 keeps what '
      'it can'
    )
  elif most == 'F16':
    log('NOTE: float16 parameters become float32, which holds them exactly')
  return dtype


def default_mesh(config: ModelConfig) -> Mesh:
  """All devices, parameters split over as many as divide the width, and as groups of codes split
  over.
  """
  shards = math.gcd(jax.device_count(), config.D)
  while config.execution.stored and shards > 1 and not _splits(config, shards):
    shards //= 2
  return make_mesh(MeshConfig(fsdp=shards))


def _splits(config: ModelConfig, shards: int) -> bool:
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=shards))):
    try:
      jax.eval_shape(functools.partial(transformer.init, config, 0))
    except ValueError:
      return False
  return True


def opened(path: str | os.PathLike) -> Opened:
  """A checkpoint: a directory of transformers', or a GGUF file.

  Raises OSError, ValueError or NotImplementedError for what cannot be read.
  """
  path = pathlib.Path(path)
  if path.is_file():
    tensors = GGUFTensors(GGUF(path))
    return Opened(tensors.config, tensors)
  hf, tensors = read_json(path), TensorFiles(path)
  if hf.get(KEY) is None:
    return Opened(hf, tensors)
  plain = {name: value for name, value in hf.items() if name != KEY}
  return Opened(plain, QuantisedTensors(tensors, hf[KEY]))


def read_json(directory: pathlib.Path) -> dict:
  path = directory / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(f'{path} does not exist: {directory} is no checkpoint of transformers')
  return files.json_object(path.read_bytes(), path)


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A directory beside the named one, which takes its name at the end; after an error nothing
  stays. In a bucket, which knows no renaming: the named one, where a run's record comes last.
  """
  directory = files.place(directory).absolute()
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise FileExistsError(
      f'{directory} is there already, and not empty; name another, or remove it'
    )
  if files.remote(directory):
    with _emptied_after_errors(directory):
      yield directory
    return
  partial = directory.with_name(f'.{directory.name}.partial')
  lock = directory.with_name(f'.{directory.name}.lock')
  with files.locked(lock, str(directory), 'wait until it ends, or name another directory'):
    if partial.exists():  # left by a process that was killed
      shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
      yield partial
      os.replace(partial, directory)
    except BaseException:
      shutil.rmtree(partial)
      raise


@contextlib.contextmanager
def _emptied_after_errors(directory) -> Iterator[None]:
  with files.locked(directory / 'lock', str(directory), 'wait until it ends, or name another'):
    try:
      yield
    except BaseException:
      files.remove(directory)
      raise


if __name__ == '__main__':
  sys.exit(
    'python -m model.checkpoint is now python convert.py, with the same import, export and inspect'
  )
