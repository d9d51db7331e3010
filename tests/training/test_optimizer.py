"""Do optimizers, schedules and clipping do what optax, arithmetic and linear algebra say they
should?
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, PartitionSpec as P

from training import muon, optimizer as opt
from training.optimizer import OptimizerConfig

STEPS = 20
orthogonalize = jax.jit(muon.orthogonalize)


@dataclasses.dataclass(frozen=True)
class Spec:
  axes: tuple
  kind: str
  inputs: int = 1


SPECS = {
  'embedding': Spec(('vocab', 'embed'), 'embedding'),
  'q': Spec(('layers', 'embed', 'heads', 'head_width'), 'matrix'),
  'o': Spec(('layers', 'heads', 'head_width', 'embed'), 'matrix', 2),
  'up': Spec(('layers', 'embed', 'feed_forward'), 'matrix'),
  'bias': Spec(('layers', 'heads', 'head_width'), 'vector'),
  'norm': Spec(('layers', 'norm'), 'vector'),
  'mixer': Spec(('embed', 'feed_forward'), 'matrix'),
  'head': Spec(('embed', 'vocab'), 'matrix'),
}
SHAPES = {
  'embedding': (64, 32),
  'q': (3, 32, 4, 16),
  'o': (3, 4, 16, 32),
  'up': (3, 32, 128),
  'bias': (3, 4, 16),
  'norm': (3, 32),
  'mixer': (32, 48),
  'head': (32, 64),
}
MESH_AXES = {'vocab': 'tensor', 'embed': 'fsdp', 'heads': 'tensor', 'feed_forward': 'tensor'}


def random_tree(seed, shapes=SHAPES):
  def rng(name):
    return np.random.default_rng([seed, *name.encode()])

  return {
    name: jnp.asarray(rng(name).normal(size=shape), jnp.float32) for name, shape in shapes.items()
  }


def run(transformation, params, steps=2, seed=10):
  """Parameters after a few steps on random gradients that keep each parameter's sharding."""

  @jax.jit
  def step(params, state, grads):
    updates, state = transformation.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.jit(transformation.init)(params)
  for i in range(steps):
    grads = random_tree(seed + i, {name: p.shape for name, p in params.items()})
    params, state = step(
      params, state, {name: jax.device_put(g, params[name].sharding) for name, g in grads.items()}
    )
  return params, state


def close(actual, expected, tolerance=2e-6):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)

  def check(a, b):
    return np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)

  jax.tree.map(check, actual, expected)


REFERENCES = {
  'adamw': lambda lr, mask: optax.adamw(lr, 0.8, 0.9, 1e-6, weight_decay=0.3, mask=mask),
  'lion': lambda lr, mask: optax.lion(lr, 0.8, 0.9, weight_decay=0.3, mask=mask),
  'sgd': lambda lr, mask: optax.chain(
    optax.trace(0.7), optax.add_decayed_weights(0.3, mask), optax.scale_by_learning_rate(lr)
  ),
}
GIVEN = {
  'adamw': dict(b1=0.8, b2=0.9, epsilon=1e-6, weight_decay=0.3),
  'lion': dict(b1=0.8, b2=0.9, weight_decay=0.3),
  'sgd': dict(momentum=0.7, weight_decay=0.3),
}


@pytest.mark.parametrize('name', REFERENCES)
def test_equals_optax(name):
  config = OptimizerConfig(
    name=name, learning_rate=0.05, schedule='linear', warmup_steps=2, **GIVEN[name]
  )
  params = random_tree(0)
  mask = {name: spec.kind != 'vector' for name, spec in SPECS.items()}
  reference = REFERENCES[name](opt.make_schedule(config, STEPS), mask)
  ours, theirs = opt.make_optimizer(config, STEPS, SPECS), reference
  states, both = [ours.init(params), theirs.init(params)], [params, params]
  steps = jax.jit(ours.update), jax.jit(theirs.update)
  for step in range(4):
    grads = random_tree(step + 1)
    for i, update in enumerate(steps):
      updates, states[i] = update(grads, states[i], both[i])
      both[i] = optax.apply_updates(both[i], updates)
  close(*both)


# A head of 64, three layers; as matrices of one layer, which optax is given.
TALL = {
  'embedding': (160, 128),
  'q': (3, 128, 2, 64),
  'o': (3, 2, 64, 160),
  'up': (3, 128, 32),
  'norm': (3, 160),
  'experts': (3, 2, 128, 192),
  'head': (128, 160),
}
AS_MATRICES = {
  'embedding': (160, 128),
  'q': (128, 128),
  'o': (128, 160),
  'up': (128, 32),
  'norm': (160,),
  'experts': (128, 192),
  'head': (128, 160),
}
TALL_SPECS = {
  **{name: SPECS[name] for name in TALL if name in SPECS},
  'experts': Spec(('layers', 'experts', 'embed', 'feed_forward'), 'matrix'),
}


@pytest.mark.slow
def test_adafactor_is_optax_on_each_matrix_of_each_layer():
  config = OptimizerConfig(
    name='adafactor', learning_rate=0.05, schedule='linear', warmup_steps=2, weight_decay=0.0
  )
  ours = opt.make_optimizer(config, STEPS, TALL_SPECS)
  # Optax's own Adafactor decays weights by the rate alone, not times the learning rate: compared
  # without decay.
  theirs = optax.adafactor(opt.make_schedule(config, STEPS), multiply_by_parameter_scale=False)

  def parted(tree):
    return {name: list(x.reshape(-1, *AS_MATRICES[name])) for name, x in tree.items()}

  params = random_tree(0, TALL)
  both, states = [params, parted(params)], [ours.init(params), theirs.init(parted(params))]
  for step in range(4):
    # Layers of gradients unlike in size: what they shared would show.
    grads = {
      name: g * 10.0 ** np.arange(len(g)).reshape(-1, *(1,) * (g.ndim - 1))
      if TALL_SPECS[name].axes[0] == 'layers'
      else g
      for name, g in random_tree(step + 1, TALL).items()
    }
    for i, (optimizer, noise) in enumerate(((ours, grads), (theirs, parted(grads)))):
      updates, states[i] = jax.jit(optimizer.update)(noise, states[i], both[i])
      both[i] = optax.apply_updates(both[i], updates)
  close(parted(both[0]), both[1])


def test_adafactor_factors_heads_of_64():
  state = opt.make_optimizer(OptimizerConfig(name='adafactor'), STEPS, TALL_SPECS).init(
    random_tree(0, TALL)
  )
  squares = state[0].squares
  assert squares['q'].rows.shape == (3, 128) and squares['q'].columns.shape == (3, 2, 64)
  assert squares['o'].rows.shape == (3, 2, 64) and squares['o'].columns.shape == (3, 160)
  assert squares['experts'].rows.shape == (3, 2, 128)
  assert squares['embedding'].rows.shape == (160,)
  # What is too narrow, and what is no matrix, is kept whole.
  assert squares['up'].elements.shape == TALL['up'] and squares['norm'].elements.shape == (3, 160)


@pytest.mark.costly
@pytest.mark.parametrize(
  'name',
  [pytest.param(n, marks=[pytest.mark.slow] * (n == 'adam8bit')) for n in opt.OPTIMIZERS],
)
def test_layers_that_are_stacked_are_updated_as_if_each_were_alone(name):
  config = OptimizerConfig(name=name, learning_rate=0.05)

  def parted(tree, specs=False):
    return {
      (key, layer): x if specs else x[layer : layer + 1]
      for key, x in tree.items()
      for layer in range(TALL[key][0] if TALL_SPECS[key].axes[0] == 'layers' else 0)
    }

  stacked = {key: spec for key, spec in TALL_SPECS.items() if spec.axes[0] == 'layers'}
  params = {key: x for key, x in random_tree(0, TALL).items() if key in stacked}
  together = opt.make_optimizer(config, STEPS, stacked)
  alone = opt.make_optimizer(config, STEPS, parted(stacked, specs=True))
  states, both = [together.init(params), alone.init(parted(params))], [params, parted(params)]
  for step in range(3):
    grads = {
      key: g * 10.0 ** np.arange(len(g)).reshape(-1, *(1,) * (g.ndim - 1))
      for key, g in random_tree(step + 1, TALL).items()
      if key in stacked
    }
    for i, (optimizer, noise) in enumerate(((together, grads), (alone, parted(grads)))):
      updates, states[i] = jax.jit(optimizer.update)(noise, states[i], both[i])
      both[i] = optax.apply_updates(both[i], updates)
  close(parted(both[0]), both[1], 1e-4 if name == 'muon' else 2e-6)


def test_adamw_first_step_by_hand():
  config = OptimizerConfig(learning_rate=0.1, schedule='constant', weight_decay=0.5)
  specs = {'w': Spec(('embed', 'feed_forward'), 'matrix'), 'b': Spec(('feed_forward',), 'vector')}
  params = {'w': jnp.full((2, 2), 4.0), 'b': jnp.full((2,), 4.0)}
  grads = {'w': jnp.full((2, 2), -3.0), 'b': jnp.full((2,), 3.0)}
  transformation = opt.make_optimizer(config, STEPS, specs)
  updates, _ = transformation.update(grads, transformation.init(params), params)
  # Adam's first step is the sign of the gradient; the matrix adds decay 0.1 * 0.5 * 4.
  close(updates, {'w': jnp.full((2, 2), 0.1 - 0.2), 'b': jnp.full((2,), -0.1)})


@pytest.mark.parametrize('name', opt.OPTIMIZERS)
def test_decays_matrices_and_embeddings_only(name):
  used = ('embedding', 'up', 'bias', 'norm')
  params, specs = ({n: tree[n] for n in used} for tree in (random_tree(0), SPECS))
  zeros = jax.tree.map(jnp.zeros_like, params)
  config = OptimizerConfig(name=name, learning_rate=0.1, schedule='constant', weight_decay=0.5)
  transformation = opt.make_optimizer(config, STEPS, specs)
  updates, _ = jax.jit(transformation.update)(zeros, jax.jit(transformation.init)(params), params)
  # With no gradient at all, decay is the whole update, whatever the optimizer.
  expected = {
    name: -0.05 * params[name] if spec.kind != 'vector' else zeros[name]
    for name, spec in specs.items()
  }
  close(updates, expected)


@pytest.mark.parametrize('name', ['adam8bit', 'muon'])
def test_nnx_module_as_parameters(name):
  class Block(nnx.Module):
    def __init__(self, make):
      self.up, self.norm, self.nothing = make('up'), make('norm'), None

  class Model(nnx.Module):
    def __init__(self, make):
      self.block, self.embedding = Block(make), make('embedding')

    def __call__(
      self, x
    ):  # Callable, so that a mask of its structure could be mistaken for a function.
      raise AssertionError('the model must not be called')

  values, config = random_tree(0), OptimizerConfig(name=name)
  used = ('up', 'norm', 'embedding')
  model = Model(lambda name: nnx.Param(values[name], spec=SPECS[name]))
  flat, _ = run(
    opt.make_optimizer(config, STEPS, {n: SPECS[n] for n in used}), {n: values[n] for n in used}
  )
  noise = [random_tree(10 + step, {n: SHAPES[n] for n in used}) for step in range(2)]
  grads = [Model(lambda name: nnx.Param(noise[step][name], spec=SPECS[name])) for step in range(2)]
  paths = {'up': '.block.up', 'norm': '.block.norm', 'embedding': '.embedding'}
  in_place_of_parameters = jax.tree.map(
    lambda p: p.spec, model, is_leaf=lambda x: isinstance(x, nnx.Param)
  )
  inside_parameters = Model(lambda name: nnx.Param(SPECS[name], spec=SPECS[name]))
  for specs in (
    (in_place_of_parameters, inside_parameters) if name == 'muon' else (in_place_of_parameters,)
  ):
    transformation = opt.make_optimizer(config, STEPS, specs)
    state, trained = jax.jit(transformation.init)(model), model
    update = jax.jit(transformation.update)
    for grad in grads:
      updates, state = update(grad, state, trained)
      trained = optax.apply_updates(trained, updates)
    by_path = {
      jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(trained)
    }
    close({n: by_path[f'{paths[n]}.value'] for n in used}, flat)


# Schedules.


def test_schedule_key_points():
  def at(steps=100, **fields):
    schedule = opt.make_schedule(OptimizerConfig(learning_rate=2.0, **fields), steps)
    return lambda step: float(schedule(step))

  for name in opt.SCHEDULES:
    lr = at(schedule=name, warmup_steps=9)
    np.testing.assert_allclose([lr(0), lr(4), lr(9)], [0.2, 1.0, 2.0], rtol=1e-6)
    assert at(schedule=name)(0) == 2.0
  cosine = at(schedule='cosine', warmup_steps=20, final_fraction=0.1)
  np.testing.assert_allclose(
    [cosine(60), cosine(100), cosine(200)], [(2.0 + 0.2) / 2, 0.2, 0.2], rtol=1e-6
  )
  linear = at(schedule='linear', warmup_steps=20)
  np.testing.assert_allclose(
    [linear(40), linear(60), linear(99), linear(100)], [1.5, 1, 0.025, 0], atol=1e-6
  )
  wsd = at(schedule='wsd', warmup_steps=20, decay_fraction=0.4, final_fraction=0.5)
  np.testing.assert_allclose(
    [wsd(20), wsd(60), wsd(80), wsd(100), wsd(150)], [2, 2, 1.5, 1, 1], rtol=1e-6
  )
  assert at(schedule='constant', warmup_steps=20)(99) == 2.0


@given(name=st.sampled_from(list(opt.SCHEDULES)), steps=st.integers(1, 300), data=st.data())
@settings(max_examples=40, deadline=None)
def test_schedule_rises_to_the_peak_and_never_rises_again(name, steps, data):
  warmup = data.draw(st.integers(0, (steps - 1) * 2 // 3))
  schedule = opt.make_schedule(
    OptimizerConfig(learning_rate=1.0, schedule=name, warmup_steps=warmup), steps
  )
  lr = np.asarray(jax.vmap(schedule)(jnp.arange(300)))[:steps]
  assert (lr > 0).all(), 'a step with learning rate 0 is a step wasted'
  assert np.argmax(lr) == warmup and lr[warmup] == 1.0
  assert (np.diff(lr[: warmup + 1]) > 0).all() and (np.diff(lr[warmup:]) <= 1e-7).all()


def test_schedule_that_does_not_fit():
  with pytest.raises(
    ValueError, match=r'warmup_steps=50 plus a final decay of 60 steps do not fit into 100 steps'
  ):
    opt.make_schedule(OptimizerConfig(schedule='wsd', warmup_steps=50, decay_fraction=0.6), 100)
  with pytest.raises(ValueError, match='fewer warm-up steps'):
    opt.make_schedule(OptimizerConfig(warmup_steps=100), 100)
  with pytest.raises(ValueError, match='decay_fraction=0.01 of 20 steps is no step.* least 0.05'):
    opt.make_schedule(OptimizerConfig(schedule='wsd', decay_fraction=0.01), 20)


# Clipping.


@given(scale=st.floats(1e-3, 1e3), max_norm=st.floats(1e-2, 1e2))
@settings(max_examples=30, deadline=None)
def test_clip_equals_optax(scale, max_norm):
  grads = jax.tree.map(lambda g: g * scale, random_tree(1, {'w': (8, 8), 'b': (8,)}))
  expected, _ = optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())
  clipped = opt.clip(grads, optax.tree.norm(grads), max_norm)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, expected)
  assert float(optax.tree.norm(clipped)) <= max_norm * 1.0001


def test_clip_off_and_not_finite():
  grads = random_tree(1)
  assert opt.clip(grads, optax.tree.norm(grads), 0.0) is grads
  bad = {'a': jnp.array([jnp.nan, 1.0])}
  clipped = opt.clip(bad, optax.tree.norm(bad), 1.0)
  assert not np.isfinite(np.asarray(clipped['a'])).any(), 'a NaN must not be clipped away'


# Muon.


def test_orthogonalize_keeps_directions_and_levels_singular_values():
  rng = np.random.default_rng(0)
  for shape in ((2, 32, 96), (2, 96, 32), (1, 64, 64)):
    # Condition number 30, as of a gradient after the first layers of a network; magnitude must not
    # matter.
    left, _ = np.linalg.qr(rng.normal(size=(shape[0], shape[1], min(shape[1:]))))
    right, _ = np.linalg.qr(rng.normal(size=(shape[0], shape[2], min(shape[1:]))))
    values = np.geomspace(1, 1 / 30, min(shape[1:]))
    x = left * values @ right.mT
    for magnitude in (1e-12, 1.0, 1e9):
      y = np.asarray(orthogonalize(jnp.asarray(x * magnitude, jnp.float32)))
      singular = np.linalg.svd(y, compute_uv=False)
      assert 0.65 < singular.min() and singular.max() < 1.25, (singular.min(), singular.max())
      core = left.mT @ y @ right
      assert abs(core - core * np.eye(core.shape[-1])).max() < 1e-3, 'singular vectors must stay'
  assert not np.asarray(orthogonalize(jnp.zeros((1, 4, 8)))).any()


def test_orthogonalize_equals_optax():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 40)), jnp.float32)
  reference = optax.contrib.scale_by_muon(
    nesterov=False, weight_dimension_numbers={'w': optax.contrib.MuonDimensionNumbers(1, 2)}
  )
  updates, _ = reference.update({'w': x}, reference.init({'w': x}))
  np.testing.assert_allclose(orthogonalize(x), updates['w'], rtol=1e-4, atol=1e-5)


def test_muon_splits_parameters_and_updates_layer_by_layer():
  matrices = {'q': (32, 64), 'o': (64, 32), 'mixer': (32, 48)}
  others = ('embedding', 'head', 'norm')
  trees = random_tree(0), random_tree(1), SPECS
  params, grads, specs = ({n: tree[n] for n in (*matrices, *others)} for tree in trees)
  config = OptimizerConfig(
    name='muon', learning_rate=0.1, schedule='constant', weight_decay=0.0, adam_ratio=0.5
  )
  transformation = opt.make_optimizer(config, STEPS, specs)
  updates, _ = jax.jit(transformation.update)(grads, transformation.init(params), params)
  for name in others:  # Adam's first step, at its own learning rate.
    close(updates[name], -0.05 * grads[name] / (abs(grads[name]) + 1e-8))
  for name, shape in matrices.items():
    g, u = (np.asarray(tree[name]).reshape(-1, *shape) for tree in (grads, updates))
    for layer in range(len(g)):
      expected = -0.1 * 0.2 * max(shape) ** 0.5 * np.asarray(orthogonalize(g[layer : layer + 1]))[0]
      np.testing.assert_allclose(u[layer], expected, rtol=1e-3, atol=1e-5)
    # The RMS that AdamW's updates have, whatever the shape (arXiv:2502.16982, section 2.2).
    assert 0.15 < np.sqrt(np.mean(u**2)) / 0.1 < 0.25


@pytest.mark.parametrize('sizes', [(1, 1), (2, 4)])
def test_muon_sees_every_expert_as_a_matrix(sizes):
  spec, values = (
    Spec(('layers', 'experts', 'embed', 'feed_forward'), 'matrix'),
    np.random.default_rng(0).normal(size=(3, 2, 16, 24)),
  )
  transformation = muon.scale_by_muon(0.0, {'w': spec})
  with jax.set_mesh(mesh(sizes)):
    grads = {'w': jax.device_put(jnp.asarray(values, jnp.float32), P(None, None, 'fsdp', 'tensor'))}
    updates, _ = jax.jit(transformation.update)(grads, transformation.init(grads))
    assert updates['w'].sharding.is_equivalent_to(grads['w'].sharding, 4)
  for layer, expert in np.ndindex(3, 2):
    expected = (
      0.2 * 24**0.5 * orthogonalize(jnp.asarray(values[layer, expert][None], jnp.float32))[0]
    )
    np.testing.assert_allclose(updates['w'][layer, expert], expected, rtol=1e-3, atol=1e-4)


def test_muon_momentum_is_nesterov():
  spec, params = {'w': Spec(('embed', 'feed_forward'), 'matrix')}, {'w': jnp.zeros((8, 8))}
  first, second = (
    jnp.asarray(np.random.default_rng(i).normal(size=(8, 8)), jnp.float32) for i in range(2)
  )
  transformation = muon.scale_by_muon(0.9, spec)
  _, state = transformation.update({'w': first}, transformation.init(params))
  updates, _ = transformation.update({'w': second}, state)
  # Jordan's form: buffer = 0.9 buffer + 0.1 g; direction = 0.9 buffer + 0.1 g.
  direction = 0.9 * (0.9 * 0.1 * first + 0.1 * second) + 0.1 * second
  np.testing.assert_allclose(
    updates['w'], 0.2 * 8**0.5 * orthogonalize(direction[None])[0], rtol=1e-3, atol=1e-4
  )


# Sharding.


def mesh(sizes, axis_type=AxisType.Explicit):
  return jax.make_mesh(sizes, ('fsdp', 'tensor'), axis_types=(axis_type,) * 2)


def sharded(params):
  return {
    name: jax.device_put(x, P(*(MESH_AXES.get(axis) for axis in SPECS[name].axes)))
    for name, x in params.items()
  }


@pytest.mark.costly
@pytest.mark.parametrize('name', opt.OPTIMIZERS)
def test_sharded_equals_one_device(name):
  used = ('embedding', 'q', 'norm')
  params, specs = ({n: tree[n] for n in used} for tree in (random_tree(0), SPECS))
  transformation = opt.make_optimizer(OptimizerConfig(name=name, learning_rate=0.01), STEPS, specs)
  expected, _ = run(transformation, params)
  with jax.set_mesh(mesh((2, 4))):
    placed = sharded(params)
    actual, state = run(transformation, placed)
    assert jax.tree.map(jax.typeof, actual) == jax.tree.map(jax.typeof, placed), (
      'parameters must stay where they are'
    )
    initial = jax.jit(transformation.init)(placed)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, initial), (
      'state must stay where it is born'
    )
    for leaf in jax.tree.leaves(initial):
      assert leaf.size < 1000 or not leaf.sharding.is_fully_replicated, (
        f'{leaf.shape} is replicated'
      )
  # Codes round: where the last bit differs, one may tip over.
  close(actual, expected, 5e-3 if name == 'adam8bit' else 1e-5)


@pytest.mark.parametrize(
  'name, shape, spec',
  [
    ('q', (8, 32, 4, 16), P(None, ('fsdp', 'tensor'))),
    (
      'q',
      (4, 32, 4, 16),
      P('fsdp', None, 'tensor'),
    ),  # As by pipeline stages; half of the mesh gets layers of zeros.
    ('mixer', (32, 48), P('tensor', 'fsdp')),
  ],
)
def test_muon_moves_whole_layers_without_gathering(name, shape, spec):
  values = random_tree(0, {name: shape})
  transformation = muon.scale_by_muon(0.95, {name: SPECS[name]})
  expected, _ = jax.jit(transformation.update)(values, transformation.init(values))
  with jax.set_mesh(mesh((2, 4))):
    grads = {name: jax.device_put(values[name], spec)}
    state = transformation.init(grads)
    update = jax.jit(transformation.update).lower(grads, state).compile()
    actual, _ = update(grads, state)
  close(actual, expected, 1e-5)
  text = update.as_text()
  assert 'all-to-all' in text and 'all-gather' not in text and 'all-reduce' not in text


def test_muon_under_auto_axes():
  params = {'q': random_tree(0)['q']}
  transformation = muon.scale_by_muon(0.95, {'q': SPECS['q']})
  expected, _ = run(transformation, params)
  with jax.set_mesh(mesh((2, 4), AxisType.Auto)):
    actual, _ = run(transformation, sharded(params))
  close(actual, expected, 1e-4)


# Errors.


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(name='adamv'), "did you mean 'adamw'"),
    (dict(schedule='cosin'), "did you mean 'cosine'"),
    (dict(learning_rate=0.0), r'learning_rate=0.0 must be finite and above 0'),
    (dict(learning_rate=float('nan')), 'learning_rate=nan'),
    (dict(b2=1.0), r'b2=1.0 must be a decay rate, at least 0 and below 1'),
    (dict(clip_norm=-2.0), 'clip_norm=-2.0 must be finite and at least 0'),
    (dict(warmup_steps=-1), 'warmup_steps=-1'),
    (dict(schedule='wsd', decay_fraction=1.5), 'decay_fraction=1.5 must be a share from 0 to 1'),
    (
      dict(momentum=0.9),
      r"momentum=0.9 would not be read by 'adamw'.*by muon, sgd.*leave it at -1",
    ),
    (dict(schedule='constant', final_fraction=0.1), 'final_fraction=0.1 would not be read'),
  ],
)
def test_config_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    OptimizerConfig(**fields)


@pytest.mark.parametrize(
  'spec, message',
  [
    (Spec(('embed', 'feed_forward'), 'matrx'), "layer.w: kind 'matrx' is unknown"),
    (
      Spec(('layers', 'embed', 'feed_forward'), 'matrix', 2),
      'inputs=2, but a matrix .* at least 1 and at most 1',
    ),
    (Spec(('embed', 'layers'), 'vector'), "must name 'layers' first"),
  ],
)
def test_spec_errors(spec, message):
  with pytest.raises(ValueError, match=message):
    opt.make_optimizer(OptimizerConfig(), STEPS, {'layer': {'w': spec}})


def test_muon_without_matrices():
  with pytest.raises(ValueError, match="use 'adamw'"):
    opt.make_optimizer(
      OptimizerConfig(name='muon'), STEPS, {'norm': SPECS['norm'], 'head': SPECS['head']}
    )
