"""Are the numbers that stay the largest of each group, their places where they were, and a sparse
model the model of its numbers, in every layer and on every mesh?
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st

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


def sparse(x, pattern, packs=-2):
  axes = (None,) * np.ndim(x)
  return Sparse.of(jnp.asarray(x), pattern, packs, axes, lambda kept: Plain(kept, axes))


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
  assert made.numbers('float32').ravel().tolist() == [4, 0, 0, -3, 0, 5, 6, 0]
  # Of equal ones the first; what is 0 already may be among them.
  assert sparse(np.float32([[0, 2, 2, 2]]).T, (2, 4)).numbers('float32').ravel().tolist() == [
    *(0, 2, 2, 0)
  ]


@settings(max_examples=25, deadline=None)
@given(
  st.sampled_from([(2, 4), (1, 2), (1, 4), (4, 8), (3, 4), (5, 16)]),
  st.integers(1, 5),
  st.sampled_from([-1, -2, -3]),
  st.integers(0, 2**32 - 1),
)
def test_what_stays_is_what_a_sort_leaves(pattern, groups, axis, seed):
  shape = [2, 3, 2]
  shape[axis] = groups * pattern[1]
  x = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)
  made = sparse(x, pattern, axis)
  np.testing.assert_array_equal(made.numbers('float32'), left(x, *pattern, axis))
  assert made.shape == x.shape and made.kept.shape[axis] * pattern[1] == x.shape[axis] * pattern[0]
  # A pruned matrix is itself.
  again = sparse(made.numbers('float32'), pattern, axis)
  np.testing.assert_array_equal(again.numbers('float32'), made.numbers('float32'))


def check(family, sizes, *entries, inner=Plain):
  """What a sparse model computes is what its numbers compute, and it has fewer of them."""
  config = config_of(family).with_execution(stored=entries)
  mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: 8 if sizes else 1])
  with jax.set_mesh(mesh):
    model = jax.jit(functools.partial(transformer.init, config, 0))()
    kinds = [read(p) for p in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable))]
    made = [kind for kind in kinds if isinstance(kind, Sparse)]
    assert len(made) > 2 and all(isinstance(kind.kept, inner) for kind in made)
    outputs, wanted = everything()(model), everything()(jax.jit(plain)(model))
  for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
  'family, sizes, entries',
  [
    ('llama', MESH, ('*=1:2', 'head*=1:2')),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ('mixtral', EXPERTS, ('*=1:2+int8',)),
        ('deepseek_v3', MESH, ('*.down=2:4', '*=1:2')),
        ('t5', {}, ('*=2:4', 'head*=2:4')),
        ('gemma2', MESH, ('*=1:2+int4:group=2',)),
        ('bert', MESH, ('*=2:4',)),
      )
    ),
  ],
  ids=str,
)
def test_a_sparse_model_is_that_of_its_numbers(family, sizes, entries):
  check(family, sizes, *entries, inner=object)


def test_what_stays_is_stored_by_another_scheme(one_device):
  """2:4 of int4: the codes are of the numbers that stay, nearest to them."""
  x = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
  p = nnx.Param(jnp.asarray(x), axes=('embed', 'feed_forward'), kind='matrix', inputs=1, wide=False)
  config = ModelConfig(**laws.TINY)
  model = jax.jit(functools.partial(transformer.init, config, 0))()
  model.stack.blocks[0].feed_forward.up = p
  made = stored(model, ('*.up=2:4+int4:group=8',)).stack.blocks[0].feed_forward.up.get_value()
  assert isinstance(made.kept, Codes) and made.kept.blocks == (8, 1)
  numbers, kept = np.asarray(made.numbers('float32')), left(x, 2, 4, 0)
  assert ((numbers == 0) | (kept != 0)).all()
  step = np.repeat(np.abs(kept).reshape(2, 16, 6).max(1) / 7, 16, 0)
  assert (np.abs(numbers - kept) <= step / 2 * (1 + 1e-5)).all()
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


def test_a_group_is_on_one_device():
  """8 numbers of a device are one byte of places of 2:4; 4 are half of one."""
  config = ModelConfig(**laws.TINY | {'feed_forward': 32})
  for tensor, message in ((4, ''), (8, r"32 numbers along 'feed_forward' .* of 8 on each of 8")):
    mesh = make_mesh(MeshConfig(tensor=tensor), jax.devices()[:tensor])
    with jax.set_mesh(mesh):
      model = transformer.init
      build = functools.partial(model, config.with_execution(stored=('*.down=2:4',)), 0)
      if not message:
        jax.eval_shape(build)
        continue
      config = ModelConfig(**laws.TINY | {'feed_forward': 32, 'heads': 8, 'vocabulary': 64})
      build = functools.partial(model, config.with_execution(stored=('*.down=2:4',)), 0)
      with pytest.raises(ValueError, match=message):
        jax.eval_shape(build)
