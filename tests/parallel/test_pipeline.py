"""Are the schedules of the pipeline what they say, tick by tick, and does the loop that follows
them give what one loop over layers gives?
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig, MoEConfig
from model.execution import ExecutionConfig
from parallel import axes as ax, pipeline, stages as st
from parallel.mesh import MeshConfig, make_mesh
from parallel.pipeline import PipelineConfig, schedule, schedule_1f1b

SIZES = [(1, 3), (2, 2), (2, 5), (4, 4), (4, 8), (8, 24)]


@pytest.mark.parametrize('stages, microbatches', SIZES, ids=str)
@pytest.mark.parametrize('repeats', [1, 2, 3])
def test_every_microbatch_passes_every_run_of_layers_in_order(stages, microbatches, repeats):
  """By following the table: what a stage finds is what the stage before it made one tick ago,
  or, on stage 0, a new microbatch.
  """
  microbatches = microbatches if repeats == 1 else stages * microbatches
  table = schedule(stages, microbatches, repeats)
  made, left = [None] * stages, []
  for microbatch, repeat in zip(*table, strict=True):
    now = []
    for p in range(stages):
      if microbatch[p] < 0:
        now.append(None)
        continue
      enters = p == 0 and repeat[p] == 0
      m, seen = (microbatch[p], []) if enters else made[p - 1]
      assert m == microbatch[p]
      now.append((m, seen + [repeat[p] * stages + p]))
      if len(now[p][1]) == stages * repeats:
        left.append(now[p])
    made = now
  assert left == [(m, list(range(stages * repeats))) for m in range(microbatches)]


@pytest.mark.parametrize('stages, microbatches', SIZES, ids=str)
@pytest.mark.parametrize('repeats', [1, 2, 3])
def test_the_bubble_is_the_tables_idle_slots(stages, microbatches, repeats):
  M = microbatches if repeats == 1 else stages * microbatches
  config = PipelineConfig(
    schedule='gpipe' if repeats == 1 else 'circular', microbatches=M, repeats=repeats
  )
  idle = (schedule(stages, M, repeats).microbatch < 0).mean()
  assert idle == pytest.approx((stages - 1) / (repeats * M + stages - 1)) == config.bubble(stages)
  assert repeats == 1 or idle <= PipelineConfig(microbatches=M).bubble(stages)


@pytest.mark.parametrize('stages, microbatches', SIZES, ids=str)
def test_1f1b_is_in_order_and_bounded(stages, microbatches):
  down, up = schedule_1f1b(stages, microbatches)

  def tick_of(table, p):
    return {m: t for t, m in enumerate(table[:, p]) if m >= 0}

  for p in range(stages):
    forward, backward = tick_of(down, p), tick_of(up, p)
    assert sorted(forward) == sorted(backward) == list(range(microbatches))
    for m in range(microbatches):
      assert p == 0 or forward[m] == tick_of(down, p - 1)[m] + 1
      assert p == stages - 1 or backward[m] == tick_of(up, p + 1)[m] + 1
      assert forward[m] <= backward[m] and (p < stages - 1 or forward[m] == backward[m])
    alive = [
      sum(forward[m] <= t <= backward[m] for m in range(microbatches)) for t in range(len(down))
    ]
    assert max(alive) == min(microbatches, 2 * (stages - 1 - p) + 1)
  # A phase in which no stage runs forward (or backward) is compiled without:
  # its slots take no time.
  forward, backward = down[(down >= 0).any(1)], up[(up >= 0).any(1)]
  for table in (forward, backward):
    idle = (table < 0).mean()
    assert (
      idle
      == pytest.approx((stages - 1) / (microbatches + stages - 1))
      == PipelineConfig(schedule='1f1b', microbatches=microbatches).bubble(stages)
    )


def block(x, w, shared, whole):
  y = jnp.tanh(x @ w) + shared[:, None] * whole[None]
  return x + y, {'load': jnp.square(y).sum()}


def layers(blocks, x, shared, whole):
  return jax.lax.scan(lambda x, w: block(x, w, shared, whole), x, blocks)


def inputs(blocks, rows):
  draw = np.random.default_rng(0)

  def normal(*shape):
    return draw.normal(size=shape).astype(np.float32)

  return normal(blocks, 4, 4) * 0.3, normal(rows, 4), normal(rows), normal(4)


@pytest.mark.costly
@pytest.mark.parametrize(
  'config, sizes, blocks',
  [
    pytest.param(PipelineConfig(), {'stage': 8}, 8, marks=pytest.mark.slow),
    (PipelineConfig(microbatches=3), {'stage': 4, 'data': 2}, 8),
    pytest.param(
      PipelineConfig(microbatches=1), {'stage': 2, 'data': 4}, 6, marks=pytest.mark.slow
    ),
    (PipelineConfig(schedule='circular', repeats=2, microbatches=8), {'stage': 4}, 8),
    pytest.param(
      PipelineConfig(schedule='circular', repeats=6, microbatches=6),
      {'stage': 2, 'data': 4},
      12,
      marks=pytest.mark.slow,
    ),
    pytest.param(
      PipelineConfig(schedule='circular', repeats=6),
      {'stage': 4, 'data': 2},
      24,
      marks=pytest.mark.slow,
    ),
  ],
  ids=str,
)
def test_values_reports_and_gradients_are_those_of_one_loop(config, sizes, blocks):
  """Layers as the model's, but a page of mathematics: [R, 4, 4] blocks,
  rows of numbers, an array of every row and one of none.
  """
  given = inputs(blocks, 24)

  def loss(run, w, x, shared, whole):
    y, reports = run(layers, w, x, shared, whole)
    return jnp.square(y).sum() + (reports['load'] * jnp.arange(blocks)).sum(), (y, reports)

  def value(run):
    return jax.jit(
      jax.value_and_grad(functools.partial(loss, run), argnums=(0, 1, 2, 3), has_aux=True)
    )

  expected = value(lambda layers, *given: layers(*given))(*given)
  mesh = make_mesh(MeshConfig(**{'data': 1} | sizes), jax.devices()[: math.prod(sizes.values())])
  with jax.set_mesh(mesh):
    rows = jax.P('data' if sizes.get('data', 1) > 1 else None)
    placed = [
      jax.device_put(a, spec) for a, spec in zip(given, (jax.P('stage'), rows, rows, jax.P()))
    ]
    found = value(functools.partial(pipeline.run, config=config))(*placed)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())
  assert found[1][0].sharding.spec[0] == 'stage'


def test_only_microbatches_move_between_stages():
  """One permutation a direction, and nothing else that crosses a tick is moved:
  each stage gathers its own weights over fsdp.
  """

  def layer(x, w):
    w = ax.gather(w, 'embed', 'feed_forward')
    return ax.einsum(
      'BF,DF->BD', jnp.tanh(jnp.einsum('BD,DF->BF', x, w)), w, ('batch', 'width')
    ), None

  def layers(blocks, x, shared, whole):
    return jax.lax.scan(layer, x, blocks)[0], {}

  def loss(blocks, x):
    return jnp.square(pipeline.run(layers, blocks, x, {}, {}, PipelineConfig())[0]).sum()

  mesh = make_mesh(MeshConfig(stage=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):

    def place(shape, *axes):
      return jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=jax.NamedSharding(mesh, ax.spec(*axes))
      )

    given = place((4, 16, 32), 'layers', 'embed', 'feed_forward'), place((8, 16), 'batch', 'width')
    program = jax.jit(jax.grad(loss)).lower(*given).compile().as_text()
  found = [
    line
    for line in program.splitlines()
    if re.search(r'= .*(all-gather|collective-permute|all-to-all)(-start)?\(', line)
  ]
  permuted = [line for line in found if 'collective-permute' in line]
  assert len(permuted) == 2 and all('f32[1,2,16]' in line for line in permuted), permuted
  assert {
    shape
    for line in found
    if line not in permuted
    for shape in re.findall(r'= f32\[([0-9,]*)\]', line)
  } <= {'16,16'}, found


@pytest.mark.parametrize('stages, repeats', [(4, 2), (4, 6), (2, 3)])
def test_layers_are_dealt_to_stages(stages, repeats):
  """Chunk r P + p is run r of stage p."""
  with jax.set_mesh(make_mesh(MeshConfig(data=1, stage=stages), jax.devices()[:stages])):
    blocks = jax.device_put(np.arange(stages * repeats * 2), jax.P('stage'))
    dealt = jax.jit(lambda x: st.deal(x, stages, repeats))(blocks)
  assert np.asarray(dealt).ravel().tolist() == list(range(stages * repeats * 2))
  for p, shard in enumerate(dealt.addressable_shards):
    assert shard.data.tolist() == [
      [2 * (r * stages + p), 2 * (r * stages + p) + 1] for r in range(repeats)
    ]


@pytest.mark.parametrize(
  'fields, words',
  [
    (
      {'schedule': 'gpip'},
      "model.execution.pipeline.schedule='gpip' is unknown; did you mean 'gpipe'",
    ),
    ({'microbatches': -1}, 'model.execution.pipeline.microbatches=-1 must be at least 1, or 0'),
    (
      {'repeats': 2},
      "repeats=2 does not suit model.execution.pipeline.schedule='gpipe': 'circular' takes 2 or "
      'more',
    ),
    (
      {'schedule': 'circular'},
      "repeats=1 does not suit model.execution.pipeline.schedule='circular'",
    ),
    (
      {'schedule': '1f1b', 'repeats': 0},
      "repeats=0 does not suit model.execution.pipeline.schedule='1f1b'",
    ),
  ],
)
def test_impossible_configs_raise(fields, words):
  with pytest.raises(ValueError, match=words):
    PipelineConfig(**fields)


@pytest.mark.parametrize(
  'model, error, words',
  [
    (
      {'layers': 6},
      ValueError,
      r'model.layers: 6 layers do not split over mesh.stage=4 x '
      'model.execution.pipeline.repeats=1; make them a multiple',
    ),
    (
      {
        'layers': 8,
        'execution': ExecutionConfig(pipeline=PipelineConfig(schedule='circular', repeats=3)),
      },
      ValueError,
      'mesh.stage=4 x model.execution.pipeline.repeats=3',
    ),
    (
      {'layers': 12, 'window': 2, 'global_every': 2},
      ValueError,
      'model.layers: 6 repeats of a period of 2 layers do not split',
    ),
    (
      {
        'layers': 8,
        'execution': ExecutionConfig(
          pipeline=PipelineConfig(schedule='circular', repeats=2, microbatches=6)
        ),
      },
      ValueError,
      'microbatches=6 is not a multiple of mesh.stage=4: .* make it a multiple',
    ),
    (
      {'layers': 4, 'encoder_layers': 3, 'position': 'relative'},
      ValueError,
      'model.encoder_layers: 3 layers do not split',
    ),
    (
      {'moe': MoEConfig(experts=2, balance_loss=0.1, balance_over='batch')},
      ValueError,
      "balance_over='batch' looks at one of .*microbatches=4",
    ),
    (
      {
        'layers': 9,
        'moe': MoEConfig(experts=2, first=1),
        'execution': ExecutionConfig(pipeline=PipelineConfig(schedule='1f1b')),
      },
      NotImplementedError,
      "schedule='1f1b' does not work with layers of 2 scans.*use 'gpipe' or 'circular'",
    ),
    (
      {
        'position': 'relative',
        'execution': ExecutionConfig(pipeline=PipelineConfig(schedule='1f1b')),
      },
      NotImplementedError,
      "position='relative'",
    ),
    (
      {'execution': ExecutionConfig(dtype='float16', pipeline=PipelineConfig(schedule='1f1b'))},
      NotImplementedError,
      "dtype='float16'",
    ),
  ],
)
def test_models_that_do_not_split_raise(model, error, words):
  config = ModelConfig(**{'layers': 4} | model)
  config.check_stages(1)
  with pytest.raises(error, match=words):
    config.check_stages(4)


def test_rows_that_do_not_split_raise():
  with jax.set_mesh(make_mesh(MeshConfig(stage=2, data=4))):
    with pytest.raises(
      ValueError,
      match='8 rows do not split into model.execution.pipeline.microbatches=4 on 4 devices',
    ):
      pipeline.run(layers, *inputs(2, 8), PipelineConfig(microbatches=4))


def test_the_log_line_names_schedule_bubble_and_what_is_not_split():
  deepseek = ModelConfig(layers=9, moe=MoEConfig(experts=2, first=1))
  assert pipeline.describe(deepseek.stacks, PipelineConfig(microbatches=8), 4) == (
    'pipeline: gpipe, 4 stages x 8 microbatches, bubble 27.3%; 1 layers are not split: '
    'every stage runs them'
  )
  circular = PipelineConfig(schedule='circular', repeats=2, microbatches=8)
  assert pipeline.describe(ModelConfig(layers=8).stacks, circular, 4) == (
    'pipeline: circular, 4 stages x 8 microbatches x 2 repeats, '
    'bubble 15.8% (without repeats 27.3%)'
  )
