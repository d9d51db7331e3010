"""Where a device has one expert, is what multiplies its rows chosen by what is multiplied?"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from model import moe as moe_module
from model.config import ModelConfig, MoEConfig
from model.execution import ExecutionConfig
from model.moe import MoE
from parallel.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize('pieces', [1, 2])
def test_the_kernel_is_chosen_by_gathered_matrices(pieces, monkeypatch):
  """A quarter of a matrix is stored here, 64 wide and in f32, which no kernel would take."""
  asked = []

  def chosen(rows, matrices, backend):
    asked.append((rows.shape[-1], rows.dtype.name, matrices.shape, matrices.dtype.name, backend))
    return 'blocked'

  monkeypatch.setattr(moe_module, 'chosen', chosen)
  monkeypatch.setattr(moe_module, '_pieces', lambda F, most: pieces)
  config = ModelConfig(
    width=256,
    feed_forward=512,
    moe=MoEConfig(experts=2, per_token=1),
    execution=ExecutionConfig(dtype='bfloat16'),
  )
  with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=4, expert=2))):
    x = jax.ShapeDtypeStruct((8, 4, 256), jnp.bfloat16)
    jax.eval_shape(lambda x: MoE(config, nnx.Rngs(params=0))(x)[0], x)
  assert set(asked) == {(256, 'bfloat16', (1, 256, 512 // pieces), 'bfloat16', 'auto')}
