"""Does every memory policy give the gradients of none, keep what its name says,
and refuse what it does not know?
"""

import dataclasses
import functools
import re

import jax
import jax.ad_checkpoint
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from model import transformer
from model.config import ModelConfig, MoEConfig
from model.params import named_leaves
from parallel import remat
from parallel.remat import NAMES, POLICIES, Remat

CONFIG = ModelConfig(
  vocabulary=32,
  width=16,
  layers=5,
  heads=2,
  feed_forward=24,
  max_length=8,
  gated=True,
  qk_norm=True,
)
KEPT = [
  {'remat': 'full'},
  {'remat': 'sqrt'},
  {'remat': 'dots'},
  pytest.param({'remat': 'full', 'remat_save': ('attention', 'up')}, marks=pytest.mark.slow),
  {'remat': 'full', 'remat_save': ('query',), 'remat_offload': ('block', 'attention')},
  {'remat': 'sqrt', 'remat_offload': ('gate',)},
  {'remat': 'dots', 'remat_save': ('attention',)},
]


@functools.cache
def leaves():
  return jax.tree.leaves(jax.jit(transformer.init, static_argnums=(0, 1))(CONFIG, 0))


@functools.cache
def gradients(config):
  structure = jax.tree.structure(jax.eval_shape(lambda: transformer.init(config, 0)))
  model = jax.tree.unflatten(structure, leaves())
  tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)

  def loss(model):
    return jnp.sum(jnp.sin(model.logits(model(tokens).hidden)))

  return named_leaves(jax.jit(jax.value_and_grad(loss))(model))


@pytest.mark.costly
@pytest.mark.parametrize('kept', KEPT, ids=str)
def test_every_policy_is_none(kept, one_device):
  expected = gradients(CONFIG)
  for name, found in gradients(CONFIG.with_execution(**kept)).items():
    largest = np.abs(
      expected[name]
    ).max()  # elements are sums of terms as large: what is computed anew may round otherwise
    np.testing.assert_allclose(
      found, expected[name], rtol=1e-5, atol=1e-6 * max(1, largest), err_msg=name
    )


@pytest.mark.costly
@pytest.mark.parametrize('n', (1, 3, 4, 7, 9))
def test_groups_of_layers_are_a_scan_of_all(n):
  layers = {
    'w': jnp.linspace(0.5, 1.5, n)[:, None] * jnp.ones((n, 3)),
    'b': jnp.arange(3.0 * n).reshape(n, 3),
  }

  def step(x, layer):
    x = jnp.sin(x * layer['w'] + layer['b'])
    return x, {'sum': x.sum(), 'x': x}

  def run(policy):
    return jax.value_and_grad(
      lambda x, layers: sum(
        map(jnp.sum, jax.tree.leaves(remat.scan(step, x, layers, Remat(policy))))
      ),
      (0, 1),
    )(jnp.arange(3.0), layers)

  for found, expected in zip(
    jax.tree.leaves(run('sqrt')), jax.tree.leaves(run('none')), strict=True
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-6)
  for found, expected in zip(
    jax.tree.leaves(remat.scan(step, jnp.arange(3.0), layers, Remat('sqrt'))),
    jax.tree.leaves(jax.lax.scan(step, jnp.arange(3.0), layers)),
    strict=True,
  ):
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_kept_inputs_grow_with_the_root_of_the_layers(one_device):
  """Temporary bytes of a wide residual stream through narrow layers:
  N layers' inputs with 'full', about 2 sqrt(N) with 'sqrt'.
  """

  def kept(policy, layers):
    config = dataclasses.replace(
      CONFIG.with_execution(remat=policy),
      width=64,
      heads=1,
      feed_forward=16,
      layers=layers,
      max_length=512,
    )
    model = jax.eval_shape(lambda: transformer.init(config, 0))
    tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    run = jax.jit(jax.grad(lambda model, tokens: jnp.sum(jnp.sin(model(tokens).hidden))))
    return run.lower(model, tokens).compile().memory_analysis().temp_size_in_bytes / (
      2 * 512 * 64 * 4
    )

  full, root = (kept(policy, 64) - kept(policy, 16) for policy in ('full', 'sqrt'))
  parameters = 48 * 0.35  # gradients of 48 more layers, in units of one layer's input
  assert 48 <= full <= 48 + 2 * parameters and root <= 2 * (8 - 4) + 2 * parameters + 2, (
    full,
    root,
  )


def names_in(jaxpr, found):
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'name':
      found.add(equation.params['name'])
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      names_in(inner, found)
  return found


def test_blocks_have_values_of_every_name_and_no_other(one_device):
  found = set()
  for config in (CONFIG, dataclasses.replace(CONFIG, moe=MoEConfig(experts=2, per_token=1))):
    model = jax.eval_shape(lambda config=config: transformer.init(config, 0))
    jaxpr = jax.make_jaxpr(lambda model: model(jnp.zeros((1, 8), jnp.int32)).hidden)(model).jaxpr
    emitted = names_in(jaxpr, set())
    assert emitted == set(NAMES) - ({'gate', 'up'} if config.E else set())
    found |= emitted
  assert found == set(NAMES)


@pytest.mark.parametrize(
  'kept, network, words',
  [
    ({'remat': 'ful'}, {}, f"remat='ful' is unknown; did you mean 'full'.*{', '.join(POLICIES)}"),
    (
      {'remat': 'full', 'remat_save': ('atention',)},
      {},
      f"remat_save='atention' is unknown; did you mean 'attention'.*{', '.join(NAMES)}",
    ),
    (
      {'remat': 'full', 'remat_offload': ('blocks',)},
      {},
      "remat_offload='blocks' is unknown; did you mean 'block'",
    ),
    ({'remat_save': ('up',)}, {}, "remat='none' keeps everything"),
    ({'remat': 'full', 'remat_save': ('up',), 'remat_offload': ('up',)}, {}, r"both name \['up'\]"),
    ({'remat': 'dots', 'remat_offload': ('up',)}, {}, "remat='dots' keeps products on the device"),
    (
      {'remat': 'full', 'remat_save': ('gate',)},
      {'gated': False},
      r"name \['gate'\], which no block of this model has; it has block",
    ),
    (
      {'remat': 'full', 'remat_save': ('up',)},
      {'moe': MoEConfig(experts=2, per_token=1)},
      r"\['up'\], which no block",
    ),
  ],
)
def test_unknown_and_contradictory_names_raise(kept, network, words):
  with pytest.raises(ValueError, match=re.compile(words, re.DOTALL)):
    dataclasses.replace(CONFIG, **network).with_execution(**kept)


@pytest.mark.parametrize(
  'config, saved',
  [(Remat(), 2), (Remat('dots'), 1), (Remat('full'), 0), (Remat('full', save=('up',)), 1)],
  ids=str,
)
def test_a_policy_keeps_what_it_says(config, saved, capsys):
  w = jnp.ones((4, 4))

  def function(x):
    return jnp.sin(remat.named(jnp.sin(x @ w), 'up')).sum()

  jax.ad_checkpoint.print_saved_residuals(remat.remat(function, config), w)
  lines = capsys.readouterr().out.splitlines()
  computed = [
    line for line in lines if 'from the argument' not in line and 'from a constant' not in line
  ]
  assert len(computed) == saved, computed
