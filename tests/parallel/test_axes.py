"""Does the one table of logical axes refuse what it does not know,
and what would split one mesh axis twice?
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from parallel import axes as ax
from parallel.mesh import AXES, MeshConfig, make_mesh


def test_specs():
  assert ax.spec() == P()
  assert ax.spec('batch', 'length', 'width') == P(('data', 'fsdp', 'expert'), 'context', None)
  assert ax.spec('embed', None, 'heads') == P(('fsdp', 'expert', 'context'), None, 'tensor')
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2))):  # axes of size 1 are left out
    assert ax.spec('batch', 'sequence', 'width') == P(('data', 'fsdp'), 'tensor', None)
    assert ax.spec('embed', 'heads') == P('fsdp', 'tensor')
    assert ax.mesh_axes('batch', 'length') == ('data', 'fsdp') and ax.size('batch', 'sequence') == 8
    assert ax.residual(6) == ('batch', 'sequence', 'width') and ax.residual(1) == (
      'batch',
      'length',
      'width',
    )


def test_rows_that_are_whole():
  """Tokens of a row are on all devices of `context`, slots and parameters stay split;
  a jitted function is traced for each.
  """

  @jax.jit
  def laid_out():
    return ax.place(jnp.zeros((4, 8)), 'length', 'embed'), ax.place(
      jnp.zeros((8, 4)), 'sequence', 'slots'
    )

  with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4, tensor=2))):
    with pytest.raises(ValueError, match='both map to mesh axis .context'):
      laid_out()
    with ax.whole_rows(True):
      assert (
        ax.size('length') == 1
        and ax.size('sequence') == 2
        and ax.size('slots') == ax.size('embed') == 4
      )
      assert ax.residual(2) == ('batch', 'sequence', 'width')
      assert [x.sharding.spec for x in laid_out()] == [P(None, 'context'), P('tensor', 'context')]


@pytest.mark.parametrize(
  'axes, words',
  [
    (('embd',), r"logical axis='embd' is unknown; did you mean 'embed'\? Known: batch"),
    (('heads', 'vocab'), r"'heads' and 'vocab' of .* both map to mesh axis 'tensor'"),
    (('batch', 'embed'), r"'batch' and 'embed' of .* both map to mesh axis 'fsdp'"),
    (('embed', 'embed'), r"both map to mesh axis 'fsdp'"),
  ],
)
def test_unknown_names_and_collisions_raise(axes, words):
  with pytest.raises(ValueError, match=words):
    ax.spec(*axes)


def test_the_table_names_mesh_axes_only():
  for entry in ax.RULES.values():
    assert entry is None or set(entry if isinstance(entry, tuple) else (entry,)) <= set(AXES)


@pytest.mark.parametrize('axis_type', [None, AxisType.Explicit, AxisType.Auto], ids=str)
def test_helpers_lay_out_alike_on_every_kind_of_mesh(axis_type):
  x, w = jnp.arange(32.0).reshape(8, 4), jnp.arange(16.0).reshape(4, 4)

  @jax.jit
  def run(x, w):
    x, w = ax.place(x, 'batch', 'width'), ax.place(w, 'embed', 'heads')
    hidden = jnp.einsum('BD,DN->BN', x, ax.gather(w, 'embed', 'heads'))
    return (
      x,
      w,
      ax.einsum('BN,ND->BD', hidden, ax.gather(w.T, 'heads', 'embed'), ('batch', 'width')),
    )

  if axis_type is None:
    assert not ax.explicit() and ax.out('batch') is None
    _, _, product = run(x, w)
  else:
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), axis_type=axis_type)):
      assert ax.explicit() == (axis_type == AxisType.Explicit)
      placed, weight, product = run(x, w)
    shards = [a.addressable_shards[0].data.shape for a in (placed, weight, product)]
    assert shards == [(2, 4), (2, 2), (2, 4)]
  np.testing.assert_allclose(product, x @ w @ w.T)


def test_local_runs_on_shards():
  x = jnp.arange(32.0).reshape(8, 4)

  def rows(x):
    return (x - x[:1], {'rows': jnp.float32(x.shape[0])})

  outputs = (('batch', 'width'), {'rows': ()})
  whole, counts = ax.local(rows, (('batch', 'width'),), outputs)(x)
  assert counts['rows'] == 8 and float(whole[7, 0]) == 28
  with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
    parts, counts = jax.jit(
      lambda x: ax.local(rows, (('batch', 'width'),), outputs)(ax.place(x, 'batch', 'width'))
    )(x)
  assert counts['rows'] == 2 and np.asarray(parts)[:, 0].tolist() == [0, 4] * 4


@pytest.mark.parametrize(
  'formula, x, y',
  [
    ('BTD,DF->BTF', (2, 3, 4), (4, 5)),
    ('BTD,DNH->BTNH', (2, 3, 4), (4, 3, 2)),
    ('BTNH,NHD->BTD', (2, 3, 4, 2), (4, 2, 5)),
    ('...D,VD->...V', (2, 1, 4), (5, 4)),
    ('...D,DF->...F', (4,), (4, 5)),
    ('BTD,DF->BTF', (0, 3, 4), (4, 5)),
    ('BTNR,RNH->BTNH', (2, 3, 4, 5), (5, 4, 2)),
    ('BTNH,RNH->BTNR', (2, 3, 4, 5), (6, 4, 5)),
  ],
)
def test_a_product_is_what_its_formula_says(formula, x, y):
  draw = np.random.default_rng(0)
  x, y = draw.normal(size=x), draw.normal(size=y)
  expected = np.einsum(formula, x, y)
  run = jax.jit(functools.partial(ax.product, formula))
  result = run(jnp.float32(x), jnp.float32(y))
  assert result.shape == expected.shape
  np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)

  # Linear in both: along a step, the slope of a weighted sum is the sum at the step.
  weights = draw.normal(size=expected.shape)
  slopes = jax.grad(lambda *given: (run(*given) * weights).sum(), (0, 1))(
    jnp.float32(x), jnp.float32(y)
  )
  steps = [draw.normal(size=given.shape) for given in (x, y)]
  sums = np.einsum(formula, steps[0], y), np.einsum(formula, x, steps[1])
  for slope, step, at_step in zip(slopes, steps, sums, strict=True):
    along = (np.float64(slope) * step).sum()
    assert along == pytest.approx((at_step * weights).sum(), rel=1e-4, abs=1e-4)


def test_a_gradient_sums_over_tokens_without_a_transposed_copy():
  """On a CPU, where XLA would write one of what is as large as the result."""

  def total(w, x):
    return jnp.square(ax.product('BTD,DF->BTF', x, w)).sum()

  w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 48), (4, 8, 16)))
  text = jax.jit(jax.grad(total)).lower(w, x).compile().as_text()
  assert 'f32[16,48]' in text and 'f32[48,32]' not in text and 'f32[48,4,8]' not in text
