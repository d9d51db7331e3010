"""What do the tests of training share? A config as small as can be, batches with padding, and real
steps of train.py on any mesh.
"""

import dataclasses
import functools
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from data.batch import Batch
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from model import params, transformer
from model.config import ModelConfig
from model.params import abstract
from parallel import axes
from parallel.mesh import MeshConfig, make_mesh
from training import precision, state as states
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig, make_optimizer
from training.step import make_step

# With which a step is parameters - RATE * gradient.
RATE = 0.5
SGD = {
  'name': 'sgd',
  'learning_rate': RATE,
  'weight_decay': 0.0,
  'clip_norm': 0.0,
  'momentum': 0.0,
}
B, T, V = 8, 16, 264  # V: the byte tokenizer's 259, rounded up to split in eight


def tiny(**parts) -> Config:
  """The smallest Config; an argument such as train={'steps': 9} changes fields of that part."""
  defaults = {
    'model': ModelConfig(
      vocabulary=V, width=32, layers=2, heads=4, kv_heads=2, feed_forward=64, max_length=T
    ),
    'data': DataConfig(
      sources=(SourceConfig(kind='text', path='nowhere'),),
      clean=CleanConfig(near_duplicates=0.0),
      tokenizer=TokenizerConfig(kind='byte'),
      sequence_length=T,
      batch_size=B,
      split='tail',
    ),
    'optimizer': OptimizerConfig(learning_rate=0.01, schedule='constant'),
    'train': TrainConfig(steps=6, log_every=1, save_every=2),
    'mesh': MeshConfig(),
  }
  return Config(
    **{name: dataclasses.replace(part, **parts.get(name, {})) for name, part in defaults.items()}
  )


def make_batches(count: int) -> list[Batch]:
  """Packed rows with two documents and very different amounts of padding, so that a row's share of
  the tokens matters.
  """
  draw = np.random.default_rng(7)
  made = []
  for _ in range(count):
    batch = Batch.empty(B, T)
    for row in range(B):
      length = 2 + (row * 5) % (T - 1)
      first = length // 2
      batch.tokens[row, :length] = draw.integers(0, V, length)
      batch.targets[row, :length] = draw.integers(0, V, length)
      batch.weights[row, :length] = 1
      batch.weights[row, first] = 0
      batch.segments[row, :length] = np.where(np.arange(length) < first, 1, 2)
      batch.positions[row, :length] = np.where(
        np.arange(length) < first, np.arange(length), np.arange(length) - first
      )
    made.append(batch)
  return made


def quickly(function, *arguments):
  """A jitted function compiled with the fewest passes: most of a test's time is the compiler's."""
  return function.lower(*arguments).compile({'xla_backend_optimization_level': 0})


@functools.cache
def initial_model(config: ModelConfig, seed: int) -> list[np.ndarray]:
  """Leaves of a new model; compiled once, for it takes longer than a train step."""
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    return [
      np.array(x)
      for x in jax.tree.leaves(
        quickly(jax.jit(functools.partial(transformer.init, config, seed)))()
      )
    ]


class Trainer:
  """A fresh state and the step of train.py, on a mesh over the first `devices` devices."""

  def __init__(self, config: Config, devices: int = 1):
    self.config, self.mesh = config, make_mesh(config.mesh, jax.devices()[:devices])
    with jax.set_mesh(self.mesh):
      init = functools.partial(transformer.init, config.model, config.train.seed)
      shapes = abstract(init, self.mesh)
      optimizer = make_optimizer(
        config.optimizer, config.train.steps, params.specs({'policy': shapes})
      )
      self.make_state = functools.partial(states.init, config, optimizer)
      values = initial_model(config.model, config.train.seed)
      leaves = [
        jax.device_put(value, x.sharding)
        for value, x in zip(values, jax.tree.leaves(shapes), strict=True)
      ]
      model = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
      self.state = states.TrainState(
        jnp.int32(0),
        {'policy': model},
        jax.jit(optimizer.init)({'policy': model}),
        precision.init_loss_scale(config.model.execution.dtype),
        jax.random.key_data(jax.random.fold_in(jax.random.key(config.train.seed), 1)),
      )

      # Born as states.init would have it, or what the tests see is not what train.py does.
      def place(x, like):
        return jax.device_put(x, like.sharding)

      self.state = jax.tree.map(place, self.state, abstract(self.make_state, self.mesh))
      self.train_step = make_step(config, optimizer)
      self.compiled = None

  def put(self, batch: Batch) -> Batch:
    return jax.device_put(batch, jax.NamedSharding(self.mesh, axes.spec('batch', 'length')))

  def step(self, batch: Batch) -> tuple[dict, dict]:
    """Trains on one batch; its metrics, and the gradient norms by parameter."""
    with jax.set_mesh(self.mesh):
      batch = self.put(batch)
      if self.compiled is None:
        self.compiled = quickly(self.train_step, self.state, batch)
      self.state, metrics, norms = self.compiled(self.state, batch)
    return jax.device_get(metrics), jax.device_get(norms)

  def run(self, batches: list[Batch]) -> list[dict]:
    """Trains on the batches; the metrics of each step."""
    return [self.step(batch)[0] for batch in batches]


def host(tree) -> dict[str, np.ndarray]:
  """Leaves on the host, by name."""
  return {
    jax.tree_util.keystr(path): np.array(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def assert_same(a, b):
  """Bitwise equal, names, shapes and types included."""
  a, b = host(a), host(b)
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


def assert_close(a, b, atol: float):
  a, b = host(a), host(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=0, atol=atol, err_msg=name)


def assert_slope(losses, given, batch, rtol: float = 1e-2, step: float = 3e-4):
  """Each number of losses(given, batch) is differentiated as finite differences have it, in a
  random direction of all that is given.

  In float32, which models compute norms, attention and log-probabilities in whatever they are given
  (float64 is of formulas alone): between the error of a step's square and that of rounding there
  is a hundredth.
  """
  leaves, tree = jax.tree.flatten(given)
  draw = np.random.default_rng(3)
  way = [jnp.asarray(draw.normal(size=x.shape), x.dtype) for x in leaves]

  def along(step, leaves, batch):
    moved = [x + step * d for x, d in zip(leaves, way, strict=True)]
    return jnp.stack(losses(jax.tree.unflatten(tree, moved), batch))

  def run(step, leaves, batch):
    return along(step, leaves, batch), jax.jacrev(along)(step, leaves, batch)

  arguments = jnp.float32(0), leaves, jax.tree.map(jnp.asarray, batch)
  run = quickly(jax.jit(run), *arguments)
  _, slopes = run(*arguments)
  ahead, behind = (run(jnp.float32(h), *arguments[1:])[0] for h in (step, -step))
  assert (np.abs(slopes) > 1e-2).all(), f'{slopes}: the direction tells nothing'
  np.testing.assert_allclose((ahead - behind) / (2 * step), slopes, rtol=rtol)


@pytest.fixture(scope='session')
def corpus(tmp_path_factory) -> pathlib.Path:
  """A directory with text.txt, a text of made-up words, and room for caches."""
  draw = random.Random(3)
  words = [''.join(draw.choices('abcdefghijklmnop', k=draw.randint(2, 7))) for _ in range(80)]
  directory = tmp_path_factory.mktemp('corpus')
  (directory / 'text.txt').write_text(' '.join(draw.choices(words, k=4000)))
  return directory


def run_here(config: Config, workdir: pathlib.Path, quick: bool = True, **options) -> None:
  """train.run on all 8 devices, compiled quickly; JAX's global settings are put back afterwards.

  quick: whether compiling takes longer than the steps.
  """
  names = (
    'jax_compilation_cache_dir',
    'jax_persistent_cache_min_compile_time_secs',
    'jax_persistent_cache_min_entry_size_bytes',
    'jax_disable_most_optimizations',
  )
  old = {name: jax.config.values[name] for name in names}
  jax.config.update('jax_disable_most_optimizations', quick)
  try:
    with jax.set_mesh(
      make_mesh(MeshConfig(), jax.devices()[:1])
    ):  # leaving it undoes what run() sets
      train.run(config, workdir, **options)
  finally:
    for name, value in old.items():
      jax.config.update(name, value)


def on(corpus: pathlib.Path, **parts) -> Config:
  """`tiny`, reading the corpus."""
  data = {
    'sources': (SourceConfig(kind='text', path=str(corpus / 'text.txt')),),
    'cache_dir': str(corpus / 'cache'),
  }
  return tiny(**parts | {'data': data | parts.get('data', {})})


@pytest.fixture(scope='session')
def two_steps(corpus, tmp_path_factory) -> pathlib.Path:
  """A run of two steps on the corpus, which tests read, begin with and copy."""
  directory = tmp_path_factory.mktemp('two_steps')
  run_here(on(corpus, train={'steps': 2, 'save_every': 2}), directory)
  return directory
