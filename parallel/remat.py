"""What is kept from the forward pass for the backward pass? Named, checked policies for
`jax.checkpoint`, around blocks and groups of them.

A block is computed again in the backward pass but for what its policy keeps. Of N layers' inputs,
which a scan keeps, `sqrt` keeps about 2 sqrt(N): those of groups of sqrt(N) layers, and while a
group is gone through backwards those of its layers (Chen et al., arXiv:1604.06174, section 4.3).
"""

import dataclasses
import math

import jax
import jax.ad_checkpoint
import jax.numpy as jnp

import names

_policies = jax.checkpoint_policies
_SUM = 'a sum of products'


def summed(x: jax.Array) -> jax.Array:
  """A sum of products with weights, which is kept where products are, in the place of its terms."""
  return jax.ad_checkpoint.checkpoint_name(x, _SUM)


def _products(primitive, *arrays, **how):
  """Whether to keep: products with weights; of a product whose sum is open (see
  parallel.axes.einsum), what closes it instead; and what is `summed`.
  """
  if primitive.name == 'name':
    return how['name'] == _SUM
  if primitive.name == 'reshard':
    return bool(arrays[0].sharding.spec.unreduced)
  sharding = how.get('out_sharding')
  return _policies.dots_with_no_batch_dims_saveable(primitive, *arrays, **how) and not (
    sharding is not None and sharding.spec.unreduced
  )


POLICIES = {
  'none': None,
  'full': _policies.nothing_saveable,
  'sqrt': _policies.nothing_saveable,
  'dots': _products,
}
# What blocks call by these names (see `named`), in the order in which it is computed.
NAMES = {
  'block': 'the residual stream before a block',
  'query': 'queries as they meet keys',
  'key': 'keys as they meet queries',
  'value': 'values',
  'attention': 'mixed values of all heads, and what the backward pass of a kernel keeps with them',
  'attention_out': 'what attention adds to the residual stream',
  'gate': 'gate of a feed-forward',
  'up': 'up-projection of a feed-forward',
  'feed_forward_out': 'what a feed-forward, or experts, add to the residual stream',
}


@dataclasses.dataclass(frozen=True)
class Remat:
  """What is kept of a block.

  Attributes:
    policy: of POLICIES: 'none' keeps everything, 'full' and 'sqrt' nothing,
      'dots' products with weights.
    save: of NAMES, kept besides.
    offload: of NAMES, kept in the host's memory.
  Raises ValueError for unknown names, names that are in both lists,
  and names besides a policy that keeps all.
  """

  policy: str = 'none'
  save: tuple[str, ...] = ()
  offload: tuple[str, ...] = ()

  def __post_init__(self):
    names.check('remat', self.policy, POLICIES)
    for field in ('save', 'offload'):
      for name in getattr(self, field):
        names.check(f'remat_{field}', name, NAMES)
    if both := {*self.save} & {*self.offload}:
      raise ValueError(
        f'remat_save and remat_offload both name {sorted(both)}; a value is kept in one place'
      )
    if self.policy == 'none' and (self.save or self.offload):
      raise ValueError(
        f"remat='none' keeps everything on the device; remat_save={self.save} and "
        f"remat_offload={self.offload} need remat='full', 'sqrt' or 'dots'"
      )
    if self.policy == 'dots' and self.offload:
      raise ValueError(
        f"remat='dots' keeps products on the device; remat_offload={self.offload} needs "
        "remat='full' or 'sqrt'"
      )

  def alone(self, layers) -> bool:
    """Whether `scan` calls its step on these stacked layers just once, and outside of a loop."""
    return self.policy == 'none' and len(jax.tree.leaves(layers)[0]) == 1


def remat(function, config: Remat):
  """`function` that keeps what `config` says of it."""
  policy = POLICIES[config.policy]
  if policy is None:
    return function
  if config.offload:
    policy = _policies.save_and_offload_only_these_names(
      names_which_can_be_saved=list(config.save),
      offload_src='device',
      names_which_can_be_offloaded=list(config.offload),
      offload_dst='pinned_host',
    )
  elif config.save:
    policy = _policies.save_from_both_policies(
      policy, _policies.save_only_these_names(*config.save)
    )
  # Inside of a scan, common subexpressions' elimination cannot undo it.
  return jax.checkpoint(function, policy=policy, prevent_cse=False)


def named(x: jax.Array, name: str) -> jax.Array:
  """`x`, which policies can keep by this name of NAMES."""
  return jax.ad_checkpoint.checkpoint_name(x, names.check('name of a value', name, NAMES))


def scan(step, carry, layers, config: Remat):
  """jax.lax.scan of `step` over stacked `layers`;
  in groups whose inputs alone are kept, where the policy is 'sqrt'.
  """
  n = len(jax.tree.leaves(layers)[0])
  if config.alone(layers):
    carry, y = step(carry, jax.tree.map(lambda x: x[0], layers))
    return carry, jax.tree.map(lambda x: x[None], y)
  if config.policy != 'sqrt' or n < 4:
    return jax.lax.scan(step, carry, layers)

  # As many groups of sqrt(N) layers as there are whole ones, in a loop; the rest is one more group.
  size = math.isqrt(n)
  grouped = n - n % size

  def cut(x):
    return jax.lax.slice_in_dim(x, 0, grouped).reshape(grouped // size, size, *x.shape[1:])

  group = jax.checkpoint(
    lambda carry, layers: jax.lax.scan(step, carry, layers),
    policy=_policies.nothing_saveable,
    prevent_cse=False,
  )
  carry, results = jax.lax.scan(group, carry, jax.tree.map(cut, layers))
  results = jax.tree.map(lambda y: y.reshape(grouped, *y.shape[2:]), results)
  if grouped == n:
    return carry, results
  carry, rest = group(carry, jax.tree.map(lambda x: jax.lax.slice_in_dim(x, grouped, n), layers))
  return carry, jax.tree.map(lambda *y: jnp.concatenate(y), results, rest)
