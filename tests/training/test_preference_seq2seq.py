"""Do two targets of a source, packed, teach an encoder-decoder what they would alone?"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objective import Run
from test_preference import with_reference

from data.config import CleanConfig, DataConfig, SourceConfig
from data.source_choices import SourceChoiceBatch
from model.adaptation import AdapterConfig
from objectives.preference import Preference
from objectives.preference_seq2seq import PreferenceSeq2Seq
from tests.training.conftest import SGD, assert_close, assert_slope, tiny
from tests.training.test_denoise import T5

S, T = 32, 24
GIVEN = [('a' * (n % 4 + 1), 'b' * (n % 5 + 1), 'c' * (n % 3) + 'd') for n in range(12)]
MADE = PreferenceSeq2Seq(target_length=T, beta=0.6, sft=0.2)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp('targets') / 'pairs.jsonl'
  rows = [{'prompt': p, 'chosen': c, 'rejected': r} for p, c, r in GIVEN]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return SourceConfig(kind='jsonl', path=str(path), format='preference')


def config(source, objective=MADE, adapter=None, **parts):
  data = {
    'sources': (source,),
    'validation': (source,),
    'validation_fraction': 0.0,
    'clean': CleanConfig(anonymise=(), near_duplicates=0, exact_duplicates=False),
    'split': 'hash',
    'sequence_length': S,
    'cache_dir': str(source.path) + '.cache',
  }
  made = tiny(optimizer=SGD, data=data, model=T5 | {'max_length': S}, **parts)
  return dataclasses.replace(made, objective=objective, adapter=AdapterConfig(**adapter or {}))


def rows_of(made):
  prepared = made.objective.read(made.data, lambda line: None)
  batch = SourceChoiceBatch.empty(made.data.batch_size, T, S)
  for row in range(prepared.rows):
    prepared.train[0].fill(row, batch, row)
  return batch, prepared


def go(run, batch, steps=1):
  with jax.set_mesh(run.mesh):
    for _ in range(steps):
      run.state, metrics, _ = run.step(run.state, jax.tree.map(jnp.asarray, batch))
  return jax.device_get(metrics)


def scores(models, pairs):
  """Of each model the log-likelihoods of answers to prompts, each in a row of its own, of all
  logits; and the tokens of each answer, its end with them.
  """
  read, written = (np.zeros((len(pairs), n), np.int32) for n in (S, T + 1))
  for i, pair in enumerate(pairs):
    prompt, answer = ([*(b + 3 for b in text.encode()), 2] for text in pair)
    read[i, : len(prompt)] = prompt
    written[i, 1 : len(answer) + 1] = answer
  counted, sums = written[:, 1:] > 0, []
  for model in models:
    hidden = model(
      jnp.asarray(written[:, :-1]),
      segments=jnp.asarray(counted, jnp.int32),
      source=jnp.asarray(read),
      source_segments=jnp.asarray(read > 0, jnp.int32),
    ).hidden
    law = jax.nn.log_softmax(model.logits(hidden))
    picked = jnp.take_along_axis(law, jnp.asarray(written[:, 1:, None]), -1)[..., 0]
    sums.append(jnp.where(jnp.asarray(counted), picked, 0).sum(1))
  return sums, counted.sum(1)


def alone(policy, reference, source):
  """The loss, each target in a row of its own, of all logits."""
  with open(source.path) as lines:
    rows = [json.loads(line) for line in lines]
  pairs = [(row['prompt'], row[side]) for row in rows for side in ('chosen', 'rejected')]
  sums, tokens = scores((policy, reference), pairs)
  ratios = sums[0] - sums[1]
  losses = jnp.log1p(jnp.exp(-MADE.beta * (ratios[::2] - ratios[1::2])))
  return losses.mean() - MADE.sft * sums[0][::2].sum() / tokens[::2].sum()


@pytest.mark.slow
def test_it_is_the_loss_of_each_pair_alone(source):
  made = config(source)
  run = with_reference(Run(made))
  batch, prepared = rows_of(made)
  assert (
    prepared.rows < len(GIVEN) and (batch.segments.max(1) == batch.source_segments.max(1)).all()
  )
  models = run.state.models
  with jax.set_mesh(run.mesh):
    expected = jax.jit(alone, static_argnums=2)(models['policy'], models['reference'], source)
  metrics = go(run, batch)
  np.testing.assert_allclose(metrics['loss'], expected, rtol=3e-6)


@pytest.mark.slow
@pytest.mark.long
def test_the_gradient_is_the_slope(source, one_device):
  run = with_reference(Run(config(source)))
  batch, _ = rows_of(run.config)
  models = run.state.models

  def losses(policy, batch):
    terms = MADE.loss(models | {'policy': policy}, batch)
    return [sum(total / jnp.maximum(weight, 1) for total, weight in terms.values())]

  assert_slope(losses, models['policy'], batch)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('adapter', [{}, {'kind': 'lora', 'rank': 2}], ids=['whole', 'lora'])
def test_it_begins_at_ln_2(source, adapter):
  run = Run(config(source, PreferenceSeq2Seq(target_length=T), adapter))
  batch, _ = rows_of(run.config)
  assert go(run, batch)['loss'] == np.float32(math.log(2))


@pytest.mark.slow
def test_microbatches_are_one_big_batch(source):
  states = []
  for parts in (1, 4):
    made = config(source, train={'accumulation': parts})
    run = with_reference(Run(made))
    go(run, rows_of(made)[0])
    states.append(run.state.models)
  assert_close(*states, 3e-5)


def test_what_does_not_fit_is_dropped_or_its_prompt_is_cut(source, tmp_path):
  given = [
    {'prompt': 'p' * 40, 'chosen': 'long', 'rejected': 'prompt'},
    {'prompt': 'p', 'chosen': 'c' * T, 'rejected': 'long'},
    {'prompt': 'p', 'chosen': 'same', 'rejected': 'same'},
    *({'prompt': f'{i}', 'chosen': 'a', 'rejected': 'b'} for i in range(20)),
  ]
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in given))
  read = DataConfig(
    sources=(dataclasses.replace(source, path=str(tmp_path / 'a.jsonl')),),
    clean=CleanConfig(anonymise=(), near_duplicates=0),
    tokenizer=config(source).data.tokenizer,
    sequence_length=S,
    batch_size=2,
    validation_fraction=0.2,
    cache_dir=str(tmp_path / 'cache'),
  )
  for then in ('drop', 'left'):
    made = PreferenceSeq2Seq(target_length=T, too_long=then)
    counts = made.read(read, lambda line: None).report['sources'][0]
    dropped = {'answer_too_long': 1, 'answers_are_the_same': 1}
    assert counts['dropped'] == dropped | ({'prompt_too_long': 1} if then == 'drop' else {})
    assert counts['truncated'] == (then == 'left')


def test_the_kinds_name_each_other(source):
  decoder, pairs = tiny().model, config(source).model
  with pytest.raises(NotImplementedError, match="objective.kind='preference_seq2seq'"):
    Preference().accepts({'policy': pairs})
  with pytest.raises(NotImplementedError, match="or objective.kind='preference'"):
    MADE.accepts({'policy': decoder})
  with pytest.raises(ValueError, match="target_too_long='left'.* use 'drop'"):
    PreferenceSeq2Seq(target_too_long='left')
