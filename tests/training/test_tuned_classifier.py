"""Does tuning to classify minimise what it says: by hand, in any microbatches, on any devices, for
decoders and encoders, of all tokens and of labels alone?
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.config import CleanConfig, SourceConfig
from data.records import LabelRecord
from data.template import Template
from decode.generator import Generator
from evaluation.classify import asking_of, scored
from evaluation.prompts import Shots
from model.config import ModelConfig
from objectives.classify import Classify
from parallel import axes, hosts
from parallel.pipeline import PipelineConfig
from tests.training.conftest import RATE, SGD, T, Trainer, V, assert_close, run_here, tiny
from training import program
from workdir import judging_run
from workdir.metrics import read_metrics

# Lengths that pack into rows of T unevenly.
TEXTS = [('abcdefgh'[: n % 8 + 1] + str(n), ('up', 'down')[n % 3 == 0]) for n in range(16)]
WORDS = {'up': ['u', 'v'], 'down': 'd'}
BERT = {
  'causal': False,
  'norm': 'layer',
  'norm_placement': 'post',
  'position': 'learned',
  'biases': 'all',
  'gated': False,
  'activation': 'gelu_exact',
  'tie_embeddings': True,
  'head': 'mlm',
  'token_types': 2,
  'kv_heads': 4,
}
MASK = 259
KINDS = {
  'tokens': ('prefix', 'tokens', {}),
  'labels': ('prefix', 'labels', {}),
  'cloze tokens': ('cloze', 'tokens', BERT),
  'cloze labels': ('cloze', 'labels', BERT),
}
each = pytest.mark.parametrize('name', KINDS)


@pytest.fixture(scope='module')
def files_of(tmp_path_factory):
  directory = tmp_path_factory.mktemp('labelled')
  lines = [f'{text},{label}' for text, label in TEXTS]
  (directory / 'texts.csv').write_text('\n'.join(['text,label', *lines]) + '\n')
  for form, pattern in (('prefix', '{{ text }}=[MASK]'), ('cloze', '{{ text }}=[MASK].')):
    template = {'pattern': pattern, 'words': WORDS}
    (directory / f'{form}.json').write_text(json.dumps(template))
  return directory


def config(files_of, name, **parts):
  form, over, model = KINDS[name]
  source = SourceConfig(kind='csv', path=str(files_of / 'texts.csv'), format='label')
  data = {
    'sources': (source,),
    'validation': (source,),
    'validation_fraction': 0.0,
    'clean': CleanConfig(anonymise=(), near_duplicates=0, exact_duplicates=False),
    'split': 'hash',
    'cache_dir': str(files_of / 'cache'),
  }
  parts = {'optimizer': SGD, 'model': model} | parts
  made = tiny(**parts | {'data': data | parts.get('data', {})})
  objective = Classify(template=str(files_of / f'{form}.json'), form=form, over=over)
  return dataclasses.replace(made, objective=objective)


def batch_of(made):
  """All records as one batch, packed, in order, of the rows that a batch has."""
  prepared = made.objective.read(made.data, lambda line: None)
  size = made.data.batch_size
  (batch,) = made.objective.validation_batches(prepared, made.data, range(size))
  return batch


class Placed(Trainer):
  """Batches lie as train.py has them: the words beside the rows are split by rows alone."""

  def put(self, batch):
    rows = jax.NamedSharding(self.mesh, axes.spec('batch', 'length'))
    return hosts.RowShards(rows, batch.tokens.shape)(batch)


def by_hand(model, name):
  """The loss of every text in a row of its own, from all logits."""
  form, over, _ = KINDS[name]
  words = {label: [ord(word) + 3 for word in of] for label, of in WORDS.items()}
  tokens, places, targets = np.zeros((len(TEXTS), T), np.int32), [], []
  for row, (text, label) in enumerate(TEXTS):
    read = [1, *(byte + 3 for byte in f'{text}='.encode())]
    word = words[label][0]
    places.append(len(read) - (form == 'prefix'))
    targets.append([word] if form == 'cloze' or over == 'labels' else [word, 2])
    read += [word] if form == 'prefix' else [MASK, ord('.') + 3, 2]
    tokens[row, : len(read)] = read
  segments = jnp.asarray(tokens != 0, jnp.int32)
  logits = model.logits(model(jnp.asarray(tokens), segments=segments).hidden)
  total = weight = 0.0
  for row, (at, learned) in enumerate(zip(places, targets)):
    if over == 'labels':
      of = words[TEXTS[row][1]]
      every = [i for ids in words.values() for i in ids]
      share = [jax.nn.logsumexp(logits[row, at, np.array(ids)]) for ids in (every, of)]
      total += share[0] - share[1]
    else:
      logs = jax.nn.log_softmax(logits[row, at : at + len(learned)])
      total -= sum(logs[i, id_] for i, id_ in enumerate(learned))
    weight += len(learned)
  return total / weight


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    'cloze labels',
    'tokens',
    pytest.param('labels', marks=pytest.mark.slow),
    pytest.param('cloze tokens', marks=pytest.mark.slow),
  ],
)
def test_a_step_is_the_absolute_step(files_of, one_device, name):
  """Parameters - rate * gradient of the mean over texts, worked out by hand."""
  made = config(files_of, name, data={'batch_size': 16})
  trainer, batch = Trainer(made), batch_of(made)
  before = jax.tree.map(jnp.copy, trainer.state.models['policy'])
  loss, gradient = jax.jit(jax.value_and_grad(by_hand), static_argnums=1)(before, name)
  metrics, _ = trainer.step(batch)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  expected = jax.tree.map(lambda p, g: p - RATE * g, before, gradient)
  assert_close(trainer.state.models['policy'], expected, 3e-6)
  assert 0 <= metrics['accuracy'] <= 1


@pytest.mark.slow
@pytest.mark.long
@each
def test_microbatches_and_devices_are_one_batch(files_of, name):
  batch = batch_of(config(files_of, name, data={'batch_size': 16}))
  whole = Placed(config(files_of, name, data={'batch_size': 16}))
  expected, _ = whole.step(batch)
  cases = [
    (4, 1, {}),
    (2, 4, {'data': 2, 'fsdp': 2}),
    (1, 4, {'tensor': 2, 'context': 2}),
    (1, 2, {'stage': 2}),
  ]
  for parts, devices, mesh in cases:
    made = config(files_of, name, data={'batch_size': 16}, mesh=mesh, train={'accumulation': parts})
    again = Placed(made, devices)
    metrics, _ = again.step(batch)
    np.testing.assert_allclose(metrics['loss'], expected['loss'], rtol=1e-5, err_msg=str(mesh))
    np.testing.assert_allclose(metrics['accuracy'], expected['accuracy'], rtol=1e-6)
    assert_close(again.state.models, whole.state.models, 1e-5)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('name', ['tokens', 'cloze labels'])
def test_a_tuned_model_classifies_by_the_same_template(files_of, tmp_path, name):
  """From files to a model that evaluation finds to know all that it was taught."""
  made = config(
    files_of,
    name,
    optimizer={'name': 'adamw', 'learning_rate': 0.01, 'clip_norm': 1.0},
    train={'steps': 60, 'save_every': 60},
    mesh={'data': -1},
  )
  run_here(made, tmp_path)
  records = read_metrics(tmp_path / 'metrics.jsonl')
  last = [record for record in records if 'validation_loss' in record][-1]
  assert last['validation_loss'] < 0.1 and last['validation_accuracy'] > 0.95
  g = Generator.load(tmp_path)
  asking = asking_of(g, Template.read(made.objective.template))
  every = [('here', LabelRecord(text, label)) for text, label in TEXTS]
  scores = scored(g, asking, every, Shots([], asking.template.labels, 0))
  np.testing.assert_array_equal(scores.labels.argmax(1), scores.truth)
  judge = judging_run.judge_of(judging_run.JudgeRequest(tmp_path, label='down'))
  assert judge([''] * len(TEXTS), [text for text, _ in TEXTS]) == [of == 'down' for _, of in TEXTS]


REFUSED = [
  ({'form': 'cloze'}, {}, "objective.form='cloze' is not how a model.*set objective.form='prefix'"),
  ({}, BERT, "objective.form='prefix' is not how.*set objective.form='cloze'"),
  ({}, {'encoder_layers': 2}, "objective.kind='classify_seq2seq' tunes one by the same template"),
]


@pytest.mark.parametrize('fields, model, said', REFUSED, ids=range(3))
def test_a_model_that_is_asked_otherwise_is_refused(fields, model, said):
  made = dataclasses.replace(tiny(model=model), objective=Classify(**fields))
  with pytest.raises(NotImplementedError, match=said):
    program.check_models(made)


def test_what_cannot_be_is_refused():
  pipelined = ModelConfig(vocabulary=V, max_length=T)
  pipelined = pipelined.with_execution(pipeline=PipelineConfig(schedule='1f1b'))
  with pytest.raises(NotImplementedError, match="over='labels' with .*'1f1b'; use 'gpipe'"):
    Classify(over='labels').accepts({'policy': pipelined})
  for fields, said in (
    ({'too_long': 'right'}, "too_long='right' .*use 'drop' or 'left'"),
    ({'too_long': 'left', 'form': 'cloze'}, "would cut off the question; use 'drop'"),
    ({'form': 'target'}, "objective.form='target' is unknown"),
    ({'over': 'words'}, "objective.over='words' is unknown"),
    ({'over': 'labels', 'z_loss': 0.1}, 'objective.z_loss=0.1 is of all tokens'),
  ):
    with pytest.raises(ValueError, match=said):
      Classify(**fields)
