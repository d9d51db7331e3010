"""An objective that no run needs, with everything that a harder one asks of the step: two models,
one of them frozen; a term for each pair, one for each token, one with a constant denominator;
numbers of a whole batch, which are made before it is cut.
"""

import dataclasses

import jax
import jax.numpy as jnp

from model.weights import int8
from objectives.next_token import NextToken
from objectives.objective import Objective, Role, in_bfloat16, or_one
from parallel import axes as ax

CONSTANT = 48.0
SHARE = 0.25  # of the term of tokens
READ = 0.02  # so that scores, and steps, are of the size of 1

STORED = {'': None, 'bfloat16': in_bfloat16, 'int8': int8.in_bytes}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(NextToken):
  """Chosen and rejected rows by turns: the chosen one is to score higher than the rejected, by more
  than a reference says.

  Attributes: reference: directory of the frozen model; a new one without, or 'begun': the policy as
    it began. stored: how it lies in memory.
  """

  kind: str = 'toy'
  reference: str = ''
  stored: str = ''
  rows = 2

  def models(self, config):
    stored = STORED[self.stored]
    reference = Role(config, trained=False, directory=self.reference, stored=stored)
    if self.reference == 'begun':
      reference = Role(config, trained=False, begun='policy')
    return {'policy': Role(config), 'reference': reference}

  def accepts(self, models):
    if set(models) != {'policy', 'reference'}:
      raise ValueError(f'the toy takes a policy and a reference, not {sorted(models)}')

  def prepare(self, models, batch):
    """Lengths of rows, whitened over the whole batch."""
    lengths = (batch.weights > 0).sum(1).astype(jnp.float32)
    spread = jnp.sqrt(jnp.square(lengths - lengths.mean()).mean())
    whitened = (lengths - lengths.mean()) / jnp.maximum(spread, 1e-6)  # rows may be alike
    return {'rows': batch, 'whitened': whitened}

  def weights(self, batch):
    counted = batch['rows'].weights > 0
    return {
      'pairs': jnp.sum(_pairs(counted.any(1)).all(1), dtype=jnp.float32),
      'tokens': jnp.sum(counted, dtype=jnp.float32),
      'constant': jnp.float32(CONSTANT),
    }

  def sums(self, models, batch):
    rows = batch['rows']
    counted = rows.weights > 0
    scores = {name: score(model, rows, counted) for name, model in models.items()}
    margin = _pairs(scores['policy']) - _pairs(scores['reference'])
    real = _pairs(counted.any(1)).all(1)
    losses = -jax.nn.log_sigmoid(margin[:, 0] - margin[:, 1])
    terms = {
      'pairs': jnp.where(real, losses, 0).sum(),
      'tokens': SHARE * jnp.square(scores['policy']).sum(),
      'constant': (batch['whitened'] * scores['policy']).sum(),
    }
    return terms, {'right': jnp.where(real, margin[:, 0] > margin[:, 1], 0).sum()}

  def metrics(self, terms, weights, sums):
    said = Objective.metrics(self, terms, weights, sums)
    return said | {'accuracy': sums['right'] / or_one(weights['pairs'])}

  def judged(self, models, batch):
    return super().judged(models, batch)


def score(model, rows, counted):
  """[B]: a fixed number of the hidden states, summed over tokens."""
  hidden = model(rows.tokens, rows.positions, rows.segments).hidden.astype(jnp.float32)
  read = READ * jnp.cos(jnp.arange(hidden.shape[-1], dtype=jnp.float32))
  return jnp.where(counted, (hidden * read[None, None]).sum(-1), 0).sum(1)


def _pairs(x):
  return x.reshape(x.shape[0] // 2, 2, out_sharding=ax.out('batch', None))
