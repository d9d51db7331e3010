"""How does a model lose numbers while it is trained, and how do those that are gone stay so? What
is 0 in a matrix stays 0, and its moments; and by a schedule more becomes 0.

  kept                     what is 0 stays 0: a run that was pruned is trained on
  0.5, 2:4                 so much goes of each matrix, the smallest, as Zhu & Gupta have it
                           (arXiv:1710.01878): after update t, of all that is to go, the share
                           1 - (1 - (t - begin) / (end - begin))^3
  0.5:row                  of each output, and not of the matrix
  0.5:begin=0:end=500:every=10    in updates; default: from the first one to the middle of the run,
                           in 50 steps

Matrices of blocks are pruned, routers are not. The mask is the numbers themselves: a checkpoint, a
device, an accumulated step have nothing else to carry.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from compression.prune import Pattern, stays
from model.params import named_leaves
from parallel import axes as ax

KEPT = 'kept'


@dataclasses.dataclass(frozen=True)
class Pruning:
  """Attributes:
  pattern: None: nothing goes any more.
  begin, end, every: in updates; of the last one all of the pattern is gone.
  """

  pattern: Pattern | None
  begin: int
  end: int
  every: int


def parsed(text: str, steps: int) -> Pruning:
  """Of optimizer.prune, for a run of so many updates. Raises ValueError for what is none."""
  kind, _, rest = re.fullmatch(r'(\d+:\d+|[^:]*)(:?)(.*)', text).groups()
  options = rest.split(':') if rest else []
  values, scope = {}, 'layer'
  for option in options:
    name, _, value = option.partition('=')
    if name in ('begin', 'end', 'every') and value.isdecimal():
      values[name] = int(value)
    elif option in ('row', 'layer'):
      scope = option
    else:
      raise ValueError(
        f'optimizer.prune={text!r}: {option!r} is none of row, begin=N, end=N, every=N'
      )
  if kind == KEPT:
    if options:
      raise ValueError(f'optimizer.prune={text!r}: nothing goes, whatever {options[0]!r}; use kept')
    return Pruning(None, 0, 0, 1)
  try:
    pattern = Pattern.parse(kind, scope)
  except ValueError as error:
    raise ValueError(f'optimizer.prune={text!r}: {error}') from error
  begin, end = values.get('begin', 0), values.get('end', max(1, steps // 2))
  every = values.get('every', max(1, (end - begin) // 50))
  if not 0 <= begin < end <= steps or not 0 < every <= end - begin:
    raise ValueError(
      f'optimizer.prune={text!r}: begin={begin} < end={end} <= {steps} steps, and every={every} at '
      'least 1 and within them; set those that are not'
    )
  return Pruning(pattern, begin, end, every)


class Pruned(NamedTuple):
  """Attributes:
  updates: [] int32, that were made.
  inner: the state of what is pruned.
  """

  updates: Any
  inner: Any


def pruning(
  optimizer: optax.GradientTransformation, text: str, steps: int, specs, whole: bool
) -> optax.GradientTransformation:
  """The optimizer under which what is 0 stays so. text: of optimizer.prune; specs, whole: as
  training.optimizer.make_optimizer has them.

  Raises ValueError where `whole` and nothing that is trained can be pruned.
  """
  how = parsed(text, steps)
  summed = {name: _summed(spec) for name, spec in named_leaves(specs).items() if _goes(name, spec)}
  if whole and not summed:
    raise ValueError(
      f'optimizer.prune={text!r}: no matrix of a block is trained, so there is nothing to prune; '
      'leave it empty, or let train.trained match some'
    )

  def init(parameters):
    return Pruned(jnp.zeros((), jnp.int32), optimizer.init(parameters))

  def update(grads, state, parameters):
    before = named_leaves(parameters)
    there = {name: before[name] != 0 for name in summed}
    updates, inner = optimizer.update(_where(there, grads), state.inner, parameters)
    updates, count = _where(there, updates), state.updates + 1
    if how.pattern:
      updates = jax.lax.cond(
        _due(how, count), lambda u: _without(how, summed, count, before, u), lambda u: u, updates
      )
      after = named_leaves(optax.apply_updates(parameters, updates))
      there = {name: after[name] != 0 for name in summed}
    return updates, Pruned(count, _where(there, inner))

  return optax.GradientTransformation(init, update)


def _goes(name: str, spec) -> bool:
  return spec.kind == 'matrix' and '.blocks.' in name and not name.endswith('.router')


def _summed(spec) -> tuple[int, ...]:
  """The dimensions that a product sums over, counted from the last: of a layer, or all layers."""
  rank = len(spec.axes) - ax.stacks(spec.axes)
  return tuple(range(-rank, spec.inputs - rank))


def _due(how: Pruning, count):
  inside = (count > how.begin) & (count <= how.end)
  return inside & (((count - how.begin) % how.every == 0) | (count == how.end))


def _without(how: Pruning, summed, count, before, updates):
  """Updates after which no more is left than the schedule says."""
  left = 1 - (count - how.begin) / (how.end - how.begin)
  share = 1 - left.astype(jnp.float32) ** 3

  def one(name, u):
    if name not in summed:
      return u
    p = before[name]
    after = (p + u).astype(p.dtype)
    kept = stays(jnp.abs(after), summed[name], how.pattern, share)
    return jnp.where(kept, u, -p.astype(u.dtype))

  leaves = [one(name, u) for name, u in named_leaves(updates).items()]
  return jax.tree.unflatten(jax.tree.structure(updates), leaves)


def _where(there, tree):
  """A tree of gradients, updates, or of state, with 0 where a parameter has 0: in what is laid out
  as a parameter is. (Moments in blocks, or factored, fade instead.)
  """

  def one(path, x):
    parts = path.split('.')
    for first in range(len(parts)):
      mask = there.get('.'.join(parts[first:]))
      if mask is not None and mask.shape == x.shape and jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.where(mask, x, jnp.zeros((), x.dtype))
    return x

  leaves = [one(name, x) for name, x in named_leaves(tree).items()]
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)
