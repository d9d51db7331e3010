"""Do matrices see what the walk says that they see, in every family; and is a layer changed by what
the changed ones before it make of the rows?
"""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compression import calibration, walk as walks
from compression.kept import Kept
from compression.walk import LayerChange, by_matrix, layers_of, walk
from data.batch import Batch, SourceBatch
from model.params import is_param
from model.weights import Plain, read
from model.weights.above import Above
from tests.model import laws
from tests.model.test_weights import config_of

ROWS, LENGTH = 4, 12


def batches_of(config, count=2):
  """Rows of two documents each, with padding at the end, and of sources."""
  segments = np.repeat([[1] * 5 + [2] * 4 + [0] * 3], ROWS, 0).astype(np.int32)
  positions = np.repeat([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]], ROWS, 0).astype(np.int32)
  made = []
  for seed in range(count):
    tokens = np.asarray(laws.tokens_of(config, ROWS, LENGTH, seed))
    batch = Batch(tokens, tokens, positions, segments, (segments > 0).astype(np.float32))
    if config.encoder_layers:
      source = np.asarray(laws.tokens_of(config, ROWS, LENGTH, seed + 10))
      batch = SourceBatch(
        **vars(batch), source=source, source_positions=positions, source_segments=segments
      )
    made.append(batch)
  return made


SEEN: dict[str, list] = collections.defaultdict(list)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorder(Above):
  """Writes down what it multiplies."""

  base: Any
  name: str = dataclasses.field(metadata={'static': True})
  inputs: int = dataclasses.field(metadata={'static': True})

  def numbers(self, dtype):
    return self.base.numbers(dtype)

  def cut(self, axis, pieces):
    raise AssertionError

  def layout(self):
    return dataclasses.replace(self, base=self.base.layout())

  def write(self, x, sizes=None):
    x = np.asarray(x)
    SEEN[self.name].append(x if sizes is None else np.split(x, np.cumsum(sizes))[:-1])

  def product(self, formula, x, dtype, axes=None):
    jax.debug.callback(self.write, x.reshape(*x.shape[:2], -1))
    return self.base.product(formula, x, dtype, axes)

  def grouped(self, rows, groups):
    jax.debug.callback(self.write, rows, groups.sizes)
    return self.base.grouped(rows, groups)


def recorded(model, batches):
  """By parameter: what it multiplies in each layer, in order, of each batch."""

  def record(path, p):
    if p.kind != 'matrix' or p.wide:
      return p
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    return p.replace(Recorder(read(p), name, p.inputs))

  model = jax.tree_util.tree_map_with_path(record, model, is_leaf=is_param)
  SEEN.clear()

  @jax.jit
  def run(model, batch):
    fields = 'source', 'source_positions', 'source_segments'
    more = {name: getattr(batch, name) for name in fields if hasattr(batch, name)}
    return model(batch.tokens, batch.positions, batch.segments, **more).hidden

  for batch in batches:
    run(model, batch).block_until_ready()
    jax.effects_barrier()
  return dict(SEEN)


def everything(name, p):
  return True


def same(prefix, layer, statistics):
  return layer


def walked(monkeypatch, model, batches, change, **more):
  """The changed model, and the statistics of each layer by (layer, name)."""
  seen = {}

  def checked(layer, block, sums, log):
    seen.update({(layer, name): found for name, found in sums.items()})
    return sums

  monkeypatch.setattr(walks, '_checked', checked)
  return walk(model, batches, change, print, **more), seen


def of_tokens(x):
  """Statistics of tokens [n, I], in f64."""
  x = x.astype(np.float64)
  return len(x), np.abs(x).sum(0), np.square(x).sum(0), np.abs(x).max(0, initial=0), x.T @ x


@pytest.mark.parametrize(
  'family',
  [
    'llama',
    *(
      pytest.param(family, marks=pytest.mark.slow)
      for family in ('qwen3_moe', 'deepseek_v3', 't5', 'gemma2', 'bert', 'gpt2')
    ),
  ],
)
def test_statistics_are_of_what_every_matrix_multiplies(family, monkeypatch, one_device):
  """As they write it down in a call of the model: layers, experts, encoder and cross-attention."""
  config = config_of(family)
  model, batches = laws.make_model(config), batches_of(config)
  _, seen = walked(monkeypatch, model, batches, LayerChange(same, everything))
  written = recorded(model, batches)
  assert {name for _, name in seen} == written.keys()
  used = collections.Counter()
  for layer in layers_of(config):
    for name in (name for where, name in seen if where == layer):
      repeats = len(written[name]) // len(batches)
      parts = [written[name][i * repeats + used[name]] for i in range(len(batches))]
      used[name] += 1
      found = seen[layer, name]
      if isinstance(parts[0], list):  # of experts
        experts = [np.concatenate(rows) for rows in zip(*parts)]
        wanted = [np.stack(x) for x in zip(*map(of_tokens, experts))]
      else:
        real = [np.asarray(batch.segments) > 0 for batch in batches]
        wanted = of_tokens(np.concatenate([x[r] for x, r in zip(parts, real)]))
      made = found.count, found.absolute, found.squares, found.largest, found.products
      for a, b in zip(made, wanted, strict=True):
        np.testing.assert_allclose(
          a, b, rtol=1e-4, atol=1e-4 * max(1, np.abs(b).max()), err_msg=name
        )


def smaller(name, p, statistics):
  """Depends on what is seen."""
  size = jnp.sqrt(statistics.squares.mean() / statistics.count)
  return Plain(read(p).numbers('float32') * (0.7 + 0.1 * jnp.tanh(size)), p.axes)


@pytest.fixture
def small(one_device):
  config = dataclasses.replace(config_of('llama'), layers=2)
  return laws.make_model(config), batches_of(config)


@pytest.mark.slow
def test_a_layer_sees_what_the_changed_ones_before_it_make(small, monkeypatch):
  model, batches = small
  made, seen = walked(monkeypatch, model, batches, LayerChange(by_matrix(smaller), everything))
  name = 'stack.blocks.0.attention.q'
  for number, x in enumerate(recorded(made, batches)[name][:2]):
    other = recorded(made, batches)[name][2 + number]
    wanted = np.square(np.concatenate([x, other])[np.tile(batches[0].segments, (2, 1)) > 0]).sum(0)
    (found,) = (s for (at, of), s in seen.items() if at.number == number and of == name)
    np.testing.assert_allclose(found.squares, wanted, rtol=1e-4)
  before = recorded(model, batches)[name][1]
  assert np.abs(before - recorded(made, batches)[name][1]).max() > 0.1


def test_a_walk_that_was_killed_goes_on_with_the_same_bits(small, tmp_path):
  model, batches = small
  change, lines = LayerChange(by_matrix(smaller), everything, products=False), []

  def run():
    kept = Kept(tmp_path / 'layers', {'method': 'smaller'})
    return jax.tree.leaves(walk(model, batches, change, lines.append, kept))

  whole, files = run(), sorted((tmp_path / 'layers').glob('*.part'))
  files[1].unlink()
  damaged = bytearray(files[0].read_bytes())
  again = run()
  assert 'layer 0: done before' in lines and len(files) == 2
  damaged[-5] ^= 1
  files[0].write_bytes(damaged)
  once_more = run()
  assert any('is damaged' in line for line in lines)
  for a, b, c in zip(whole, again, once_more, strict=True):
    assert (a == b).all() and (a == c).all()
  with pytest.raises(ValueError, match="method='smaller'.*remove the directory"):
    Kept(tmp_path / 'layers', {'method': 'gptq'})


def test_what_cannot_be_calibrated_is_named(small, monkeypatch):
  model, batches = small
  change = LayerChange(by_matrix(smaller), everything)
  with pytest.raises(ValueError, match='36 tokens .* fewer than the 48 inputs of .*feed_forward'):
    walk(model, batches[:1], change, print)
  value = model.stack.blocks[0].feed_forward.up
  broken = jax.tree.map(lambda x: x, model)
  broken.stack.blocks[0].feed_forward.up = value.replace(value[...].at[1, 0, 0].set(jnp.nan))
  with pytest.raises(
    ValueError, match='blocks.0.feed_forward.down of layer 1 is multiplied with NaN'
  ):
    walk(broken, batches, change, print)


def test_a_layer_that_is_no_numbers_now_is_named_and_not_kept(small, tmp_path):
  model, batches = small
  change = LayerChange(
    by_matrix(lambda name, p, _: Plain(read(p).numbers('float32') * jnp.nan, p.axes)),
    lambda name, _: name.endswith('.down'),
    False,
    instead='--method=other',
  )
  kept = Kept(tmp_path, {})
  with pytest.raises(
    ValueError, match=r'down of layer 0 holds NaN .*too much alike.*--method=other'
  ):
    walk(model, batches[:1], change, print, kept)
  assert not [*tmp_path.glob('*.part')]


def test_experts_that_saw_too_few_tokens_get_others_statistics():
  sums = calibration.InputStatistics(
    jnp.float32([9, 1]),
    jnp.float32([[9, 18], [1, 5]]),
    jnp.float32([[9, 36], [1, 25]]),
    jnp.float32([[1, 2], [1, 5]]),
    jnp.float32([[[9, 3], [3, 36]], [[1, 5], [5, 25]]]),
  )
  shared = calibration.filled(sums, np.array([1]), own=False)
  assert shared.products[1].tolist() == [[10, 8], [8, 61]] and shared.largest[1].tolist() == [1, 5]
  assert (shared.products[0] == sums.products[0]).all() and shared.count.tolist() == [9, 10]
  own = calibration.filled(sums, np.array([1]), own=True)
  np.testing.assert_allclose(own.products[1], np.eye(2) * 71 / 20, rtol=1e-6)
