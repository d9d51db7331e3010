"""Are the operations, calls and exponents that benchmarks.complexity prints those of the programs,
and does it say where they end?
"""

import json
import math

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from benchmarks import complexity, taught
from benchmarks.complexity import WAYS
from model import flops, transformer

BY_NAME = {way.name: way for way in WAYS}
SMALL = complexity.config_of('T', 128)


def traced_products(jaxpr):
  """Multiply-adds x 2 of the products of a program as it is traced, scans as often as they run."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      summed, _ = equation.params['dimension_numbers'][0]
      total += (
        2
        * math.prod(equation.invars[0].aval.shape[axis] for axis in summed)
        * math.prod(equation.outvars[0].aval.shape)
      )
    inside = sum(map(traced_products, jax.extend.core.jaxprs_in_params(equation.params)))
    total += inside * (equation.params['length'] if equation.primitive.name == 'scan' else 1)
  return total


@pytest.fixture(scope='module')
def points():
  return {way.name: complexity.measure(way, SMALL, timed=False) for way in WAYS}


@pytest.mark.slow
@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.name)
def test_what_is_compiled_is_what_is_traced(way, points):
  """But for recomputation: attention's own, inside that of a block,
  repeats products that the compiler then computes once.
  """
  config = SMALL.with_execution(**way.execution)
  function, argument = way.build(config, 128)
  traced = traced_products(
    jax.make_jaxpr(function)(jax.eval_shape(lambda: transformer.init(config, 0)), argument).jaxpr
  )
  found = points[way.name]['flops']
  assert (
    0.85 * traced < found < traced
    if 'remat' in way.name
    else found == pytest.approx(traced, rel=0.02)
  )


@pytest.mark.slow
def test_calls_are_those_of_the_policy(points):
  """None computes a block once, full again for its gradient, sqrt again for its group and again for
  its gradient; generation once a token.
  """
  calls = {name: point['calls'] for name, point in points.items()}
  assert calls == {
    'training, all scores held': 1,
    'training, flash attention': 1,
    'training, remat full': 2,
    'training, remat sqrt': 3,
    'generation, no cache': 128,
    'generation, cache': 128,
  }


@pytest.mark.slow
def test_operations_are_the_models(points):
  """A generated token reads the whole buffer: 128 keys where the formula
  of a causal mask says 64.5.
  """

  def needed(keys):
    return flops.forward_flops_per_token(SMALL, 2 * keys - 1)

  assert points['generation, cache']['flops'] == pytest.approx(128 * needed(128), rel=1e-6)
  # One forward pass over 128 tokens (one block of queries: no key is skipped)
  # for each token, but the head for one token only.
  head = 2 * SMALL.D * SMALL.V
  assert points['generation, no cache']['flops'] == pytest.approx(
    128 * (128 * (needed(128) - head) + head), rel=1e-6
  )
  assert points['training, all scores held']['flops'] == pytest.approx(
    3 * 128 * needed(128), rel=0.02
  )
  one = points['training, flash attention']['flops']
  # A forward pass more, but for what no gradient asks for
  assert 1.1 * one < points['training, remat full']['flops'] < 1.34 * one
  assert 1.25 * one < points['training, remat sqrt']['flops'] < 1.67 * one  # two more


@pytest.mark.slow
def test_memory_holds_the_cache_and_no_parameters(points):
  cache = 2 * 4 * SMALL.L * 128 * SMALL.K * SMALL.H
  assert 2 * cache > points['generation, cache']['memory'] >= cache
  assert (
    points['generation, no cache']['memory'] < points['training, flash attention']['memory'] / 3
  )


def test_loops_of_unknown_length_are_not_guessed():
  def looping(x):
    return jax.lax.while_loop(
      lambda x: x.sum() < 9, lambda x: jax.ad_checkpoint.checkpoint_name(x @ x, 'block'), x
    )

  traced = jax.jit(looping).trace(jnp.ones((2, 2)))
  with pytest.raises(ValueError, match='holds 1 blocks.*write it as a scan'):
    complexity.blocks(traced.jaxpr.jaxpr)


@pytest.mark.parametrize('power', (0, 0.5, 1, 2, 3))
def test_a_power_is_its_exponent(power):
  sizes = (16, 64, 256, 1024)
  found = complexity.fit(sizes, [3 * size**power for size in sizes])
  assert (found.exponent, found.first, found.last) == (pytest.approx(power, abs=1e-9), 16, 1024)


def test_the_range_is_where_one_term_dominates():
  sizes = [2**n for n in range(12)]
  # As large as one another at 64
  found = complexity.fit(sizes, [64 * size + size**2 for size in sizes])
  assert (
    256 <= found.first <= 512 and found.last == 2048 and found.exponent == pytest.approx(2, abs=0.1)
  )
  # In the middle of the bend
  assert complexity.fit(sizes[:8], [64 * size + size**2 for size in sizes[:8]]) is None
  assert (
    complexity.fit(sizes[:2], [1, 2]) is None
    and complexity.fit(sizes[:4], [1, 2, 4, math.nan]).last == 4
  )
  with pytest.raises(ValueError, match='must be positive'):
    complexity.fit((1, 2), (0, 1))


def test_the_crossover_is_where_both_are_equal():
  T = complexity.crossover(SMALL)
  attention = 4 * SMALL.L * SMALL.N * SMALL.H * T / 2
  assert flops.forward_flops_per_token(SMALL, T - 1) == pytest.approx(2 * attention, rel=1e-6)


@pytest.mark.slow
@pytest.mark.long
def test_the_command(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(
    complexity, 'WAYS', (BY_NAME['generation, cache'], BY_NAME['generation, no cache'])
  )
  monkeypatch.setattr(
    complexity,
    'AXES',
    {
      'cpu': {
        axis: known | {'sizes': sizes}
        for (axis, known), sizes in zip(
          complexity.AXES['cpu'].items(), ((16, 32, 64, 128), (4, 8, 16, 32)), strict=True
        )
      }
    },
  )
  found = complexity.main(
    ['--quick', '--plot', str(tmp_path / 'c.png'), '--json', str(tmp_path / 'c.json')]
  )
  written = json.loads((tmp_path / 'c.json').read_text())['results']['cpu']
  found = found['cpu']
  assert (
    written['L']['sizes'] == [4, 8, 16]
    and written['T']['generation, cache']['flops'] == found['T']['generation, cache']['flops']
  )
  assert (tmp_path / 'c.png').stat().st_size > 10_000
  assert found['T']['generation, cache']['calls'] == [16, 32, 64]
  printed = capsys.readouterr().out
  assert (
    'memory, CPU: exponents' in printed
    and 'seconds, CPU' not in printed
    and 'T^2 rules from' in printed
  )
  with pytest.raises(SystemExit):
    complexity.main(['--plot', 'c.bmp'])
  assert 'must end in .png' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_a_tpus_points_are_predicted(topology):
  config = complexity.config_of('T', 512, 'tpu')
  point = complexity.measure(
    BY_NAME['training, flash attention'], config, timed=False, device=topology('v5e:1x1')[0]
  )
  scores = 2 * config.L * config.N * config.H * 512**2  # one product of attention, all of it
  # With 6 products, the causal half of each
  needed = 3 * 512 * flops.forward_flops_per_token(config, 512)
  # 7: scores again backward; all is one block
  assert point['flops'] == pytest.approx(needed + (7 - 6 / 2) * scores, rel=0.01)
  assert (
    point['flops'] / 197e12 < point['seconds'] < 1 and point['memory'] > 0 and point['calls'] == 1
  )


@pytest.mark.slow
def test_short_programs_are_timed_and_long_ones_not(monkeypatch):
  ran = []
  monkeypatch.setattr(complexity.common, 'seconds', lambda run: ran.append(run()) or 0.5)
  small = complexity.config_of('T', 16)
  assert complexity.measure(BY_NAME['generation, cache'], small, timed=True)[
    'seconds'
  ] == 0.5 and ran[0].shape == (1, 16)
  monkeypatch.setattr(complexity, 'MOST_TIMED', (1, 2**30))
  assert (
    math.isnan(complexity.measure(BY_NAME['generation, cache'], small, timed=True)['seconds'])
    and len(ran) == 1
  )


def test_what_differs_from_what_is_taught_has_a_reason():
  sizes = (1, 2, 4, 8)
  found = {
    axis: {'sizes': sizes}
    | {
      way.name: {
        'memory': [size ** (2 if axis == 'T' else 0.95) for size in sizes],
        'flops': [size ** way.taught['flops'][axis] for size in sizes],
        'seconds': [math.nan] * 4,
      }
      for way in WAYS
    }
    for axis in ('T', 'L')
  }
  panels = complexity.panels({'CPU': found})
  assert [(panel.quantity, panel.axis) for panel in panels] == [
    ('memory', 'T'),
    ('memory', 'L'),
    ('flops', 'T'),
    ('flops', 'L'),
  ]
  said = list(taught.reasons(panels))
  # In T all six, which are taught 1; in L both remats, which are taught 0.5, and 0 without a cache.
  assert [WAYS[i].name in said[6 + n] for n, i in enumerate((2, 3, 4))] == [True] * 3
  assert len(said) == 9
  assert 'training, all scores held, memory in T, CPU: 2.00, taught 1: what is taught' in said[0]
  assert panels[0].lines[0].label == 'training, all scores held: taught 1, measured 2.00 *'
  assert panels[2].lines[0].label == 'training, all scores held: taught 2, measured 2.00'
  names = {
    (way.name, quantity, axis)
    for way in WAYS
    for quantity in ('memory', 'flops', 'seconds')
    for axis in ('T', 'L')
  }
  assert taught.WHY.keys() <= names
