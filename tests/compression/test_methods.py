"""Do the methods of calibration put every family in codes, nearer to what it was than rounding; and
are AWQ's and SmoothQuant's scales what their papers say?
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compression import calibration
from compression.awq import Scaling, searched, smoothed
from compression.calibrated import CALIBRATED, Method, calibrated
from compression.calibration import InputStatistics
from compression.folding import Fold, folds
from compression.quantise import nearest, quantised
from model.weights import read
from model.weights.scheme import Scheme, summed_of
from tests.compression.test_calibration import batches_of
from tests.compression.test_folding import run
from tests.model import laws
from tests.model.test_weights import config_of

ONE = InputStatistics(*map(np.float32, (1, [1], [1], [1], [[1]])))
ENTRIES = ('*=int4:group=2',)


def errors(model, batches, *others):
  """Mean squares of what others' logits are beside a model's, of real tokens."""
  both = jax.jit(run)
  wanted = [both(model, batch) for batch in batches]
  return [
    np.mean(
      [
        np.square(both(other, batch) - logits)[batch.segments > 0].mean()
        for batch, logits in zip(batches, wanted)
      ]
    )
    for other in others
  ]


def check(family, method):
  config = config_of(family)
  model, batches, lines = laws.make_model(config), batches_of(config), []
  made = calibrated(model, batches, ENTRIES, Method(method), lines.append)
  rounded = jax.jit(functools.partial(quantised, entries=ENTRIES))(model)
  a, b = jax.tree.structure(made), jax.tree.structure(rounded)
  assert a == b, 'as a run in codes is opened'
  ours, rounding = errors(model, batches, made, rounded)
  assert ours < rounding, (ours, rounding)
  return lines


@pytest.mark.slow
def test_gptq_is_nearer_than_rounding(one_device):
  lines = check('llama', 'gptq')
  assert lines[0].startswith('memory: the model') and 'TFLOP' in lines[1]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'family, method',
  [
    ('qwen3_moe', 'gptq'),
    ('t5', 'awq'),
    ('deepseek_v3', 'awq'),
    ('gemma2', 'awq'),
    ('gpt2', 'gptq'),
    ('bert', 'gptq'),
    ('t5', 'gptq'),
    ('deepseek_v3', 'gptq'),
    ('qwen3_moe', 'awq'),
  ],
)
def test_families_are_nearer_than_rounded(family, method, one_device):
  lines = check(family, method)
  if family == 'qwen3_moe' and method == 'gptq':
    assert any('saw fewer tokens than' in line for line in lines)
  if method == 'awq' and family == 't5':
    assert any('no place for scales' in line and 'cross.k' in line for line in lines)


def test_scales_are_those_of_the_papers(one_device):
  """AWQ: of 20 powers the one with the least error of X W, computed here from X; SmoothQuant by its
  formula. With a norm of 1 + w, whose model stays what it is.
  """
  config = config_of('gemma2')
  model = laws.make_model(config)
  layer = jax.tree.map(lambda x: x[:1], model.stack.blocks[0])
  (fold,) = (fold for fold in folds(layer, config) if fold.norm == 'feed_forward_norm')
  named = calibration.matrices(layer, 'x')
  matrices = {f'x.{path}': named[f'x.{path}'] for path in fold.sinks}
  draw = np.random.default_rng(0)
  x = (draw.normal(size=(200, config.D)) * np.exp(draw.normal(size=config.D))).astype(np.float32)
  size = np.abs(x)
  one = InputStatistics(*map(jnp.float32, (200, size.sum(0), (x**2).sum(0), size.max(0), x.T @ x)))
  scheme = Scheme.parse('int4:group=8')

  def rounds(name, p, w):
    return nearest(scheme, jnp.asarray(w), summed_of(p), p.axes, name).numbers('float32')

  found = jax.jit(lambda one: searched(fold, matrices, one, dict.fromkeys(matrices, one), rounds))(
    one
  )
  best = []
  for a in np.arange(20) / 20:
    s = size.mean(0) ** a
    s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
    total = 0
    for name, p in matrices.items():
      w = np.asarray(read(p).numbers('float32')[0])
      total += np.square(x @ (np.asarray(rounds(name, p, w * s[:, None])) / s[:, None] - w)).sum()
    best.append((total, s))
  wanted = min(best, key=lambda pair: pair[0])
  assert wanted[0] < 0.98 * best[0][0]
  np.testing.assert_allclose(found, wanted[1], rtol=1e-4)
  largest = np.max([np.abs(read(p).numbers('float32')[0]).max(1) for p in matrices.values()], 0)
  s = smoothed(fold, matrices, one, {}, rounds)
  np.testing.assert_allclose(s, np.sqrt(size.max(0) / largest), rtol=1e-5)


@pytest.mark.slow
def test_few_bits_take_powers_of_two(one_device):
  """Of bf16 numbers others would leave another model; 1 + w has no place for any."""
  config = config_of('gemma2').with_execution(parameter_dtype='bfloat16')
  layer = jax.tree.map(lambda x: x[:1], laws.make_model(config).stack.blocks[0])
  scaling = Scaling(None, False, config)
  assert {fold.place for fold in scaling.places(layer)} == {'attention.v', 'feed_forward.up'}
  config = config_of('llama').with_execution(parameter_dtype='bfloat16')
  layer = jax.tree.map(lambda x: x[:1], laws.make_model(config).stack.blocks[0])

  def three(fold, *_):
    return jnp.full(fold_inputs(fold, layer), 3.0)

  made = Scaling(three, True, config)(
    'x', layer, dict.fromkeys(calibration.matrices(layer, 'x'), ONE), None
  )
  for name in ('attention_norm', 'feed_forward_norm'):
    a, b = (np.asarray(getattr(m, name).scale[...], np.float32) for m in (made, layer))
    assert (a * 4 == b).all()


def fold_inputs(fold: Fold, layer):
  return calibration.sizes_of(calibration.matrices(layer, 'x')[f'x.{fold.sinks[0]}'])[1]


def test_a_method_that_does_not_calibrate_has_no_order():
  assert set(CALIBRATED) == {'gptq', 'awq', 'smoothquant'}
  with pytest.raises(ValueError, match='--act_order is of gptq'):
    Method('awq', act_order=True)
