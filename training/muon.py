"""How does Muon update? Momentum whose matrices are orthogonalised, each layer whole on one device;
AdamW for all that is not a hidden matrix.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float

from parallel import axes as ax
from training.adam import scale_by_adam


def rescaling(settings: dict[str, float], specs, whole: bool) -> optax.GradientTransformation:
  """Gradients to updates at learning rate 1, before decay; see training.optimizer.OWN.

  Raises ValueError where `whole` and no parameter is a hidden matrix.
  """
  groups = jax.tree.map(lambda spec: 'muon' if _is_hidden_matrix(spec) else 'adamw', specs)
  if whole and 'muon' not in jax.tree.leaves(groups):
    raise ValueError(
      "optimizer.name='muon': no parameter is a hidden matrix, so nothing would use Muon; use "
      "'adamw'"
    )
  adam = scale_by_adam(settings['b1'], settings['b2'], settings['epsilon'])
  return optax.partition(
    {
      'muon': scale_by_muon(settings['momentum'], specs),
      'adamw': optax.chain(adam, optax.scale(settings['adam_ratio'])),
    },
    lambda _: groups,
  )


def _is_hidden_matrix(spec) -> bool:
  return spec.kind == 'matrix' and 'vocab' not in spec.axes


def scale_by_muon(momentum: float, specs) -> optax.GradientTransformation:
  """Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon): Nesterov momentum,
  orthogonalised layer by layer.

  A matrix of a layer is seen as [inputs, outputs]: q of [L, D, N, H] is L matrices of D x (N H);
  every expert is one. Updates are scaled by 0.2 sqrt(max(inputs, outputs)), which gives them the
  RMS of AdamW's (Liu et al., arXiv:2502.16982, section 2.2). optax.contrib.muon cannot run on
  matrices that explicit axes shard, and takes 1.4 to 2 times as long on a CPU.
  """

  def update(updates, state, params=None):
    del params
    # specs may be a prefix: below a spec there is the parameter's own node, or nothing where
    # another group owns it.
    return jax.tree.map(
      lambda spec, x: jax.tree.map(lambda m: _muon_update(m, spec), x), specs, updates
    ), state

  # The orthogonalisation ignores magnitude, so momentum needs neither dampening nor bias
  # correction.
  return optax.chain(
    optax.trace(momentum, nesterov=True),
    optax.GradientTransformation(optax.init_empty_state, update),
  )


def orthogonalize(x: Float[Array, 'L M N']) -> Float[Array, 'L M N']:
  """Each matrix U S V^T replaced by nearly U V^T: singular values end between about 0.7 and 1.2.

  Five Newton-Schulz steps of the quintic with Jordan's coefficients; a zero matrix stays zero.
  Matrix products run at JAX's default precision, whose bfloat16 passes on TPU are enough for it.
  """
  if x.shape[1] > x.shape[2]:
    return orthogonalize(x.mT).mT
  norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True))
  x = x / jnp.maximum(norm, jnp.finfo(x.dtype).tiny)
  for _ in range(5):
    gram = x @ x.mT
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
  return x


def _muon_update(x: jax.Array, spec) -> jax.Array:
  stacks = ax.stacks(spec.axes)
  if stacks == 2:
    # Experts, which a mesh may split, before layers: only so can the two become one dimension.
    x = jnp.moveaxis(x, 1, 0)
  before, shape = x.shape, x.shape[stacks:]
  entries = tuple(jax.typeof(x).sharding.spec)
  stacked = _reshape(x, (-1, *shape), (entries[0] if stacks else None, *entries[stacks:]))
  layers = stacked.shape[0]
  fan_in, fan_out = math.prod(shape[: spec.inputs]), math.prod(shape[spec.inputs :])

  # Each device orthogonalises whole layers: all-to-alls bring them together and take the updates
  # back to their shards. Layers of zeros fill up the last round, so that any number of layers suits
  # any mesh.
  route = _route_to_layers(jax.typeof(stacked).sharding)
  devices = math.prod(route[-1].mesh.shape[axis] for axis in ax.of_entry(route[-1].spec[0]))
  stacked = jnp.pad(stacked, [(0, -layers % devices)] + [(0, 0)] * len(shape))
  for sharding in route[1:]:
    stacked = jax.sharding.reshard(stacked, sharding)
  update = orthogonalize(stacked.reshape(-1, fan_in, fan_out)).reshape(stacked.shape)
  for sharding in route[-2::-1]:
    update = jax.sharding.reshard(update, sharding)

  update = _reshape(0.2 * math.sqrt(max(fan_in, fan_out)) * update[:layers], before, entries)
  return jnp.moveaxis(update, 0, 1) if stacks == 2 else update


def _route_to_layers(sharding: NamedSharding) -> list[NamedSharding]:
  """From `sharding` to the one that splits only dimension 0, one mesh axis a step.

  One axis at a time because the compiler turns such a step into an all-to-all; asked for all at
  once, it gathers the whole array on every device.
  """
  axes, route = [ax.of_entry(entry) for entry in sharding.spec], [sharding]
  for dimension in range(1, len(axes)):
    for axis in reversed(axes[dimension]):
      axes[dimension] = axes[dimension][:-1]
      axes[0] = (*axes[0], axis)
      route.append(NamedSharding(sharding.mesh, P(*axes)))
  return route


def _reshape(x, shape, entries):
  return x.reshape(shape, out_sharding=P(*entries) if ax.explicit() else None)
