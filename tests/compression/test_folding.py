"""Is a model with scales folded into it the model that it was, in every family; and do scales that
are searched for help?
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compression import calibration
from compression.folding import folded, folds
from compression.walk import layers_of
from tests.compression.test_calibration import batches_of
from tests.model import laws
from tests.model.test_weights import config_of


def drawn(fold, layer, seed):
  """Scales between 1/3 and 3, the same where they must be."""
  p = calibration.matrices(layer, 'x')[f'x.{fold.sinks[0]}']
  lead, inputs = calibration.sizes_of(p)
  draw = np.random.default_rng(seed)
  s = np.exp(draw.uniform(-1.1, 1.1, (*(lead if fold.source else ()), inputs)))
  if fold.heads:
    K, G = fold.heads
    s = np.repeat(s.reshape(K, G, -1)[:, :1], G, 1).reshape(-1)
  return jnp.asarray(s, jnp.float32)


def run(model, batch):
  fields = 'source', 'source_positions', 'source_segments'
  more = {name: getattr(batch, name) for name in fields if hasattr(batch, name)}
  return model.logits(model(batch.tokens, batch.positions, batch.segments, **more).hidden)


FOLDS = {
  'llama': 4,
  'gemma2': 4,
  'gpt2': 3,  # up is before gelu
  'bert': 1,  # norms are behind the sum
  't5': 6,
  'deepseek_v3': 7,
  'qwen3_moe': 4,
}


@pytest.mark.parametrize(
  'family',
  [
    'gemma2',
    *(pytest.param(name, marks=pytest.mark.slow) for name in FOLDS if name != 'gemma2'),
  ],
)
def test_the_model_stays_what_it_is(family, one_device):
  """Norms of 1 + w and with biases, grouped heads, latents, experts and cross-attention."""
  config = config_of(family)
  model, (batch,) = laws.make_model(config), batches_of(config, 1)
  counts = set()

  def scaled(model):
    made = jax.tree.map(lambda x: x, model)
    for side in dict.fromkeys(layer.side for layer in layers_of(config)):
      stack, blocks = getattr(made, side), []
      for block in stack.blocks:
        parts = []
        for i in range(len(jax.tree.leaves(block)[0])):
          part = jax.tree.map(lambda x: x[i : i + 1], block)
          here = folds(part, config)
          counts.add(len(here))
          for n, fold in enumerate(here):
            part = folded(part, fold, drawn(fold, part, n))
          parts.append(part)
        blocks.append(jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts))
      stack.blocks = nnx.List(blocks)
    return made

  made = jax.jit(scaled)(model)
  assert max(counts) == FOLDS[family]
  before, after = (jax.jit(run)(m, batch)[batch.segments > 0] for m in (model, made))
  np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())
  moved = [
    np.abs(a - b).max() > 0.01 for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(model))
  ]
  assert sum(moved) > 2 * max(counts)
