"""Does the one table of logical axes refuse what it does not know,
and what would split one mesh axis twice?
"""

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
