"""How do several texts attend that begin alike, where a row has their beginning once?

    a row   p p p p | a a a | b b b     a trunk of P tokens, and G branches of A tokens behind it

The trunk looks at itself. A branch looks at the trunk and at itself, as in a row of its own behind
a copy of the trunk's keys and values: two calls of whatever backend, none of which knows of
branches. Scores are those of rows that have a whole text each, but for the trunk's own, which are
made once; so is what a model does to single tokens, most of its work.

R rows · P tokens of a trunk · G branches · A tokens of a branch · N query heads · K key/value heads
· H head width
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from kernels.scoring import Scoring
from parallel import axes as ax


def attention(
  q: Float[Array, 'R T N H'],
  k: Float[Array, 'R T K H'],
  v: Float[Array, 'R T K Hv'],
  scoring: Scoring,
  attend: Callable,
) -> tuple[Float[Array, 'R T N Hv'], Float[Array, 'R T N']]:
  """kernels.attention.attention of rows that branch (T = P + G A); the same contract.

  attend: (q, k, v, scoring) -> (out, lse) of rows that do not.
  Raises ValueError where T does not split, and NotImplementedError with dropout, which counts the
  tokens of a row.
  """
  mask, (R, T) = scoring.mask, q.shape[:2]
  mask.branched(T)  # raises
  if scoring.dropout is not None:
    raise NotImplementedError('attention of rows that branch does not honour dropout; leave it out')
  P, G, plain = mask.trunk, mask.branches, dataclasses.replace(mask, branches=1, trunk=0)
  A = (T - P) // G

  def own(x):
    return _laid(x[:, P:], (R * G, A))

  def behind_trunk(x):
    copies = jnp.broadcast_to(x[:, None, :P], (R, G, P, *x.shape[2:]))
    return jnp.concatenate([_laid(copies, (R * G, P), of=3), own(x)], 1)

  def trunk(x):
    return x[:, :P]

  def mixed(keys, tokens, masked):
    return attend(tokens(q), keys(k), keys(v), dataclasses.replace(scoring, mask=masked))

  at = jnp.arange(P + A, dtype=jnp.int32)[None]
  positions = {'query_positions': at[:, P:], 'key_positions': at}
  branch = dataclasses.replace(plain.cut(own, behind_trunk), **positions)
  parts = [[_laid(x, (R, G * A)) for x in mixed(behind_trunk, own, branch)]]
  if P:
    parts.insert(0, mixed(trunk, trunk, plain.cut(trunk, trunk)))
  out, lse = (jnp.concatenate(both, 1) for both in zip(*parts))
  return out, lse


def _laid(x, shape, of=2):
  """What lies in so many dimensions in these two, in the same order; the others are split over the
  mesh as they were.
  """
  layout = None
  if ax.explicit():
    first, *rest = jax.typeof(x).sharding.spec
    layout = PartitionSpec(first, None, *rest[of - 1 :])
  return jax.lax.reshape(x, (*shape, *x.shape[of:]), out_sharding=layout)
