"""Do judged targets, packed beside those of other sources, teach an encoder-decoder what the paper
says?
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objective import Run
from test_preference import with_reference
from test_preference_seq2seq import T, config, go, rows_of, scores

from data.config import SourceConfig
from objectives.kto import KTO
from objectives.preference_seq2seq import KTOSeq2Seq
from tests.training.conftest import RATE, assert_close, tiny

GIVEN = [(f'{n:x}' + 'a' * (n % 4), 'b' * (n % 5 + 1), n % 3 > 0) for n in range(12)]
MADE = KTOSeq2Seq(target_length=T, beta=0.6, wanted_weight=1.5, unwanted_weight=0.8)


def judged(path, given) -> SourceConfig:
  rows = [{'prompt': p, 'completion': c, 'label': label} for p, c, label in given]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return SourceConfig(kind='jsonl', path=str(path), format='judged')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return judged(tmp_path_factory.mktemp('judged') / 'judged.jsonl', GIVEN)


def by_hand(policy, reference):
  """The loss, and the divergence, from the answer before, of the first one from that behind it."""
  others = [GIVEN[1], *GIVEN[:-1]]
  pairs = [(prompt, answer) for prompt, answer, _ in GIVEN]
  pairs += [(prompt, other[1]) for (prompt, _, _), other in zip(GIVEN, others)]
  (policy, reference), _ = scores((policy, reference), pairs)
  own, mismatched = jnp.split(policy - reference, 2)
  away = jax.lax.stop_gradient(jnp.maximum(mismatched.mean(), 0))
  wanted = jnp.array([label for _, _, label in GIVEN])
  losses = jnp.where(
    wanted,
    MADE.wanted_weight / (1 + jnp.exp(MADE.beta * (own - away))),
    MADE.unwanted_weight / (1 + jnp.exp(MADE.beta * (away - own))),
  )
  return losses.mean(), away


@pytest.mark.slow
@pytest.mark.long
def test_a_step_is_the_absolute_step(source):
  run = with_reference(Run(config(source, MADE)), 10)
  batch, prepared = rows_of(run.config)
  assert prepared.rows < len(GIVEN)
  before = jax.tree.map(jnp.copy, run.state.models)
  with jax.set_mesh(run.mesh):
    value = jax.jit(jax.value_and_grad(by_hand, has_aux=True))
    (loss, away), gradient = value(before['policy'], before['reference'])
    expected = jax.tree.map(lambda p, g: p - RATE * g, before['policy'], gradient)
  metrics = go(run, batch)
  assert away > 0.1
  np.testing.assert_allclose(metrics['loss'], loss, rtol=3e-6)
  np.testing.assert_allclose(metrics['kl'], away, rtol=1e-5)
  assert_close(run.state.models['policy'], expected, 3e-5)


def test_the_end_of_the_other_answer_gives_way(tmp_path):
  """An answer that leaves it no token is dropped; that it is the same one matters nothing."""
  given = [('p', 'a' * (T - 4), True), ('q', 'a' * 9, False), ('r', 'a' * 9, True)]
  given += [('s', 'a' * T, True)]
  made = config(judged(tmp_path / 'judged.jsonl', given), MADE)
  batch, prepared = rows_of(made)
  counts = prepared.report['sources'][0]
  assert counts['dropped'] == {'answer_too_long': 1} and counts['truncated'] == 2
  lengths = [[(row == n).sum() for n in range(1, row.max() + 1)] for row in batch.segments]
  # Each with its end, beside what is left of that to the prompt before.
  pairs = sorted(tuple(map(int, pair)) for row in lengths for pair in zip(row[::2], row[1::2]))
  assert pairs == [(10, 10), (10, 14), (21, 3)]


def test_the_kinds_name_each_other(source):
  with pytest.raises(NotImplementedError, match="objective.kind='kto_seq2seq'"):
    KTO().accepts({'policy': config(source, MADE).model})
  with pytest.raises(NotImplementedError, match="or objective.kind='kto'"):
    MADE.accepts({'policy': tiny().model})
