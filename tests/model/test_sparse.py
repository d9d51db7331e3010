"""Are the numbers that stay the largest of each group, their places where they were, and a sparse
model the model of its numbers, in every layer and on every mesh?
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import transformer
from model.config import ModelConfig
from model.weights import read
from model.weights.codes import Codes
from model.weights.plain import Plain
from model.weights.scheme import Scheme, stored
from model.weights.sparse import Sparse
from parallel.mesh import MeshConfig, make_mesh
from tests.model import laws
from tests.model.test_codes import EXPERTS, MESH, plain
from tests.model.test_weights import config_of, everything


@functools.partial(jax.jit, static_argnums=(1, 2))
def sparse(x, pattern, packs=-2):
  axes = (None,) * np.ndim(x)
  return Sparse.of(x, pattern, packs, axes, lambda kept: Plain(kept, axes))


numbers = jax.jit(lambda weight: weight.numbers('float32'))


def left(x, N, M, axis):
  """The same by a sort of each group."""
  x = np.moveaxis(np.asarray(x), axis, -1)
  groups = x.reshape(-1, M)
  order = np.argsort(-np.abs(groups), 1, kind='stable')[:, N:]
  groups = groups.copy()
  np.put_along_axis(groups, order, 0, 1)
  return np.moveaxis(groups.reshape(x.shape), -1, axis)


def test_bytes_are_those_of_the_format():
  """Two numbers of four and their places, of 2 bits, the first in the low ones."""
  made = sparse(np.float32([[4, -1, 2.5, -3, 0, 5, 6, 1]]).T, (2, 4))
  assert made.kept.value.ravel().tolist() == [4, -3, 5, 6]
  assert made.places.ravel().tolist() == [0 | 3 << 2 | 1 << 4 | 2 << 6]
  assert numbers(made).ravel().tolist() == [4, 0, 0, -3, 0, 5, 6, 0]


@pytest.mark.parametrize(
  'pattern, groups, axis', [((2, 4), 4, -2), ((1, 2), 3, -1), ((3, 4), 1, -3), ((5, 16), 2, -2)]
)
def test_what_stays_is_what_a_sort_leaves(pattern, groups, axis):
  """Many numbers are equal. A pruned matrix is itself."""
  shape = [2, 3, 2]
  shape[axis] = groups * pattern[1]
  x = np.random.default_rng(0).integers(-4, 5, shape).astype(np.float32)
  made = sparse(x, pattern, axis)
  np.testing.assert_array_equal(numbers(made), left(x, *pattern, axis))
  assert made.shape == x.shape and made.kept.shape[axis] * pattern[1] == x.shape[axis] * pattern[0]
  np.testing.assert_array_equal(numbers(sparse(numbers(made), pattern, axis)), numbers(made))


def check(family, sizes, *entries):
  """What a sparse model computes is what its numbers compute, and it has fewer of them."""
  config = config_of(family).with_execution(stored=entries)
  mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: 8 if sizes else 1])
  with jax.set_mesh(mesh):
    model = jax.jit(functools.partial(transformer.init, config, 0))()
    kinds = [read(p) for p in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable))]
    made = [kind for kind in kinds if isinstance(kind, Sparse)]
    assert len(made) > 2
    outputs, wanted = everything()(model), everything()(jax.jit(plain)(model))
  for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize(
  'family, sizes, entries',
  [
    ('llama', MESH, ('*=2:4', 'head*=2:4')),
    *(
      pytest.param(*case, marks=[pytest.mark.slow, *marks])
      for case, *marks in (
        (('mixtral', EXPERTS, ('*=2:4+int8',)),),
        (('t5', {}, ('*.o=keep', '*=2:4', 'head*=2:4')), pytest.mark.long),
        (('gemma2', MESH, ('*=2:4+int4:group=2',)), pytest.mark.long),
        (('bert', MESH, ('*=2:4',)), pytest.mark.long),
        (('deepseek_v3', MESH, ('*.down=keep', '*.o=keep', '*.q=keep', '*=2:4')), pytest.mark.long),
      )
    ),
  ],
  ids=str,
)
def test_a_sparse_model_is_that_of_its_numbers(family, sizes, entries):
  check(family, sizes, *entries)


def test_what_stays_is_stored_by_another_scheme(one_device):
  """2:4 of int4: the codes are of the numbers that stay, nearest to them."""
  x = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
  p = nnx.Param(jnp.asarray(x), axes=('embed', 'feed_forward'), kind='matrix', inputs=1, wide=False)
  config = ModelConfig(**laws.TINY)
  model = jax.jit(functools.partial(transformer.init, config, 0))()
  model.stack.blocks[0].feed_forward.up = p
  made = jax.jit(functools.partial(stored, entries=('*.up=2:4+int4:group=8',)))(model)
  made = made.stack.blocks[0].feed_forward.up.get_value()
  assert isinstance(made.kept, Codes) and made.kept.blocks == (8, 1)
  found, kept = np.asarray(numbers(made)), left(x, 2, 4, 0)
  assert ((found == 0) | (kept != 0)).all()
  step = np.repeat(np.abs(kept).reshape(2, 16, 6).max(1) / 7, 16, 0)
  assert (np.abs(found - kept) <= step / 2 * (1 + 1e-5)).all()
  # 4 bits of half of the numbers, 2 of their places, and a scale of 32 for 16 numbers.
  assert (
    sum(leaf.nbytes for leaf in jax.tree.leaves(made)) == x.size // 4 + x.size // 8 + x.size // 4
  )


@pytest.mark.parametrize(
  'text, words',
  [
    ('4:4', 'keeps fewer numbers'),
    ('2:32', 'at most 16'),
    ('2:4+2:4', 'says twice'),
    ('2:4+x', 'x'),
  ],
)
def test_patterns_that_mean_nothing(text, words):
  with pytest.raises(ValueError, match=words):
    Scheme.parse(text)


@pytest.mark.parametrize(
  'tensor, words', [(4, ''), (8, "32 numbers along 'feed_forward' .* at most 4")]
)
def test_a_group_is_on_one_device(tensor, words):
  """8 numbers are a byte of places of 2:4; 4 are half of one."""
  sizes = {'feed_forward': 32, 'heads': 8, 'kv_heads': 8, 'vocabulary': 64}
  config = ModelConfig(**laws.TINY | sizes).with_execution(stored=('*.down=2:4',))
  build = functools.partial(transformer.init, config, 0)
  with jax.set_mesh(make_mesh(MeshConfig(tensor=tensor), jax.devices()[:tensor])):
    if not words:
      jax.eval_shape(build)
      return
    with pytest.raises(ValueError, match=words):
      jax.eval_shape(build)
