"""Do tokens reach the experts that their router chose, and nothing else?
Three dispatches, a loop in numpy, many devices.
"""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, strategies as st
from jax.sharding import AxisType

from decode.generating import in_compute_dtype
from kernels import grouped_matmul_tpu
from model import moe as moe_module, params, transformer
from model.config import ModelConfig, MoEConfig
from model.execution import ExecutionConfig
from model.moe import MoE, moved, route
from model.params import abstract, named_leaves
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

D, F = 8, 12
CASES = {
  'mixtral': dict(experts=8, per_token=2),
  'qwen3': dict(experts=6, per_token=3, renormalise=False, balance_over='batch'),
  'deepseek v2': dict(
    experts=8,
    per_token=2,
    groups=4,
    groups_per_token=2,
    renormalise=False,
    scale=4.0,
    shared_feed_forward=8,
  ),
  'deepseek v3': dict(
    experts=8,
    per_token=3,
    router='sigmoid',
    selection_bias=True,
    groups=4,
    groups_per_token=2,
    scale=2.5,
    shared_feed_forward=8,
  ),
  'gpt-oss': dict(
    experts=5, per_token=2, biases='all', activation='clamped_silu', balance_over='batch'
  ),
  'biased': dict(
    experts=6, per_token=2, biases='all', activation='clamped_silu', shared_feed_forward=8
  ),
  'all experts': dict(
    experts=3, per_token=3, router='sigmoid', gated=False, biases='all', activation='gelu'
  ),
  'one expert': dict(experts=4, per_token=1, renormalise=False),
}
QUICK = ('deepseek v3', 'gpt-oss')
ACTIVATIONS = {  # of the oracle: (gate, up) -> h
  'silu': lambda gate, up: gate / (1 + np.exp(-gate)) * up,
  'gelu': lambda gate, up: up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))) / 2,
  'clamped_silu': lambda gate, up: (
    min_7(gate) / (1 + np.exp(-1.702 * min_7(gate))) * (np.clip(up, -7, 7) + 1)
  ),
}


def min_7(gate):
  return np.minimum(gate, 7)


DISPATCHES = ['dense', 'dropless', 'capacity']
# The laws hold for every dispatch; those that compile for long are tried on one,
# and on the others by `make test-all`.
MOSTLY_SLOW = [
  'dropless',
  pytest.param('dense', marks=pytest.mark.slow),
  pytest.param('capacity', marks=pytest.mark.slow),
]
MESHES = [
  {'data': 8},
  {'data': 1, 'fsdp': 8},
  {'data': 1, 'fsdp': 4, 'tensor': 2},
  {'data': 2, 'fsdp': 2, 'tensor': 2},
]


def make_config(case='mixtral', dispatch='dropless', **changes):
  fields = CASES[case] | {'capacity_factor': 100.0, 'balance_loss': 0.5, 'z_loss': 0.25} | changes
  model = {
    name: fields.pop(name)
    for name in ('biases', 'activation', 'gated', 'execution')
    if name in fields
  }
  return ModelConfig(width=D, feed_forward=F, moe=MoEConfig(dispatch=dispatch, **fields), **model)


def make_moe(config, layers=0, seed=0):
  """Every weight drawn anew, biases too; `layers` of them stacked, born under vmap."""
  make, key = lambda key: MoE(config, nnx.Rngs(params=key)), jax.random.key(0)
  shapes = (
    jax.eval_shape(jax.vmap(make), jax.random.split(key, layers))
    if layers
    else jax.eval_shape(make, key)
  )
  draw = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape) * 0.5, x.dtype), shapes)


def inputs(rows=8, length=6, seed=0):
  draw = np.random.default_rng(seed)
  segments = np.sort(draw.integers(0, 4, (rows, length)))[:, ::-1]
  segments[-1] = 0
  return jnp.asarray(draw.normal(size=(rows, length, D)), jnp.float32), jnp.asarray(
    segments, jnp.int32
  )


@jax.jit
def forward(layer, x, segments=None):
  return layer(x, segments)


@jax.jit
def run(layer, x, segments):
  """((objective, (y, stats)), gradients of the layer and of x)
  of an objective that every output matters to.
  """

  def objective(layer, x):
    y, stats = layer(x, segments)
    weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return (y * weights).sum() + stats['balance_loss'] + stats['router_z_loss'], (y, stats)

  return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(layer, x)


def close(actual, wanted, tolerance=1e-5):
  actual, wanted = (
    {
      jax.tree_util.keystr(path): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (actual, wanted)
  )
  assert actual.keys() == wanted.keys()
  for name, b in wanted.items():
    np.testing.assert_allclose(
      actual[name], b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max()), err_msg=name
    )


def choose(scores, moe):
  """One token's experts in numpy, as transformers chooses them;
  `scores` with the selection bias.
  """
  scores = scores.copy()
  if moe.groups > 1:
    groups = scores.reshape(moe.groups, -1)
    best = np.sort(groups, 1)[:, -(2 if moe.router == 'sigmoid' else 1) :].sum(1)
    for group in np.argsort(-best, kind='stable')[moe.groups_per_token :]:
      groups[group] = -np.inf
  return np.argsort(-scores, kind='stable')[: moe.per_token]


def token_loop(layer, config, x, segments, drop=lambda expert: False):
  """y and stats, one token and one choice at a time, in float64;
  `drop` is asked in the order of tokens.
  """
  moe, w = (
    config.moe,
    {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(layer).items()},
  )
  act = ACTIVATIONS[config.activation]
  y, E, k = np.zeros(x.shape), moe.experts, moe.per_token
  load, dropped, z, counts, masses = (
    np.zeros(E),
    0,
    0.0,
    np.zeros((len(x), E)),
    np.zeros((len(x), E)),
  )
  for b, t in np.ndindex(*segments.shape):
    token = np.asarray(x[b, t], np.float64)
    if segments[b, t]:
      logits = token @ w['router'] + w.get('router_bias', 0)
      scores = (
        np.exp(logits) / np.exp(logits).sum()
        if moe.router == 'softmax'
        else 1 / (1 + np.exp(-logits))
      )
      chosen = choose(scores + w.get('selection_bias', 0), moe)
      gates = scores[chosen] / (scores[chosen].sum() if moe.renormalise else 1) * moe.scale
      z += np.log(np.exp(logits).sum()) ** 2
      counts[b, chosen] += 1
      masses[b] += scores / scores.sum()
      for e, gate in zip(chosen, gates):
        load[e] += 1
        if drop(e):
          dropped += 1
          continue

        def inner(name):
          return token @ w[name][e] + w.get(f'{name}_bias', np.zeros((E, 1)))[e]

        h = act(inner('gate') if config.gated else None, inner('up'))
        y[b, t] += gate * (h @ w['down'][e] + w.get('down_bias', np.zeros((E, 1)))[e])
    if moe.shared_feed_forward:

      def inner(name):
        return token @ w[f'shared.{name}'] + w.get(f'shared.{name}_bias', 0)

      y[b, t] += act(inner('gate'), inner('up')) @ w['shared.down'] + w.get('shared.down_bias', 0)
  tokens = (np.asarray(segments) > 0).sum(1)
  balance = sum(E * n * (c / (k * n) * m / n).sum() for n, c, m in zip(tokens, counts, masses) if n)
  if moe.balance_over == 'batch':
    n = tokens.sum()
    balance = E * n * (counts.sum(0) / (k * n) * masses.sum(0) / n).sum()
  return y, {
    'load': load,
    'dropped': dropped,
    'balance_loss': moe.balance_loss * balance,
    'router_z_loss': moe.z_loss * z,
  }


@pytest.mark.costly
@pytest.mark.parametrize(
  'case', [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_all_dispatches_are_the_loop_over_tokens(case):
  """Values against the loop; gradients of the dispatches against each other."""
  x, segments = inputs()
  outputs = {}
  for dispatch in DISPATCHES:
    config = make_config(case, dispatch)
    layer = make_moe(config)
    outputs[dispatch] = run(layer, x, segments)
  close(outputs['dense'][0][1], token_loop(layer, config, x, segments))
  for dispatch in ('dropless', 'capacity'):
    close(outputs[dispatch], outputs['dense'])


def test_without_segments_every_token_counts():
  config = make_config('deepseek v3')
  layer, (x, segments) = make_moe(config), inputs()
  close(forward(layer, x), forward(layer, x, jnp.ones_like(segments)))
  assert forward(layer, x)[1]['load'].sum() == segments.size * config.moe.per_token


@pytest.mark.costly
@pytest.mark.parametrize('dispatch', DISPATCHES)
def test_padding_goes_nowhere(dispatch):
  """It yields zeros and counts in no statistic;
  what it holds, NaN included, changes nothing, bitwise.
  """
  config = make_config('gpt-oss', dispatch, capacity_factor=0.5)
  layer, (x, segments) = make_moe(config), inputs()
  wanted = run(layer, x, segments)
  y, stats = wanted[0][1]
  assert not np.asarray(y)[np.asarray(segments) == 0].any()
  assert stats['load'].sum() == (segments > 0).sum() * 2
  poisoned = run(layer, jnp.where(segments[..., None] == 0, jnp.nan, x), segments)
  for a, b in zip(jax.tree.leaves(poisoned), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('factor', [0.25, 0.5])
def test_capacity_drops_exactly_the_late_comers(factor):
  config = make_config('gpt-oss', 'capacity', capacity_factor=factor)
  layer, (x, segments) = make_moe(config), inputs()
  room = np.full(5, -(-factor * segments.size * 2 // 5))

  def drop(expert):
    room[expert] -= 1
    return room[expert] < 0

  wanted = token_loop(layer, config, x, segments, drop)
  assert wanted[1]['dropped'] > 0
  close(forward(layer, x, segments), wanted)


@pytest.mark.costly
@pytest.mark.parametrize('dispatch', DISPATCHES)
def test_permuted_experts_permute_the_load_and_nothing_else(dispatch):
  config = make_config(
    'deepseek v3', dispatch, groups=1, groups_per_token=1, biases='all', capacity_factor=0.5
  )
  layer, (x, segments) = make_moe(config), inputs()
  order = np.random.default_rng(1).permutation(8)
  shuffled = make_moe(config)
  for name in (*moe_module.ROUTING, *moe_module.EXPERTS):
    value = getattr(layer, name)[...]
    getattr(shuffled, name)[...] = value[:, order] if name == 'router' else value[order]
  y, stats = forward(layer, x, segments)
  close(forward(shuffled, x, segments), (y, stats | {'load': stats['load'][order]}), 1e-6)
  assert len(set(np.asarray(stats['load']))) > 4


@pytest.mark.parametrize('dispatch', ['dense', 'dropless'])
def test_neighbours_change_nothing(dispatch):
  layer, (x, segments) = make_moe(make_config('gpt-oss', dispatch)), inputs()
  other = inputs(seed=1)[0].at[2].set(x[2])
  np.testing.assert_allclose(
    run(layer, x, segments)[0][1][0][2],
    run(layer, other, segments)[0][1][0][2],
    rtol=1e-6,
    atol=1e-6,
  )


@pytest.mark.costly
@pytest.mark.parametrize('over', ['sequence', 'batch'])
@pytest.mark.parametrize('case', ['mixtral', 'deepseek v3'])
def test_balance_loss_of_a_balanced_and_of_the_worst_router(case, over):
  """Its weight per token where all experts are as likely;
  E / k of that where all tokens choose the same k and nothing else.
  """
  config = make_config(case, balance_over=over, groups=1, groups_per_token=1)
  layer, (x, segments) = make_moe(config), inputs()
  tokens, moe = int((segments > 0).sum()), config.moe
  layer.router[...] = jnp.zeros_like(layer.router[...])
  np.testing.assert_allclose(
    forward(layer, x, segments)[1]['balance_loss'], 0.5 * tokens, rtol=1e-6
  )
  layer.router[...] = (
    layer.router[...].at[0, : moe.per_token].set(200.0).at[0, moe.per_token :].set(-200.0)
  )
  alike = jnp.abs(x).at[..., 0].set(1.0)
  if layer.selection_bias is not None:
    layer.selection_bias[...] = jnp.zeros_like(layer.selection_bias[...])
  stats = forward(layer, alike, segments)[1]
  np.testing.assert_allclose(
    stats['balance_loss'], 0.5 * tokens * moe.experts / moe.per_token, rtol=1e-6
  )
  assert stats['load'].tolist() == [tokens] * moe.per_token + [0] * (moe.experts - moe.per_token)


def test_balance_and_z_loss_reach_the_router_only_with_their_weights():
  layer, (x, segments) = make_moe(make_config('mixtral', balance_loss=0.0, z_loss=0.0)), inputs()
  stats = forward(layer, x, segments)[1]
  assert stats['balance_loss'] == 0 and stats['router_z_loss'] == 0


def test_the_selection_bias_chooses_and_does_not_weigh():
  config = make_config('deepseek v3', groups=1, groups_per_token=1, renormalise=False, scale=1.0)
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(20, 8)), jnp.float32)
  scores, choices, gates = route(
    logits, jnp.full(8, -10.0).at[jnp.array([1, 4, 6])].set(10.0), config.moe
  )
  assert (np.sort(choices, 1) == [1, 4, 6]).all()
  np.testing.assert_array_equal(
    gates, np.take_along_axis(np.asarray(jax.nn.sigmoid(logits)), np.asarray(choices), 1)
  )
  layer, (x, segments) = make_moe(config), inputs()
  gradient = run(layer, x, segments)[1][0]
  assert not gradient.selection_bias[...].any() and gradient.router[...].all()


@given(
  st.integers(0, 2**31), st.sampled_from(['deepseek v2', 'deepseek v3']), st.sampled_from([0, -9])
)
def test_choices_within_groups(seed, case, low):
  """Against numpy, as transformers' DeepseekV3TopkRouter has it: never outside the best groups,
  also where a bias makes every score within them negative.
  """
  moe = make_config(case).moe
  draw = np.random.default_rng(seed)
  logits, bias = draw.normal(size=(4, 8)).astype(np.float32), draw.normal(size=8).astype(np.float32)
  bias += low
  scores, choices, _ = jax.jit(route, static_argnums=2)(jnp.asarray(logits), jnp.asarray(bias), moe)
  for token in range(4):
    assert choices[token].tolist() == choose(np.asarray(scores[token] + bias), moe).tolist()
    groups = {choice // (moe.experts // moe.groups) for choice in choices[token].tolist()}
    assert len(groups) <= moe.groups_per_token


def test_the_moved_bias_balances_the_load():
  """A router that likes some experts twenty times as much as others:
  the bias evens the load out within 600 steps.
  """
  moe = make_config('deepseek v3', groups=1, groups_per_token=1).moe
  draw = np.random.default_rng(0)
  preference = np.linspace(-1.5, 1.5, 8)
  load_of = jax.jit(lambda logits, bias: jax.nn.one_hot(route(logits, bias, moe)[1], 8).sum((0, 1)))
  bias, loads = jnp.zeros(8), []
  for _ in range(600):
    loads.append(load_of(jnp.asarray(draw.normal(size=(512, 8)) + preference, jnp.float32), bias))
    bias = moved(bias, loads[-1], 2e-3)
  assert np.max(loads[0]) > 20 * np.min(loads[0])
  assert np.mean(loads[-20:], 0).max() < 1.1 * np.mean(loads[-20:], 0).min()
  stacked = moved(jnp.zeros((2, 8)), jnp.stack([loads[0], loads[0][::-1]]), 0.5)
  np.testing.assert_array_equal(stacked[0], stacked[1][::-1])
  assert stacked[0, 0] == 0.5 and stacked[0, 7] == -0.5


@functools.cache
def expected(case, dispatch='dropless'):
  return run(make_moe(make_config(case, dispatch)), *inputs())


def on_mesh(mesh, config, x, segments):
  """`run` on the mesh, everything laid out as it is born there; and the layer."""
  with jax.set_mesh(mesh):
    born = abstract(lambda: MoE(config, nnx.Rngs(0)), mesh)
    layer = jax.tree.map(
      lambda value, like: jax.device_put(value, like.sharding), make_moe(config), born
    )

    def place(value, *axes):
      return jax.device_put(value, jax.NamedSharding(mesh, ax.spec(*axes)))

    return run(
      layer, place(x, 'batch', 'length', 'width'), place(segments, 'batch', 'length')
    ), layer


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


# With a factor of 0.3 the exchange between experts' devices takes several rounds.
SPLIT = [
  {'data': 1, 'expert': 2, 'fsdp': 2, 'tensor': 2},
  {'data': 2, 'expert': 2, 'tensor': 2},
  {'data': 2, 'fsdp': 2, 'expert': 2},
]
PARTS = [
  {'data': 4, 'expert': 2},
  {'data': 1, 'fsdp': 4, 'expert': 2},
  {'data': 1, 'expert': 2, 'tensor': 4},
  *SPLIT,
]


@pytest.mark.costly
@pytest.mark.parametrize(
  'case, dispatch, sizes, factor',
  [
    ('gpt-oss', 'dropless', MESHES[2], 100.0),
    ('deepseek v3', 'capacity', MESHES[3], 100.0),
    slow('biased', 'dropless', SPLIT[0], 0.3),
    ('deepseek v3', 'capacity', SPLIT[0], 100.0),
    *(
      slow(case, dispatch, sizes, 100.0)
      for i, sizes in enumerate(MESHES)
      for j, (case, dispatch) in enumerate(
        (
          ('gpt-oss', 'dropless'),
          ('deepseek v3', 'capacity'),
          ('mixtral', 'dense'),
        )
      )
    ),
    *(
      slow('deepseek v3', dispatch, {'data': 1, 'expert': 8}, factor)
      for dispatch, factor in (('dropless', 0.3), ('dense', 1.0))
    ),
    *(
      slow(case, dispatch, sizes, factor)
      for i, sizes in enumerate(PARTS)
      for j, (case, dispatch, factor) in enumerate(
        (
          ('biased', 'dropless', 0.3),
          ('biased', 'dropless', 100.0),
          ('deepseek v3', 'capacity', 100.0),
          ('biased', 'dense', 1.0),
        )
      )
    ),
  ],
  ids=str,
)
def test_eight_devices_are_one(case, dispatch, sizes, factor):
  mesh = make_mesh(MeshConfig(**sizes))
  actual, layer = on_mesh(mesh, make_config(case, dispatch, capacity_factor=factor), *inputs())
  close(actual, expected(case, dispatch))
  for name, gradient in named_leaves(actual[1][0]).items():
    assert gradient.sharding.is_equivalent_to(named_leaves(layer)[name].sharding, gradient.ndim), (
      name
    )
  split = mesh.shape['fsdp'] * mesh.shape['tensor'] * mesh.shape['expert']
  assert layer.up[...].addressable_shards[0].data.size * split == layer.up[...].size


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes, factor', [(MESHES[2], 100.0), slow(SPLIT[0], 0.3), slow(SPLIT[2], 100.0)], ids=str
)
def test_the_kernel_on_eight_devices_is_the_loop_on_one(sizes, factor, monkeypatch):
  for name, value in (('LANES', 1), ('ROWS', 32), ('CHUNK', 16), ('OUTER_CHUNK', 16)):
    monkeypatch.setattr(grouped_matmul_tpu, name, value)
  kernel = ExecutionConfig(experts='pallas_tpu')
  config = make_config('biased', capacity_factor=factor, execution=kernel)
  actual, _ = on_mesh(make_mesh(MeshConfig(**sizes)), config, *inputs())
  close(actual, expected('biased'))


@pytest.mark.parametrize(
  'dispatch, sizes',
  [slow('dropless', SPLIT[0]), slow('capacity', SPLIT[0]), slow('dense', SPLIT[2])],
  ids=str,
)
def test_wide_experts_in_pieces(dispatch, sizes, monkeypatch):
  """Weights gathered, computed and scattered a third at a time: the same values and gradients."""
  monkeypatch.setattr(moe_module, '_pieces', lambda F, most: 3 if F % 3 == 0 else 2)
  config = make_config(
    'biased', dispatch, capacity_factor=90.0
  )  # a factor of its own, or run() would remember the whole ones
  close(on_mesh(make_mesh(MeshConfig(**sizes)), config, *inputs())[0], expected('biased', dispatch))


@pytest.mark.parametrize(
  'sizes, split',
  [({'data': 8}, False), ({'data': 4, 'expert': 2}, False), ({'data': 1, 'fsdp': 8}, True)],
  ids=str,
)
def test_only_what_is_gathered_comes_in_pieces(sizes, split, monkeypatch):
  """Elsewhere a second forward pass would buy nothing."""
  seen, in_pieces = [], moe_module._in_pieces
  monkeypatch.setattr(moe_module, 'PIECE', 4)
  monkeypatch.setattr(moe_module, 'WHOLE', 0)
  monkeypatch.setattr(moe_module, 'LANES', 1)
  monkeypatch.setattr(
    moe_module,
    '_in_pieces',
    lambda *arguments, pieces, **options: (
      seen.append(pieces),
      in_pieces(*arguments, pieces=pieces, **options),
    )[1],
  )
  with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
    jax.eval_shape(
      lambda x: MoE(make_config(), nnx.Rngs(params=0))(x)[0],
      jax.ShapeDtypeStruct((8, 6, D), jnp.float32),
    )
  assert set(seen) == {3 if split else 1}


def test_pieces_are_equal_whole_lanes():
  assert [moe_module._pieces(F) for F in (12, 4096, 7168, 14336, 4099, 16384)] == [1, 1, 2, 4, 1, 4]


@pytest.mark.costly
@pytest.mark.parametrize('dispatch', ['dropless', 'capacity'])
def test_tokens_travel_to_the_experts_and_weights_stay(dispatch):
  """What XLA makes of it: all-to-alls of tokens;
  of weights, shards of D gathered and gradients scattered, and never all experts.
  """
  config, mesh = (
    make_config('mixtral', dispatch, capacity_factor=0.5),
    make_mesh(MeshConfig(data=1, fsdp=2, expert=4)),
  )
  with jax.set_mesh(mesh):
    layer = abstract(lambda: MoE(config, nnx.Rngs(0)), mesh)

    def like(shape, dtype, *axes):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, ax.spec(*axes)))

    text = (
      run.lower(
        layer,
        like((8, 6, D), jnp.float32, 'batch', 'length', 'width'),
        like((8, 6), jnp.int32, 'batch', 'length'),
      )
      .compile()
      .as_text()
    )
  gathered = [
    math.prod(map(int, shape.split(',')))
    for shape in re.findall(r'= \w+\[([\d,]+)\]\S* all-gather\(', text)
  ]
  assert 'all-to-all(' in text and 'reduce-scatter(' in text and max(gathered) == 2 * D * F


def test_the_auto_twin_gives_the_same():
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), axis_type=AxisType.Auto)
  actual, _ = on_mesh(mesh, make_config('gpt-oss'), *inputs())
  close(actual, expected('gpt-oss', 'dropless'))


def test_capacity_is_each_devices_own():
  config, (x, segments) = make_config('gpt-oss', 'capacity', capacity_factor=0.5), inputs()
  ((_, (y, stats)), _), _ = on_mesh(
    make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), config, x, segments
  )
  layer = make_moe(config)
  alone = [
    forward(layer, x[rows], segments[rows])
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8))
  ]
  close(y, jnp.concatenate([part for part, _ in alone]))
  assert stats['dropped'] == sum(part['dropped'] for _, part in alone) > 0
  np.testing.assert_array_equal(stats['load'], sum(part['load'] for _, part in alone))


@pytest.mark.slow
@pytest.mark.parametrize('dispatch', [*MOSTLY_SLOW, 'pallas_tpu'])
def test_stacked_scanned_and_rematerialised(dispatch, monkeypatch):
  """As a stack uses it: born under vmap, scanned, recomputed in the backward pass;
  the same as a loop over layers.
  """
  if dispatch == 'pallas_tpu':
    monkeypatch.setattr(grouped_matmul_tpu, 'LANES', 1)
    config = make_config('deepseek v3', execution=ExecutionConfig(experts=dispatch))
  else:
    config = make_config('deepseek v3', dispatch)
  stack = make_moe(config, layers=2)
  assert stack.down[...].shape == (2, 8, F, D)
  x, segments = inputs()

  def step(x, layer):
    y, stats = forward(layer, x, segments)
    return x + y, stats

  def scanned(stack):
    y, stats = jax.lax.scan(jax.checkpoint(step), x, stack)
    return (y**2).sum() + stats['balance_loss'].sum(), stats['load']

  def looped(stack):
    y, first = step(x, jax.tree.map(lambda leaf: leaf[0], stack))
    y, second = step(y, jax.tree.map(lambda leaf: leaf[1], stack))
    return (y**2).sum() + first['balance_loss'] + second['balance_loss'], jnp.stack(
      [first['load'], second['load']]
    )

  # The loop compiles one layer and uses it twice.
  close(
    jax.jit(jax.value_and_grad(scanned, has_aux=True))(stack),
    jax.value_and_grad(looped, has_aux=True)(stack),
  )


@pytest.mark.parametrize('dispatch', MOSTLY_SLOW)
def test_bfloat16_experts_under_an_f32_router(dispatch):
  """Tokens go where the f32 scores of the rounded inputs send them."""
  config = make_config('deepseek v3', dispatch, execution=ExecutionConfig(dtype='bfloat16'))
  exact = config.with_execution(dtype='float32')
  x, segments = inputs(rows=64)
  x = x.astype(jnp.bfloat16)
  y, stats = forward(make_moe(config), x, segments)
  wanted, exact_stats = forward(make_moe(exact), x.astype(jnp.float32), segments)
  assert y.dtype == jnp.bfloat16
  close(stats, exact_stats, 1e-6)
  np.testing.assert_allclose(np.asarray(y, np.float32), wanted, atol=0.02 * np.abs(wanted).max())


def test_routers_of_who_generates_are_those_of_who_trains():
  """Scores that bfloat16 would make equal choose as before."""
  config = make_config('deepseek v3', execution=ExecutionConfig(dtype='bfloat16'))
  config = dataclasses.replace(config, vocabulary=16, heads=2, layers=2)
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    model = jax.jit(transformer.init, static_argnums=(0, 1))(config, 0)
    made = params.by_name(in_compute_dtype(model))
  before = params.by_name(model)
  wide = [name for name, p in before.items() if p.wide]
  assert any(name.endswith('.router') for name in wide)
  for name in wide:
    assert made[name].get_value().dtype == jnp.float32
    np.testing.assert_array_equal(made[name].get_value(), before[name].get_value())


@pytest.mark.slow
@pytest.mark.parametrize(
  'dispatch, dtype',
  list(itertools.product(DISPATCHES, ['bfloat16', 'float16'])),
)
def test_half_precision_on_split_experts(dispatch, dtype):
  config = make_config('biased', dispatch, execution=ExecutionConfig(dtype=dtype))
  x, segments = inputs()
  ((_, (y, _)), gradients), _ = on_mesh(
    make_mesh(MeshConfig(**SPLIT[0])), config, x.astype(dtype), segments
  )
  ((_, (wanted, _)), wanted_gradients) = run(
    make_moe(config.with_execution(dtype='float32')),
    x.astype(dtype).astype(jnp.float32),
    segments,
  )
  for a, b in zip(
    jax.tree.leaves((y, gradients)), jax.tree.leaves((wanted, wanted_gradients)), strict=True
  ):
    # A bias's gradient is a sum over all tokens whose terms were rounded to 8 bits,
    # and nearly cancel.
    np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.06 * np.abs(b).max())


def test_no_experts_raises():
  with pytest.raises(ValueError, match='model.moe.experts=0'):
    MoE(ModelConfig(width=D), nnx.Rngs(0))
