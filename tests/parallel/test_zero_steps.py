"""Are shards gathered and gradients scattered as one collective would,
also in the two steps that TPUs take?
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel import axes as ax, zero
from parallel.mesh import MeshConfig, make_mesh

MESHES = [{'fsdp': 8}, {'fsdp': 4, 'expert': 2}, {'fsdp': 2, 'expert': 2, 'context': 2}]


@pytest.fixture
def on_a_tpu(monkeypatch):
  """Two steps over whatever is all of the mesh, as over a slice that is large enough."""
  monkeypatch.setattr(zero, 'platform', lambda: 'tpu')
  monkeypatch.setattr(zero, 'AT_ONCE', dict.fromkeys(zero.AT_ONCE, (0, 0)))


def layer(sizes):
  """Of x @ w summed with weights that tell every entry apart: the product,
  and the gradient of w.
  """
  with jax.set_mesh(make_mesh(MeshConfig(data=1, **sizes))):
    w = jax.device_put(
      jnp.arange(32 * 16, dtype=jnp.float32).reshape(32, 16), ax.spec('embed', None)
    )
    x = jax.device_put(
      jnp.sin(jnp.arange(16 * 4 * 32, dtype=jnp.float32)).reshape(16, 4, 32),
      ax.spec('batch', 'length', None),
    )

    @jax.jit
    def run(w):
      def total(w):
        y = jnp.einsum('BTD,DF->BTF', x, zero.gather(w, 'embed', None))
        return jnp.sum(y * jnp.cos(jnp.arange(16.0))[None, None]), y

      return jax.value_and_grad(total, has_aux=True)(w)

    program = run.lower(w).compile().as_text()
    (_, y), gradient = run(w)
    assert gradient.sharding == w.sharding
    return program, np.asarray(y), np.asarray(gradient)


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_two_steps_are_one(sizes, on_a_tpu):
  program, y, gradient = layer(sizes)
  w, x = (
    np.arange(32 * 16.0).reshape(32, 16),
    np.sin(np.arange(16 * 4 * 32, dtype=np.float32)).reshape(16, 4, 32),
  )
  np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-2)  # sums of 32 numbers of up to 500
  np.testing.assert_allclose(
    gradient, np.einsum('BTD,F->DF', x, np.cos(np.arange(16.0))), rtol=1e-4, atol=1e-4
  )
  assert program.count(' reduce-scatter(') == 2 and program.count(' all-gather(') == 2


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_a_shard_is_where_one_collective_puts_it(sizes, on_a_tpu):
  shards = tuple(sizes)
  with jax.set_mesh(make_mesh(MeshConfig(data=1, **sizes))):
    x = jnp.arange(64.0).reshape(16, 4)

    def both(function, other):
      return jax.jit(
        ax.local(
          lambda x: jnp.stack([function(x), other(x)]), (('embed', None),), (None, 'embed', None)
        )
      )

    apart = jax.device_put(jnp.arange(64.0 * 16).reshape(128, 8), ax.spec('embed', None))
    got = both(
      functools.partial(zero.reduce_scatter, shards=shards, dim=0),
      functools.partial(jax.lax.psum_scatter, axis_name=shards, scatter_dimension=0, tiled=True),
    )
    first, second = np.asarray(got(apart))
    np.testing.assert_array_equal(first, second)
    whole = jax.jit(
      ax.local(
        lambda x: jnp.stack(
          [zero.all_gather(x, shards, 0), jax.lax.all_gather(x, shards, axis=0, tiled=True)]
        ),
        (('embed', None),),
        (None, None, None),
      )
    )
    first, second = np.asarray(whole(jax.device_put(x, ax.spec('embed', None))))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, x)


@pytest.mark.parametrize(
  'kind,device,chips,steps',
  [
    ('reduce_scatter', 'TPU v5', 4, 1),
    ('reduce_scatter', 'TPU v5', 8, 2),
    ('reduce_scatter', 'TPU v6 lite', 8, 1),
    ('all_gather', 'TPU v5', 8, 1),
  ],
)
def test_two_steps_are_taken_where_one_would_be_an_all_reduce(
  kind, device, chips, steps, monkeypatch
):
  mesh = types.SimpleNamespace(
    shape={'fsdp': chips}, size=chips, abstract_device=types.SimpleNamespace(device_kind=device)
  )
  monkeypatch.setattr(jax.sharding, 'get_abstract_mesh', lambda: mesh)
  monkeypatch.setattr(zero, 'platform', lambda: 'tpu')
  assert len(zero._steps(('fsdp',), kind)) == steps
  mesh.size = 2 * chips
  assert zero._steps(('fsdp',), kind) == [None], 'a part of the slice has its own collective'
