"""Which codes of a checkpoint can a model keep, and by which entries of model.execution.stored?

A parameter keeps its codes where all of its tensors (of layers, of experts) are in codes of one
grid, and a scheme's blocks, taken to where their numbers lie in the tensors, are each within one
block there. So rows in another order, heads that are split, gates and ups that alternate need no
rule of their own; where no scheme does, its numbers are taken, and a line says why.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import jax
import numpy as np

import names
from model import transformer
from model.config import ModelConfig
from model.families.layout import Layout
from model.params import by_name
from model.weights.codes import blocks_of
from model.weights.grids import GRIDS
from model.weights.scheme import Scheme, rule_of, summed_of
from parallel.mesh import NO_MESH

KEPT = {
  'exact': 'where they stand for the same numbers, bit for bit',
  'close': 'also where the last digits of f32 differ',
  'none': 'nowhere',
}
LEAST = 8  # numbers in a block, below which scales would be as many bytes as codes
SPLIT = 128  # of an output's codes that share one scale: so that devices can share them


@dataclasses.dataclass(frozen=True)
class KeptCodes:
  """Attributes:
  stored: of model.execution. leaves: the parameters in codes. lines: what is kept, and what becomes
    numbers and why.
  """

  stored: tuple[str, ...]
  leaves: frozenset[str]
  lines: tuple[str, ...]


def fitted(config: ModelConfig, parts, called: dict[str, str], tensors, keep: str) -> KeptCodes:
  """What a model keeps of a checkpoint's codes.

  Args:
    parts: tensor -> its shares of parameters; called: tensor -> in the files.
    tensors: of the files, with `coded`. keep: of KEPT.
  """
  names.check('--codes', keep, KEPT)
  coded = getattr(tensors, 'coded', {})
  if not coded and keep != 'exact':
    nothing = f'NOTE: nothing in {tensors.directory} lies in codes that could be kept or not'
    return KeptCodes((), frozenset(), (nothing,))
  of: dict[str, list] = collections.defaultdict(list)
  for name, shares in parts.items():
    for share in shares:
      of[share.leaf].append((called[name], share.layout, coded.get(called[name])))

  with jax.set_mesh(NO_MESH):
    model = jax.eval_shape(functools.partial(transformer.init, config, 0))
  schemes, why = {}, {}
  for name, p in by_name(model).items():
    found = of.get(name, ())
    if not any(entry[2] for entry in found):
      if _codable(name, p):
        schemes[name] = Scheme('keep')
    elif reason := _reason(name, p, found, keep):
      why[name] = reason
      if _codable(name, p):
        schemes[name] = Scheme('keep')
    else:
      schemes[name] = _scheme(name, p, found)
      if schemes[name] is None:
        first = next(entry[2] for entry in found if entry[2])
        why[name] = f'blocks of {" x ".join(map(str, first.blocks))} do not follow its rows here'
        schemes[name] = Scheme('keep')

  kept = {name: scheme for name, scheme in schemes.items() if scheme.grid != 'keep'}
  stored = _entries(schemes) if kept else ()
  return KeptCodes(stored, frozenset(kept), tuple(_lines(kept, stored, why)))


def _codable(name: str, p) -> bool:
  return rule_of(name, p, [('head*', Scheme('int8')), ('*', Scheme('int8'))]) is not None


def _reason(name: str, p, found, keep: str) -> str:
  """Why a parameter's codes are not kept whatever the scheme; ''."""
  missing = [stored for stored, _, coded in found if coded is None]
  every = [coded for _, _, coded in found if coded is not None]
  if keep == 'none':
    return 'so it was asked for'
  if not _codable(name, p):
    return 'tables, routers and vectors are numbers'
  if missing:
    return f'{len(missing)} of its {len(found)} tensors are no codes, such as {missing[0]}'
  for coded in every:
    if coded.why:
      return coded.why
  if len({coded.grid for coded in every}) > 1 or not every[0].grid:
    grids = sorted({coded.grid or 'a table of its own' for coded in every})
    return f'codes of {" and ".join(grids)} are those of no scheme'
  if any(coded.close for coded in every) and keep == 'exact':
    return 'zero points would change the last digits of f32; --codes=close keeps the codes'
  return ''


def _scheme(name: str, p, found) -> Scheme | None:
  """The one with the largest blocks that fit."""
  every = [coded for _, _, coded in found]
  symmetric = all(coded.zeros is None for coded in every)
  kinds = {(layout, coded.shape, coded.blocks) for _, layout, coded in found}
  shape, summed = _shape(p), summed_of(p)
  for scheme in _candidates(every[0].grid, symmetric, kinds, shape, summed):
    try:
      blocks = blocks_in(scheme, shape, summed)
    except ValueError:
      continue
    if all(_within(layout, native, blocks) for layout, _, native in kinds):
      return scheme
  return None


def _candidates(grid, symmetric, kinds, shape, summed) -> Iterator[Scheme]:
  """From few scales to many."""
  make = functools.partial(Scheme, grid, symmetric=symmetric)
  rows = min(native[0] for _, _, native in kinds)
  largest = min(max(native) for _, _, native in kinds)
  if GRIDS[grid].packed:
    every = math.prod(shape[n] for n in summed)
    whole = all(max(native) >= every for _, _, native in kinds)
    sizes = [SPLIT, every] if whole else []
    sizes += _halved(min(largest, every))
  else:
    if grid == 'fp8' and all(native == of for _, of, native in kinds):
      yield make(tensor=True)
    yield make()
    sizes = _halved(largest)
    if rows > 1:
      yield from (make(block=size) for size in sizes)
  yield from (make(group=size) for size in sizes if size % 2 == 0)


def _halved(size: int) -> list[int]:
  """A size, its half, and so on."""
  sizes = [size]
  while sizes[-1] % 2 == 0 and sizes[-1] > LEAST:
    sizes.append(sizes[-1] // 2)
  return sizes


def _shape(p) -> tuple[int, ...]:
  """Of a parameter without stacked layers, and of an expert."""
  return p.get_value().shape[-(len(p.axes) - ('experts' in p.axes)) :]


def blocks_in(scheme: Scheme, shape: tuple[int, ...], summed: tuple[int, ...]) -> tuple[int, ...]:
  """Blocks of a scheme; of int8, whose weight has none, what shares a scale."""
  if scheme == Scheme('int8'):
    return blocks_of(shape, summed, 0)
  return scheme.blocks(shape, summed, '')


def _within(layout: Layout, native: tuple[int, ...], blocks: tuple[int, ...]) -> bool:
  """Whether each block here is within one block of the tensor.

  A number's block there has a place in each dimension of the tensor, which its places here in the
  names of that dimension decide, and no others: so each dimension is looked at alone.
  """
  blocks = (1,) * (len(layout.here) - len(blocks)) + blocks
  ours, lengths = dict(zip(layout.here, blocks, strict=True)), dict(layout.lengths)
  for group, size in zip(layout.groups, native, strict=True):
    places = np.arange(math.prod(lengths[name] for name in group)) // size
    places, left = places.reshape([lengths[name] for name in group]), list(group)
    if layout.take and layout.take[0] in group:
      axis = left.index(layout.take[0])
      places = places.take(layout.take[1], axis)
      if isinstance(layout.take[1], int):
        left.pop(axis)
    for axis, name in enumerate(left):
      block = min(ours[name], places.shape[axis])  # a table may have rows that are no ids
      if places.shape[axis] % block:
        return False
      cut = places.reshape(*places.shape[:axis], -1, block, *places.shape[axis + 1 :])
      least = cut.min(axis + 1)
      if (least != cut.max(axis + 1)).any():
        return False
      places = least
  return True


def _entries(schemes: dict[str, Scheme]) -> tuple[str, ...]:
  """Patterns and schemes, few of them: the commonest last, for all; of names that differ in numbers
  only, one where they agree.
  """
  of = collections.defaultdict(dict)
  for name, scheme in schemes.items():
    of[re.sub(r'\.\d+\.', '.*.', name)][name] = scheme
  plain = {p: dict(names_) for p, names_ in of.items() if not p.startswith(('head.', 'embedding.'))}
  counts = collections.Counter(scheme for same in plain.values() for scheme in same.values())
  most = counts.most_common(1)[0][0] if counts else None
  entries = []
  for pattern, same in of.items():
    agree = len({*same.values()}) == 1
    for name, scheme in [(pattern, next(iter(same.values())))] if agree else same.items():
      table = name.startswith(('head.', 'embedding.'))
      if scheme.grid == 'keep' if table else scheme == most:
        continue
      entries.append(f'{name}={scheme}')
  if most is not None and most.grid != 'keep':
    entries.append(f'*={most}')
  return tuple(entries)


def _lines(kept: dict[str, Scheme], stored: tuple[str, ...], why: dict[str, str]) -> Iterator[str]:
  if kept:
    yield f'codes stay as they are in {len(kept)} kinds of matrices: {", ".join(stored)}'
  of = collections.defaultdict(list)
  for name, reason in why.items():
    of[reason].append(name)
  for reason, those in of.items():
    some = ', '.join(those[:3]) + (f' and {len(those) - 3} more' if len(those) > 3 else '')
    yield f'NOTE: codes become numbers in {some}: {reason}'
