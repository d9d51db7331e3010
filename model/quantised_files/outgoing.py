"""How does a model in codes go out as compressed-tensors, code for code?

Scales stay f32, so that a reader has the same numbers. A matrix is written as its scheme has it:
int4, and int8 in groups, packed in int32; int8 and fp8 of an output, a matrix or squares in bytes.
Of :activations a reader is told to round tokens, each by a scale of its own, as they come.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.families.layout import Layout
from model.quantised_files.coded import blocked, packed
from model.stream import Region, fetch
from model.weights import Weight, read
from model.weights.activated import Activated
from model.weights.grids import GRIDS, unpacked
from model.weights.int8 import Int8
from model.weights.scheme import Scheme, parsed, rule_of

FORMAT = 'compressed-tensors'
BITS = {'int4': 4, 'int8': 8, 'fp8': 8}


@dataclasses.dataclass(frozen=True)
class ToWrite:
  """One to be written: its shape, kind, and what gives its entries in pieces, in order."""

  shape: tuple[int, ...]
  kind: str
  pieces: Callable[[], Iterator[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Outgoing:
  """Attributes:
  tensors: name -> ToWrite. instead: names in transformers that those are in the place of.
  settings: the quantization_config.
  """

  tensors: dict[str, ToWrite]
  instead: frozenset[str]
  settings: dict


def outgoing(
  params: dict[str, nnx.Param], stored: Sequence[str], parts, tied: dict[str, str], limit: int
) -> Outgoing:
  """What a model's codes are as compressed-tensors.

  Args:
    params: by name. stored: of model.execution. parts: tensor -> its shares of parameters.
    tied: of the family. limit: entries of a piece.
  Raises ValueError for codes that it has no form of, naming the tensor and a remedy.
  """
  rules, tensors, instead, plain = parsed(stored), {}, set(), []
  groups = collections.defaultdict(list)
  for name, shares in parts.items():
    module, linear, rest = name.rpartition('.weight')
    in_codes = {read(params[share.leaf]).coded for share in shares}
    if in_codes == {False}:
      matrix = linear and not rest and params[shares[0].leaf].kind != 'vector'
      if matrix and not shares[0].leaf.startswith('embedding.'):
        plain.append(module)
      continue
    if in_codes != {True} or not linear or rest or len(shares[0].layout.shape) != 2:
      raise _refused(name, 'is no matrix of a linear layer that lies in codes as a whole')
    if any(_inputs_first(share) for share in shares):
      raise _refused(name, 'has its inputs first: no linear layer in transformers, but a Conv1D')
    schemes = {rule_of(share.leaf, params[share.leaf], rules)[1] for share in shares}
    if len(schemes) > 1:
      raise _refused(name, 'is of parts in several schemes')
    weights = [(share, _below(read(params[share.leaf]))) for share in shares]
    matrix = _Matrix(name, weights, schemes.pop(), limit)
    groups[matrix.format, tuple(matrix.settings.items()), matrix.tokens].append(module)
    instead.add(name)
    tensors |= matrix.tensors(module)
  if not groups:
    raise ValueError(
      f'--format={FORMAT}: no matrix of the run lies in codes; quantise it first (convert.py '
      'quantise), or leave the option out'
    )
  plain += [name.removesuffix('.weight') for name in tied if name not in parts]
  return Outgoing(tensors, frozenset(instead), _settings(groups, plain))


def _below(weight: Weight) -> Weight:
  """Its codes, where tokens become codes, too."""
  return weight.base if isinstance(weight, Activated) else weight


def _settings(groups: dict, plain: list[str]) -> dict:
  """quantization_config. groups: (format, settings of weights, whether tokens are rounded) ->
  modules.
  """
  single, every = len(groups) == 1, {*plain}.union(*groups.values())
  made = {}
  for i, ((form, weights, tokens), modules) in enumerate(groups.items()):
    activations = None
    if tokens:
      kind = {'num_bits': 8, 'type': dict(weights)['type'], 'symmetric': True}
      activations = kind | {'strategy': 'token', 'dynamic': True}
    made[f'group_{i}'] = {
      'targets': ['Linear'] if single else _targets(modules, every - {*modules}),
      'weights': dict(weights),
      'input_activations': activations,
      'output_activations': None,
      'format': form,
    }
  return {
    'quant_method': FORMAT,
    'format': next(iter(groups))[0] if single else 'mixed-precision',
    'quantization_status': 'compressed',
    'config_groups': made,
    'ignore': plain,
    'kv_cache_scheme': None,
  }


def _inputs_first(share) -> bool:
  """Whether a matrix lies as GPT-2's do; tables have one order everywhere."""
  first, ours = share.layout.groups[0], share.layout.here
  return not share.leaf.endswith('.tokens') and {*ours[: len(first)]} == {*first}


def _targets(modules: list[str], others: set[str]) -> list[str]:
  """Of modules that differ in numbers only, a pattern, where it matches none of the others; else
  their names.
  """
  alike = collections.defaultdict(list)
  for module in modules:
    alike[re.sub(r'\d+', r'\\d+', re.escape(module))].append(module)
  targets = []
  for pattern, same in sorted(alike.items()):
    whole = re.compile(f'{pattern}$')
    # Layers may differ in their schemes, and then numbers tell them apart.
    apart = any(whole.match(other) for other in others)
    targets += sorted(same) if apart else [f're:^{pattern}$']
  return targets


class _Matrix:
  """A tensor whose shares lie in codes of one scheme."""

  def __init__(self, name: str, shares, scheme: Scheme, limit: int):
    """shares: (share, weight) of each. limit: entries of a piece."""
    self.name, self.shares, self.limit, self.grid = name, shares, limit, scheme.grid
    self.shape = shares[0][0].layout.shape
    if scheme.grid not in BITS or scheme.sparse or scheme.double:
      raise _refused(name, f'lies in {scheme}, of which it has no form that is written')
    self.zeros, self.bits = not scheme.symmetric, BITS[scheme.grid]
    self.tokens = scheme.activations
    kind = {'num_bits': self.bits, 'type': 'float' if scheme.grid == 'fp8' else 'int'}
    self.settings = kind | {'symmetric': scheme.symmetric, 'dynamic': False}
    if scheme.tensor:
      self.blocks, strategy = self.shape, {'strategy': 'tensor'}
    elif scheme.block:
      self.blocks = (scheme.block, scheme.block)
      strategy = {'strategy': 'block', 'block_structure': self.blocks}
    elif scheme.group in (0, self.shape[1]):
      self.blocks, strategy = (1, self.shape[1]), {'strategy': 'channel'}
    else:
      self.blocks = (1, scheme.group)
      strategy = {'strategy': 'group', 'group_size': scheme.group}
    self.settings |= strategy
    grouped = 'group_size' in strategy
    self.packed = scheme.grid == 'int4' or (scheme.grid == 'int8' and grouped)
    floats = 'float-quantized' if scheme.grid == 'fp8' else 'int-quantized'
    self.format = 'pack-quantized' if self.packed else floats

  def tensors(self, module: str) -> dict[str, ToWrite]:
    counts = blocked(self.shape, self.blocks)
    if self.packed:
      words = (self.shape[0], -(-self.shape[1] * self.bits // 32))
      made = {
        f'{module}.weight_packed': ToWrite(words, 'I32', self._words),
        f'{module}.weight_shape': ToWrite((2,), 'I64', lambda: iter([np.int64(self.shape)])),
      }
    else:
      kind = 'F8_E4M3' if self.grid == 'fp8' else 'I8'
      made = {f'{module}.weight': ToWrite(self.shape, kind, lambda: self._rows('codes'))}
    flat = counts if counts != (1, 1) else (1,)
    made[f'{module}.weight_scale'] = ToWrite(flat, 'F32', lambda: self._table('scale'))
    if self.zeros and self.packed:
      words = (-(-counts[0] * self.bits // 32), counts[1])
      made[f'{module}.weight_zero_point'] = ToWrite(words, 'I32', self._zero_words)
    elif self.zeros:
      made[f'{module}.weight_zero_point'] = ToWrite(flat, 'I8', self._zeros)
    return made

  def _words(self):
    for rows in self._rows('codes'):
      yield packed((rows.astype(np.int16) + 2 ** (self.bits - 1)).astype(np.uint8), self.bits)

  def _zeros(self):
    low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
    for rows in self._table('zero'):
      if (rows != np.rint(rows)).any() or rows.min() < low or rows.max() > high:
        raise _refused(self.name, f'has zero points that are no whole numbers from {low} to {high}')
      yield rows.astype(np.int8)

  def _zero_words(self):
    whole = np.concatenate([*self._zeros()])
    yield packed((whole.astype(np.int16).T + 2 ** (self.bits - 1)).astype(np.uint8), self.bits).T

  def _table(self, field: str):
    """One number for each block, rows of blocks."""
    for rows in self._rows(field):
      first = rows[:: self.blocks[0], :: self.blocks[1]]
      wide = np.repeat(np.repeat(first, self.blocks[0], 0), self.blocks[1], 1)
      if (wide[: rows.shape[0], : rows.shape[1]] != rows).any():
        raise _refused(self.name, f'has scales that blocks of {list(self.blocks)} do not share')
      yield first

  def _rows(self, field: str):
    """Codes, or what a field has for each of them, in the tensor's order, pieces of rows."""
    layout = self.shares[0][0].layout
    inner = layout.shape[0] // layout.lengths[0][1]
    steps = [self.blocks[0] // math.gcd(self.blocks[0], inner)]
    steps += [_step(share.layout, weight) for share, weight in self.shares]
    for start, stop in layout.chunks(self.limit, math.lcm(*steps)):
      low, high = layout.rows(start, stop)
      dtype = np.float32
      if field == 'codes':
        dtype = np.dtype(jnp.float8_e4m3fn) if self.grid == 'fp8' else np.int8
      rows = np.empty((high - low, *layout.shape[1:]), dtype)
      for share, weight in self.shares:
        region = share.region(start, stop)
        shape = [b - a for a, b in share.layout.region(start, stop)]
        share.layout.send(_brought(weight, field, region).reshape(shape), rows)
      yield rows


def _brought(weight: Weight, field: str, region: Region) -> np.ndarray:
  """Codes in a region of a weight, or what a field has for each of them."""
  blocks = _blocks(weight)
  if field == 'codes' and isinstance(weight, Int8):
    return fetch(weight.values, region)
  if field == 'codes':
    halved = [1] * len(blocks)
    if GRIDS[weight.grid].packed:
      halved[weight.packs] = 2
    codes = fetch(weight.codes, _divided(region, halved))
    if not GRIDS[weight.grid].packed:
      return codes
    size = blocks[weight.packs]
    return np.asarray(unpacked(jnp.asarray(codes), weight.packs, size, weight.grid == 'int4'))
  x = fetch(getattr(weight, field), _divided(region, blocks))
  for axis, ((start, stop), block) in enumerate(zip(region, blocks, strict=True)):
    if block > 1:
      x = x.take(np.arange(start, stop) // block - start // block, axis)
  return x


def _blocks(weight: Weight) -> tuple[int, ...]:
  """How many numbers share a scale in each dimension, that of layers too."""
  rank = len(weight.shape)
  if isinstance(weight, Int8):
    sizes = enumerate(weight.shape)
    return tuple(size if n - rank in weight.summed else 1 for n, size in sizes)
  return (1,) * (rank - len(weight.blocks)) + weight.blocks


def _divided(region: Region, sizes) -> Region:
  return tuple(
    (start // size, -(-stop // size)) for (start, stop), size in zip(region, sizes, strict=True)
  )


def _step(layout: Layout, weight: Weight) -> int:
  """Of what the first name of a tensor is read in multiples."""
  blocks = _blocks(weight)
  names = zip(layout.here, blocks[len(blocks) - len(layout.here) :], strict=True)
  return math.lcm(*(block for name, block in names if name == layout.lengths[0][0]))


def _refused(name: str, what: str) -> ValueError:
  return ValueError(
    f'--format={FORMAT}: {name} {what}; leave the option out, which writes numbers, or quantise '
    'otherwise: int8, int8:group=N, int4:group=N, fp8, fp8:tensor, fp8:block=N'
  )
