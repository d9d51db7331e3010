"""Which matrices of a model are stored how? Schemes, and the patterns that say where each holds.

  int8              bytes, a scale for each output (model.weights.int8)
  int8:group=128    bytes in groups along what is summed over; :asymmetric with a zero point each
  int4:group=64     4 bits, the same
  nf4:group=64      16 quantiles of a normal law
  nf4:group=64:double   its scales in 8 bits; of each scheme with groups or squares
  fp8               float8_e4m3fn, a scale for each output; fp8:tensor one for all of a matrix;
                    fp8:block=128 one for each square
  2:4               2 numbers of every 4 along what is summed over, the largest, and where they
                    stood (model.weights.sparse); 2:4+int8, 2:4+int4:group=64: those by a scheme
  mxfp4:group=32    floats of 4 bits, scales that are powers of two
  int8:activations  products of bytes by bytes: tokens have a scale each, as they come; fp8 likewise
  keep              as it is

`model.execution.stored` has entries such as '*.experts.*=int4:group=32' and '*=int8'; the first one
whose pattern matches a parameter's name holds. '*' matches dots, too. Experts' matrices, which have
the names of a dense layer's, are also matched as stack.blocks.0.feed_forward.experts.up. Routers,
norms and biases stay as they are, and so do head and tables unless a pattern begins with `head`.
"""

import dataclasses
import fnmatch
import functools
import math
import re
from collections.abc import Callable, Sequence

import jax
from flax import nnx

import names
from model.config import ModelConfig
from model.params import is_param, name_of
from model.weights import int8, read
from model.weights.activated import Activated
from model.weights.codes import Codes, blocks_of
from model.weights.doubled import Doubled
from model.weights.grids import GRIDS
from model.weights.plain import Plain
from model.weights.sparse import MOST, Sparse
from model.weights.weight import Weight
from parallel import axes as ax

GROUP = 128  # of 4 bits, where nobody says another
OPTIONS = {
  'tensor': {'tensor': True, 'group': 0},
  'asymmetric': {'symmetric': False},
  'double': {'double': True},
  'activations': {'activations': True},
}
MX_GROUP = 32  # of mxfp4


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How a matrix is stored.

  Attributes:
    grid: of model.weights.grids, or 'keep'.
    group: numbers along what is summed over that share a scale; 0: all of an output.
    block: size of a square that shares one; 0: none. tensor: whether all of a matrix does.
    symmetric: whether 0 is the middle of the codes. double: whether scales are in codes, too.
    sparse: (N, M) where N numbers of every M are there, and lie as the rest says; (): all are.
    activations: whether tokens become codes, too, before a product (model.weights.activated).

  Raises ValueError for what does not go together.
  """

  grid: str
  group: int = 0
  block: int = 0
  tensor: bool = False
  symmetric: bool = True
  double: bool = False
  sparse: tuple[int, ...] = ()
  activations: bool = False

  def __post_init__(self):
    names.check('a scheme', self.grid, [*GRIDS, 'keep', 'N:M'])
    if self.sparse and not 0 < self.sparse[0] < self.sparse[1] <= MOST:
      raise ValueError(
        f'{self.sparse[0]}:{self.sparse[1]} keeps fewer numbers of each group than its size, at '
        f'most {MOST}, and at least one; use 2:4'
      )
    if min(self.group, self.block) < 0 or bool(self.group) + bool(self.block) + self.tensor > 1:
      raise ValueError(
        f'a scheme of group={self.group}, block={self.block}, tensor={self.tensor}: one of them '
        'says which numbers share a scale, and sizes are at least 1'
      )
    size = self.group or self.block
    if self.grid in GRIDS and GRIDS[self.grid].packed and (size < 2 or size % 2):
      raise ValueError(
        f'{self.grid}: two codes share a byte, in groups of an even size; use {self.grid}:group=64'
      )
    scaled_once = 'fp8' if self.tensor else ('int8', 'fp8')
    plain = self.grid in scaled_once and self.symmetric and not size
    if self.activations and not plain:
      raise ValueError(
        f'{self.grid}:activations with group={self.group}, block={self.block}, tensor='
        f'{self.tensor}, symmetric={self.symmetric}: a product of codes is scaled once; use '
        'int8:activations or fp8:activations'
      )
    if self.activations and self.sparse:
      n, m = self.sparse
      raise ValueError(
        f'{n}:{m}+{self.grid}:activations: what is kept of a group is not multiplied as codes; use '
        f'{n}:{m}+{self.grid}'
      )
    if not self.symmetric and self.grid not in ('int8', 'int4'):
      raise ValueError(
        f'{self.grid}:asymmetric: only int8 and int4 have a zero point; leave it out'
      )

    if self.double and self.grid == 'mxfp4':
      raise ValueError(
        'mxfp4:double: its scales are powers of two, which codes of scales are not; leave :double '
        'out, or use nf4:group=32:double'
      )
    if self.double and not size:
      raise ValueError(
        f'{self.grid}:double: scales of groups are many enough to be in codes; use '
        f'{self.grid}:group=64:double, or leave it out'
      )

  @classmethod
  def parse(cls, text: str) -> 'Scheme':
    """Of a text such as 'int4:group=64:asymmetric' or '2:4'. Raises ValueError for another."""
    if pattern := re.fullmatch(r'(\d+):(\d+)(?:\+(.+))?', text):
      rest = cls.parse(pattern[3] or 'keep')
      if rest.sparse:
        raise ValueError(f'the scheme {text!r} says twice what is kept; use one, as in 2:4+int8')
      return dataclasses.replace(rest, sparse=(int(pattern[1]), int(pattern[2])))
    grid, *options = text.split(':')
    size = MX_GROUP if grid == 'mxfp4' else GROUP
    values = {'group': size} if grid in GRIDS and GRIDS[grid].packed else {}
    for option in options:
      name, equals, value = option.partition('=')
      if name in ('group', 'block') and value.isdecimal():
        values |= {'group': 0, name: int(value)}
      elif option in OPTIONS:
        values |= OPTIONS[option]
      else:
        known = f'group=N, block=N, {", ".join(OPTIONS)}'
        raise ValueError(f'the scheme {text!r}: {option!r} is none of {known}')
    return cls(grid, **values)

  def __str__(self) -> str:
    """What `parse` reads."""
    kept = f'{self.sparse[0]}:{self.sparse[1]}' if self.sparse else ''
    if kept and self.grid == 'keep':
      return kept
    sizes = [f'{name}={size}' for name in ('group', 'block') if (size := getattr(self, name))]
    flags = [
      name for name, of in OPTIONS.items() if all(getattr(self, key) == of[key] for key in of)
    ]
    rest = ':'.join([self.grid, *sizes, *flags])
    return f'{kept}+{rest}' if kept else rest

  def blocks(self, shape: tuple[int, ...], summed: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Sizes of blocks of a matrix; shape: without stacked layers, and of an expert.

    Raises ValueError where they do not fill it.
    """
    if self.tensor:
      return shape
    if not self.block:
      return blocks_of(shape, summed, self.group, name)
    # A square of the matrix as it multiplies: [all that is summed over, all that is not].
    others = tuple(n for n in range(-len(shape), 0) if n not in summed)
    blocks = [1] * len(shape)
    for dimensions in (summed, others):
      size = min(self.block, math.prod(shape[n] for n in dimensions))
      for n, block in zip(range(-len(shape), 0), blocks_of(shape, dimensions, size, name)):
        blocks[n] *= block
    return tuple(blocks)

  def of(
    self,
    x: jax.Array,
    summed: tuple[int, ...],
    axes: tuple[str | None, ...],
    name: str = '',
    shrink: jax.Array | float = 1.0,
  ) -> Weight:
    """The nearest numbers on the grid, of a matrix [.., outputs and inputs].

    summed: which dimensions a product sums over, counted from the last. shrink: see Codes.of.
    Raises ValueError where blocks do not fill it, or a device's part of it.
    """
    if self.activations:
      stored_ = dataclasses.replace(self, activations=False)
      return Activated(stored_.of(x, summed, axes, name, shrink))
    if self == Scheme('int8'):
      return int8.Int8.of(x, summed, axes, shrink)
    rank = len(axes) - ('experts' in axes)
    blocks = self.blocks(x.shape[-rank:], summed, name)
    blocks = (1,) * (len(axes) - rank) + blocks
    _check_shards(x.shape[-len(axes) :], blocks, axes, self, name)
    made = Codes.of(x, self.grid, blocks, max(summed), axes, self.symmetric, shrink)
    return Doubled.of(x, made) if self.double else made


def parsed(entries: Sequence[str]) -> list[tuple[str, Scheme]]:
  """(pattern, scheme) of each entry. Raises ValueError for one that is none."""
  found = []
  for entry in entries:
    pattern, equals, scheme = entry.partition('=')
    if not pattern or not equals:
      raise ValueError(f'{entry!r} is no PATTERN=SCHEME, as in *=int4:group=64')
    found.append((pattern, Scheme.parse(scheme)))
  return found


def rule_of(
  name: str, p: nnx.Param, rules: Sequence[tuple[str, Scheme]]
) -> tuple[str, Scheme] | None:
  """Which (pattern, scheme) holds of a parameter: the first that matches; None for none."""
  of_table = name.startswith(('head.', 'embedding.'))
  if p.kind == 'vector' or p.wide or (of_table and name != 'head.tokens'):
    return None
  called = [name]
  if 'experts' in p.axes:  # no other part of a name tells them from a dense layer's
    layer, _, matrix = name.rpartition('.')
    called.append(f'{layer}.experts.{matrix}')
  for pattern, scheme in rules:
    matched = any(fnmatch.fnmatchcase(each, pattern) for each in called)
    if matched and (pattern.startswith('head') or not of_table):
      return pattern, scheme
  return None


def stored(model, entries: Sequence[str], make: Callable[..., Weight] = Scheme.of):
  """The model with its matrices as entries say; those in codes already stay. A head that is tied to
  the table becomes a copy where a pattern names it. Traced.

  make: (scheme, numbers, what is summed over, axes, name) -> the weight.

  Raises ValueError for a pattern that holds of no matrix, and for blocks that do not fill one.
  """
  rules, held = parsed(entries), set()

  def coded(name, p):
    pattern, scheme = rule_of(name, p, rules) or ('', Scheme('keep'))
    held.add(pattern)
    if scheme == Scheme('keep') or read(p).coded:
      return None
    dtype = read(p).dtype if scheme.grid == 'keep' else 'float32'
    return p.replace(made_by(make, scheme, read(p).numbers(dtype), summed_of(p), p.axes, name))

  def matrix(path, p):
    made = coded(name_of(path), p)
    return p if made is None else made

  made = jax.tree_util.tree_map_with_path(matrix, model, is_leaf=is_param)
  if model.head.tokens is None:
    head = coded('head.tokens', model.embedding.tokens)
    if head is not None:
      made.head.tokens = nnx.data(head)
  for pattern, _ in rules:
    if pattern not in held:
      raise ValueError(
        f'{pattern!r} of model.execution.stored holds of no matrix: none has such a name (routers, '
        'norms, biases and tables are left out, and the head but by a pattern that begins with '
        'head), or patterns before it match first'
      )
  return made


def made_by(make: Callable, scheme: Scheme, x, summed, axes, name: str) -> Weight:
  """A matrix by `make`, as of `stored`; where a scheme is sparse, what of it is left. Traced."""
  if not scheme.sparse:
    return make(scheme, x, summed, axes, name)
  rest = dataclasses.replace(scheme, sparse=())

  def kept(numbers):
    if rest.grid == 'keep':
      return Plain(numbers, axes)
    return make(rest, numbers, summed, axes, name)

  return Sparse.of(x, scheme.sparse, max(summed), axes, kept, name)


def everywhere(text: str) -> Callable:
  """model -> the same with all its matrices by one scheme, and a head in bytes: how a model is held
  that was saved as numbers. Traced.

  Raises ValueError for a text that is no scheme.
  """
  if Scheme.parse(text) == Scheme('int8'):
    return int8.in_bytes
  return functools.partial(stored, entries=(f'*={text}', 'head*=int8'))


def check_asked(config: ModelConfig, text: str) -> None:
  """Raises ValueError for a text that is no scheme, and for another one than that in which a model
  of this config is stored: codes stay as they are. text: as of `everywhere`; '': none.
  """
  if not text:
    return
  asked = Scheme.parse(text)
  # A head is in bytes whatever the scheme, unless it was stored in codes of its own.
  in_codes = {
    scheme
    for pattern, scheme in parsed(config.execution.stored)
    if scheme != Scheme('keep') and not pattern.startswith('head')
  }
  if in_codes - {asked}:
    raise ValueError(
      f'weights={text!r} of a model that is stored in {", ".join(config.execution.stored)}: its '
      'codes stay as they are; leave it out (--weights, adapter.base), or name the run in numbers '
      'that this one was made of'
    )


def dequantised(model, dtype: str = ''):
  """The model with the numbers that its codes stand for, and a config that says so. Traced.

  dtype: of these; default: the parameters'.
  """

  def numbers(p):
    return p.replace(read(p).numbers(dtype)) if read(p).coded else p

  config = model.config
  dtype = dtype or config.execution.parameter_dtype
  made = jax.tree.map(numbers, model, is_leaf=is_param)
  made.config = numbers_config(config, model.head.tokens is not None)
  return made


def numbers_config(config: ModelConfig, head: bool) -> ModelConfig:
  """Of a model whose codes have become numbers; head: whether it has one of its own."""
  tied = config.tie_embeddings and not head
  return dataclasses.replace(config, tie_embeddings=tied).with_execution(stored=())


def untied(config: ModelConfig, model) -> ModelConfig:
  """Of a model in codes, of which a head that is a copy of the table in codes is its own."""
  tied = config.tie_embeddings and model.head.tokens is None
  return dataclasses.replace(config, tie_embeddings=tied)


def summed_of(p: nnx.Param) -> tuple[int, ...]:
  """Which dimensions a product with a parameter sums over, counted from the last."""
  if p.kind == 'embedding':
    return (-1,)
  outputs = len(p.axes) - ('experts' in p.axes) - p.inputs
  return tuple(range(-outputs - p.inputs, -outputs))


def _check_shards(shape, blocks, axes, scheme: Scheme, name: str) -> None:
  for size, block, axis in zip(shape, blocks, axes):
    shards = ax.size(axis) if axis else 1
    # A scale that all share is on every device, but two codes of a byte are in one block.
    split = size // block > 1 or (GRIDS[scheme.grid].packed and block > 1)
    if shards > 1 and split and size // block % shards:
      raise ValueError(
        f'{name}: {size // block} blocks of {block} along {axis!r} do not split over {shards} '
        f'devices; use smaller ones (at most {math.gcd(size // shards, block)}), or fewer devices '
        'along it'
      )
