"""How do an adapter and a directory of PEFT's become each other? adapter_config.json and
adapter_model.safetensors, of LoRA and DoRA on the linear layers of a causal model, and of soft
tokens (model/peft_soft.py).

There an update is B A with A [Z, inputs] and B [outputs, Z], under the names of transformers'
modules; here it is A B with the dimensions of our matrix. What decides about the arithmetic is
read, or refused by its name; what a directory says of its base is neither trusted nor fetched.

Z rank
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

import files
from model import peft_soft
from model.adaptation import AdapterConfig
from model.config import ModelConfig
from model.families.layout import Layout, sizes
from model.tensorfiles import TensorFiles, write as write_tensors

SETTINGS, TENSORS, PICKLE = 'adapter_config.json', 'adapter_model.safetensors', 'adapter_model.bin'
PREFIX = 'base_model.model.'
READ = {
  'peft_type',
  'r',
  'lora_alpha',
  'lora_dropout',
  'use_rslora',
  'use_dora',
  'target_modules',
}
# Of a base, of training, of who wrote it: nothing of these changes what the tensors mean.
INDIFFERENT = {
  'auto_mapping',
  'base_model_name_or_path',
  'ensure_weight_tying',
  'exclude_modules',
  'fan_in_fan_out',
  'inference_mode',
  'megatron_core',
  'peft_version',
  'qalora_group_size',
  'revision',
  'runtime_config',
  'task_type',
}
# What a key may say that changes nothing: anything else is refused by its name.
NEUTRAL = {'bias': ('none',), 'init_lora_weights': (True, False, 'gaussian')}
LEFT_OUT = (None, False, [], {}, '')


class _Place(NamedTuple):
  """Where the parts of one layer of a matrix lie there.

  Attributes:
    leaf, index: of the matrix here, and of the layer in its stack (None: it is not stacked).
    module: its name in transformers. inputs, outputs: permutations from our dimensions of each side
      to theirs, and the lengths there.
    swapped: whether their matrix is [inputs, outputs], as GPT-2's are.
  """

  leaf: str
  index: int | None
  module: str
  inputs: tuple[tuple[int, ...], tuple[int, ...]]
  outputs: tuple[tuple[int, ...], tuple[int, ...]]
  swapped: bool


def write(
  directory: pathlib.Path,
  adapter: Mapping[str, Mapping[str, np.ndarray]],
  config: AdapterConfig,
  network: ModelConfig,
  family,
) -> None:
  """Writes an adapter, {leaf: {'a': .., 'b': .., ('magnitude': ..)}} as arrays, of a model of this
  config and family.

  Raises NotImplementedError for matrices that PEFT has no module of their own for.
  """
  if config.soft:
    tensors, settings = peft_soft.written(adapter, config, network)
  else:
    tensors, settings = _low_rank(adapter, config, network, family)
  shapes = {name: x.shape for name, x in sorted(tensors.items())}
  write_tensors(directory, shapes, 'F32', lambda name: [tensors[name]], 2**62, TENSORS)
  files.replace(directory / SETTINGS, json.dumps(settings, indent=2) + '\n')


def _low_rank(adapter, config, network, family) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The tensors and settings of an update of matrices."""
  tensors, swapped = {}, set()
  places = list(_places(network, family, adapter))
  for place in places:
    parts = {
      name: x if place.index is None else x[place.index]
      for name, x in _parts(adapter, place, network.V)
    }
    rank = config.rank
    a = np.moveaxis(parts['a'], -1, 0).transpose(0, *(1 + i for i in place.inputs[0]))
    b = np.moveaxis(parts['b'], 0, -1).transpose(*place.outputs[0], -1)
    at = f'{PREFIX}{place.module}'
    tensors[f'{at}.lora_A.weight'] = a.reshape(rank, -1)
    tensors[f'{at}.lora_B.weight'] = b.reshape(-1, rank)
    if 'magnitude' in parts:
      lengths = parts['magnitude'].transpose(place.outputs[0])
      tensors[f'{at}.lora_magnitude_vector'] = lengths.reshape(-1)
    swapped.add(place.swapped)
  if len(swapped) > 1:
    raise NotImplementedError('PEFT has one fan_in_fan_out for all modules, and these are of both')
  settings = {
    'peft_type': 'LORA',
    'task_type': peft_soft.task_of(network),
    'base_model_name_or_path': None,
    'r': config.rank,
    'lora_alpha': config.alpha,
    'lora_dropout': config.dropout,
    'use_rslora': config.stabilised,
    'use_dora': config.kind == 'dora',
    'fan_in_fan_out': True in swapped,
    'bias': 'none',
    'inference_mode': True,
    'target_modules': _targets([place.module for place in places], network, family),
  }
  return tensors, settings


def _parts(adapter, place: _Place, vocabulary: int):
  """a, b and the lengths of a place, sides as matrices have them; a table's rows are outputs, and
  those that are no ids stay here.
  """
  parts = adapter[place.leaf]
  if place.leaf != 'head.tokens':
    return parts.items()
  rows = parts['a'][..., :vocabulary, :]
  return {'a': np.swapaxes(parts['b'], -1, -2), 'b': np.swapaxes(rows, -1, -2)}.items()


def _targets(modules: list[str], network: ModelConfig, family) -> list[str]:
  """Short names where all modules that they match are meant, else whole ones."""
  known = {
    source.name.removesuffix('.weight').format(layer=layer, expert=0)
    for source in family.tensors(network).values()
    for layer in source.layers or (0,)
  }
  chosen = []
  for module in modules:
    short = module.rpartition('.')[2]
    matching = {name for name in known if name == short or name.endswith(f'.{short}')}
    chosen.append(short if matching <= {*modules} else module)
  return [*dict.fromkeys(chosen)]


def read(
  directory: pathlib.Path, network: ModelConfig, family
) -> tuple[AdapterConfig, dict[str, dict[str, np.ndarray]]]:
  """The settings and arrays of an adapter of a model of this config and family, as `write` takes
  them.

  Raises FileNotFoundError where a file is missing, ValueError for settings that would change the
    arithmetic and are not known, and with one list of all tensors that do not fit.
  """
  if not (directory / TENSORS).is_file() and (directory / PICKLE).is_file():
    raise ValueError(
      f'{directory / PICKLE} is a pickle, which runs code when it is read; save the adapter anew '
      'as safetensors (PEFT does since 0.6)'
    )
  given = _given(directory / SETTINGS)
  kind = given.get('peft_type')
  if isinstance(kind, str) and kind in peft_soft.KINDS:
    soft = TensorFiles(directory, TENSORS)
    return peft_soft.read(given, soft, network, directory / SETTINGS)
  config = _settings(given, directory / SETTINGS)
  tensors = TensorFiles(directory, TENSORS)
  wanted = {place.module: place for place in _places(network, family)}
  found: dict[str, dict[str, np.ndarray]] = {}
  wrong, used = [], set()
  parts = {'lora_A.weight': 'a', 'lora_B.weight': 'b'}
  if config.kind == 'dora':
    parts['lora_magnitude_vector'] = 'magnitude'
  for name in tensors.tensors:
    module, _, _ = name.removeprefix(PREFIX).partition('.lora_')
    part = parts.get(name.removeprefix(f'{PREFIX}{module}.'))
    place = wanted.get(module)
    if part is None or place is None or not name.startswith(PREFIX):
      wrong.append(f'{name}: not a part of a matrix of this model')
      continue
    shape = _shape(place, part, config.rank)
    if tensors.tensors[name].shape != shape:
      wrong.append(f'{name}: {list(tensors.tensors[name].shape)}, must be {list(shape)}')
      continue
    rows = tensors.read(name, 0, shape[0]).astype(np.float32)
    found.setdefault(place.leaf, {}).setdefault(part, {})[place.index] = _brought(place, part, rows)
    used.add((module, part))
  leaves = {leaf: [place for place in wanted.values() if place.leaf == leaf] for leaf in found}
  for leaf, places in leaves.items():
    for place in places:
      wrong += [
        f'{PREFIX}{place.module}: {name} is missing'
        for name, part in parts.items()
        if (place.module, part) not in used
      ]
  if not found or wrong:
    raise ValueError(
      f'{directory / TENSORS} is no adapter of this model:\n  '
      + '\n  '.join(wrong or ['no tensors'])
    )
  arrays = {}
  for leaf, by_part in found.items():
    stacked = {
      part: by_index[None]
      if None in by_index
      else np.stack([by_index[i] for i in sorted(by_index)])
      for part, by_index in by_part.items()
    }
    if leaf == 'head.tokens':
      rows = np.swapaxes(stacked['b'], -1, -2)
      unused = [(0, 0)] * (rows.ndim - 2) + [(0, network.table_rows - network.V), (0, 0)]
      stacked = {'a': np.pad(rows, unused), 'b': np.swapaxes(stacked['a'], -1, -2)}
    arrays[leaf] = stacked
  fields = {'targets': tuple(sorted(arrays))}
  return AdapterConfig(**{**_fields(config), **fields}), arrays


def _fields(config: AdapterConfig) -> dict[str, Any]:
  fields = 'kind', 'rank', 'alpha', 'stabilised', 'dropout'
  return {name: getattr(config, name) for name in fields}


def _given(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist: {path.parent} is no adapter of PEFT's")
  return files.json_object(path.read_bytes(), path)


def _settings(given: Mapping[str, Any], path: pathlib.Path) -> AdapterConfig:
  if given.get('peft_type') != 'LORA':
    known = ', '.join(map(repr, ('LORA', *peft_soft.KINDS)))
    raise NotImplementedError(f'{path}: peft_type={given.get("peft_type")!r}; supported: {known}')
  for key, value in given.items():
    if key in READ | INDIFFERENT or value in NEUTRAL.get(key, LEFT_OUT):
      continue
    raise NotImplementedError(
      f'{path}: {key}={value!r} changes what the adapter computes, and is not supported; merge it '
      'into its model with PEFT, and import that'
    )
  rank, alpha = given.get('r'), given.get('lora_alpha')
  if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
    raise ValueError(f'{path}: r={rank!r} and lora_alpha={alpha!r} must be numbers')
  dropout = given.get('lora_dropout') or 0.0
  if not isinstance(dropout, (int, float)):
    raise ValueError(f'{path}: lora_dropout={dropout!r} must be a number')
  return AdapterConfig(
    kind='dora' if given.get('use_dora') else 'lora',
    rank=rank,
    alpha=float(alpha),
    stabilised=bool(given.get('use_rslora')),
    dropout=float(dropout),
  )


def _places(network: ModelConfig, family, adapter: Mapping | None = None) -> Iterator[_Place]:
  """The places of an adapter's matrices, or of all that could be adapted."""
  lengths = sizes(network)
  for leaf, source in family.tensors(network).items():
    if adapter is not None and leaf not in adapter:
      continue
    layout = Layout.of(source, lengths)
    alone = len(layout.groups) == 2 and not layout.take and '{expert}' not in source.name
    table = leaf.endswith('.tokens')
    if not alone or leaf == 'embedding.tokens' or not source.name.endswith('.weight'):
      if adapter is None:
        continue
      raise NotImplementedError(
        f'{leaf} is no linear module of its own in transformers ({source.name}), as PEFT adapts '
        'them; merge the adapter (convert.py merge), and export that'
      )
    # Their two dimensions are our inputs and our outputs, one or several of ours each.
    first, last = layout.groups
    ours = layout.here
    swapped = not table and ours[: len(first)] and {*ours[: len(first)]} == {*first}
    inputs, outputs = (first, last) if swapped else (last, first)
    sides = []
    for group, names in ((inputs, ours), (outputs, ours)):
      here = [name for name in names if name in group]
      order = tuple(here.index(name) for name in group)
      sides.append((order, tuple(lengths[name] for name in group)))
    for i, layer in enumerate(source.layers) if source.layers else ((None, None),):
      module = source.name.removesuffix('.weight').format(layer=layer)
      yield _Place(leaf, i, module, *sides, bool(swapped))


def _shape(place: _Place, part: str, rank: int) -> tuple[int, ...]:
  outputs, inputs = (int(np.prod(side[1])) for side in (place.outputs, place.inputs))
  return {'a': (rank, inputs), 'b': (outputs, rank), 'magnitude': (outputs,)}[part]


def _brought(place: _Place, part: str, x: np.ndarray) -> np.ndarray:
  """A tensor there as the part here: A [inputs, Z], B [Z, outputs], lengths [outputs]."""
  order, lengths = place.inputs if part == 'a' else place.outputs
  back = np.argsort(order)
  if part == 'a':
    return np.moveaxis(x.reshape(-1, *lengths), 0, -1).transpose(*back, len(order))
  if part == 'b':
    return np.moveaxis(x.reshape(*lengths, -1).transpose(*back, len(order)), -1, 0)
  return x.reshape(lengths).transpose(back)
