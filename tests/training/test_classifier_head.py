"""Is what a head learns the formula, of packed texts what it is of each alone, on any mesh; and
does evaluation say of a trained one what it says by hand?
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from data import labelled, showing
from data.classes import within
from data.config import CleanConfig, SourceConfig
from data.records import LabelRecord
from data.template import Template
from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from evaluation import heads as judged
from evaluation.classify import Result
from model import heads, transformer
from model.adaptation import AdapterConfig
from objectives.classify_head import HEAD, ClassifyHead
from parallel import axes, hosts
from parallel.mesh import MeshConfig, make_mesh
from parallel.pipeline import PipelineConfig
from tests.training.conftest import (
  SGD,
  T,
  assert_close,
  host,
  initial_model,
  quickly,
  run_here,
  tiny,
)
from tests.training.test_tuned_classifier import BERT
from training import program, state as states
from workdir import adapted, judging_run
from workdir.head import head_of
from workdir.open import open_run
from workdir.untrained import write_run

LABELS = ('up', 'down', 'side')
# The first letter tells the label; lengths pack into rows of T unevenly.
TEXTS = [('abc'[n % 3] + 'xyz'[: n % 4] + str(n), LABELS[n % 3]) for n in range(90)]
MODELS = {'decoder': {}, 'bert': BERT, 'pooled bert': BERT | {'pooler': True}}
each = pytest.mark.parametrize('name', MODELS)


def config(directory, name, texts=TEXTS, objective=None, **parts):
  path, template = directory / 'texts.csv', directory / 'template.json'
  path.write_text('\n'.join(['text,label', *(','.join(pair) for pair in texts)]) + '\n')
  words = {label: label for label in LABELS}
  template.write_text(json.dumps({'pattern': '{{ text }}?', 'words': words}))
  data = {
    'sources': (SourceConfig(kind='csv', path=str(path), format='label'),),
    'validation_fraction': 0.3,
    'clean': CleanConfig(anonymise=(), near_duplicates=0),
    'split': 'hash',
    'cache_dir': str(directory / 'cache'),
  }
  parts = {'optimizer': SGD} | parts
  model = MODELS[name] | parts.get('model', {})
  made = tiny(**parts | {'model': model, 'data': data | parts.get('data', {})})
  pooled = 'last' if made.model.causal else 'first'
  fields = {'template': str(template), 'pooled': pooled} | (objective or {})
  return dataclasses.replace(made, objective=ClassifyHead(**fields))


def batch_of(made):
  """Training rows as one batch."""
  prepared = made.objective.read(made.data, lambda line: None)
  return made.objective.batches(prepared, made.data, range(made.data.batch_size)).take(None)


def texts_of(made, batch) -> list[tuple[list[int], int]]:
  """(ids, label) of what is in a batch, by the records: each text is found in the rows, and nothing
  else is.
  """
  known = {}
  for text, label in TEXTS:
    ids = [1, *(byte + 3 for byte in text.encode()), *([] if made.model.causal else [2])]
    known[tuple(ids)] = LABELS.index(label)
  rows = []
  for row, segments in enumerate(batch.segments):
    for segment in range(1, segments.max() + 1):
      rows.append(tuple(batch.tokens[row][segments == segment].tolist()))
  return [([*ids], known[ids]) for ids in rows]


def by_hand(models, texts):
  """The mean loss of texts, each in a row of its own, as BertForSequenceClassification and
  LlamaForSequenceClassification of transformers have it; and which share of them is found.
  """
  model, head = models['policy'], models['head']
  tokens = np.zeros((len(texts), T), np.int32)
  for row, (ids, _) in zip(tokens, texts):
    row[: len(ids)] = ids
  segments = jnp.asarray(tokens != 0, jnp.int32)
  x = model(jnp.asarray(tokens), segments=segments).hidden
  at = [len(ids) - 1 if model.config.causal else 0 for ids, _ in texts]
  x = x[np.arange(len(texts)), np.array(at)]
  if model.pooler is not None:
    x = jnp.tanh(x @ model.pooler.dense[...] + model.pooler.bias[...][None])
  logits = x @ head['weight'][...] + head['bias'][...][None]
  labels = np.array([label for _, label in texts])
  log_p = jax.nn.log_softmax(logits)[np.arange(len(texts)), labels]
  return -log_p.mean(), (logits.argmax(1) == labels).mean()


def new_models(made):
  """Of the run's config, with a bias that is not 0."""
  shape = jax.eval_shape(functools.partial(transformer.init, made.model, 0))
  model = jax.tree.unflatten(
    jax.tree.structure(shape), [*map(jnp.asarray, initial_model(made.model, 0))]
  )
  head = heads.new(made.model, 1, labels=len(LABELS))
  head['bias'] = head['bias'].replace(jnp.array([0.5, -0.25, 0.0]))
  return {'policy': model, 'head': head}


def mean(made, models, batch):
  total, weight = made.objective.loss(models, batch)[made.objective.term]
  return total / weight


@pytest.mark.slow
@pytest.mark.parametrize('name', ['decoder', 'pooled bert'])
def test_packed_texts_are_what_each_is_alone(tmp_path, one_device, name):
  made = config(tmp_path, name, model={'layers': 1})
  models, batch = new_models(made), batch_of(made)
  texts = texts_of(made, batch)
  assert batch.segments.max() > 1 and batch.weights.sum() == len(texts)

  @jax.jit
  def both(models, batch):
    hand = by_hand(models, texts)
    return mean(made, models, batch), made.objective.sums(models, batch)[1], hand

  batch = jax.tree.map(jnp.asarray, batch)
  loss, sums, (expected, right) = quickly(both, models, batch)(models, batch)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(sums['correct'], right * len(texts), rtol=1e-6)


@pytest.mark.slow
@each
def test_the_gradient_is_that_of_each_alone(tmp_path, one_device, name):
  """All that the head reads has one, the head and its bias too."""
  made = config(tmp_path, name)
  models, batch = new_models(made), batch_of(made)
  texts = texts_of(made, batch)
  batch = jax.tree.map(jnp.asarray, batch)
  slopes = jax.jit(jax.grad(lambda models: mean(made, models, batch)))(models)
  expected = jax.jit(jax.grad(lambda models: by_hand(models, texts)[0]))(models)
  assert_close(slopes, expected, 4e-6)
  still = {path for path, g in host(slopes).items() if np.abs(g).max() < 1e-6}
  # The head over the vocabulary is none of it, and a bias of all keys changes no softmax.
  assert all("['policy'].head." in path or 'k_bias' in path for path in still), still


class Run:
  """The state and the step of train.py."""

  def __init__(self, made, devices=1):
    self.mesh = make_mesh(made.mesh, jax.devices()[:devices])
    with jax.set_mesh(self.mesh):
      make_state, self.train_step = program.make_program(made)
      target = program.make_target(made, make_state, self.mesh, '.')
      self.state = program.begin_state(made, make_state, target)

  def step(self, batch):
    with jax.set_mesh(self.mesh):
      rows = jax.NamedSharding(self.mesh, axes.spec('batch', 'length'))
      batch = hosts.RowShards(rows, batch.tokens.shape)(batch)
      self.state, metrics, _ = self.train_step(self.state, batch)
    return jax.device_get(metrics)


MESHES = [
  (4, 1, {}),
  (2, 8, {'data': 2, 'fsdp': 2, 'tensor': 2, 'zero': 3}),
  (1, 4, {'tensor': 2, 'context': 2}),
  (1, 2, {'stage': 2}),
  (2, 4, {'fsdp': 4, 'zero': 1}),
]


@pytest.mark.slow
@pytest.mark.long
@each
def test_microbatches_and_devices_are_one_batch(tmp_path, name):
  batch = batch_of(config(tmp_path, name))
  whole = Run(config(tmp_path, name))
  expected = whole.step(batch)
  for parts, devices, mesh in MESHES:
    again = Run(config(tmp_path, name, mesh=mesh, train={'accumulation': parts}), devices)
    metrics = again.step(batch)
    np.testing.assert_allclose(metrics['loss'], expected['loss'], rtol=1e-5, err_msg=str(mesh))
    np.testing.assert_allclose(metrics['accuracy'], expected['accuracy'], rtol=1e-6)
    assert_close(again.state.models, whole.state.models, 1e-5)


def test_a_head_begins_as_it_says(one_device):
  network = tiny().model
  head = heads.new(network, 3, labels=500)
  np.testing.assert_allclose(head['weight'][...].std(), (network.D + 1) ** -0.5, rtol=0.03)
  assert not head['bias'][...].any()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'name, mesh, adapter',
  [
    ('decoder', {'data': -1}, ''),
    ('decoder', {'data': 2, 'fsdp': 2, 'tensor': 2}, 'lora'),
    ('pooled bert', {'data': 2, 'fsdp': 4, 'zero': 2}, ''),
    ('bert', {'data': -1}, 'lora'),
  ],
  ids=range(4),
)
def test_a_trained_head_is_judged_as_by_hand(tmp_path, name, mesh, adapter):
  """From files to a result, of what was held out; and merged, it says the same."""
  made = config(
    tmp_path,
    name,
    optimizer={'name': 'adamw', 'learning_rate': 0.01, 'clip_norm': 1.0},
    train={'steps': 100, 'save_every': 50, 'log_every': 50},
    mesh=mesh,
  )
  if adapter:
    made = dataclasses.replace(made, adapter=AdapterConfig(kind=adapter, rank=4))
  run = tmp_path / 'run'
  run_here(made, run)
  template = Template.read(made.objective.template)
  _, held_out = labelled.split(made.data)

  def scored(directory, mesh=MeshConfig(data=1)):
    g = Generator.load(directory, mesh=mesh)
    head = head_of(directory, HEAD, 'last', g.mesh, made.objective)
    return judged.scored(g, head, template, held_out), head

  scores, head = scored(run)
  result = Result.of(scores, template, 'none', 0, {})
  assert result.metrics['accuracy'].value > 0.9 and result.metrics['accuracy'].n == len(held_out)

  opened = open_run(run)
  causal = opened.model.config.causal
  texts = [
    (
      [1, *(b + 3 for b in record.text.encode()), *([] if causal else [2])],
      LABELS.index(record.label),
    )
    for _, record in held_out
  ]
  with jax.set_mesh(opened.mesh):
    loss, right = jax.jit(lambda models: by_hand(models, texts))(
      {'policy': opened.model, 'head': head}
    )
  log_p = scores.labels - np.log(np.exp(scores.labels).sum(1, keepdims=True))
  by_scores = -log_p[np.arange(len(texts)), scores.truth].mean()
  np.testing.assert_allclose(by_scores, loss, rtol=1e-4)
  assert result.metrics['accuracy'].value == pytest.approx(float(right))

  # As a judge it says of answers whether they have a label.
  judge = judging_run.judge_of(judging_run.JudgeRequest(run, label=LABELS[1]))
  answers = [record.text for _, record in held_out]
  assert judge(['a prompt'] * len(answers), answers) == (scores.labels.argmax(1) == 1).tolist()
  with pytest.raises(ValueError, match='say which of them refusals have by --judge_label'):
    judging_run.judge_of(judging_run.JudgeRequest(run))
  with pytest.raises(ValueError, match='--judge_threshold=1 is not of a run of objective.kind'):
    judging_run.judge_of(judging_run.JudgeRequest(run, threshold=1, label=LABELS[1]))

  split = scored(run, MeshConfig(data=2, tensor=2))[0]
  np.testing.assert_allclose(split.labels, scores.labels, atol=1e-4)
  if adapter:
    adapted.merge(run, tmp_path / 'merged', 'last', False, lambda line: None)
    merged = scored(tmp_path / 'merged')[0]
    np.testing.assert_allclose(merged.labels, scores.labels, atol=1e-4)
    assert merged.prompts == scores.prompts


@pytest.mark.slow
def test_the_head_alone_is_trained_where_that_is_asked(tmp_path):
  """And a run that goes on is the one that was not interrupted."""
  body = tmp_path / 'body'
  run_here(config(tmp_path, 'decoder', train={'steps': 1}), body)
  fields = {'trained': ('head.*',), 'save_every': 2, 'eval_every': 2}
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  for directory, steps in ((whole, 4), (parts, 2), (parts, 4)):
    made = config(tmp_path, 'decoder', train=fields | {'steps': steps})
    run_here(dataclasses.replace(made, init=str(body)), directory)
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  both = [head_of(run, HEAD, 'last', mesh, made.objective) for run in (whole, parts)]
  assert_close(*both, 0)
  assert_close(open_run(body).model, open_run(whole).model, 0)
  other = made.objective.template.replace('template', 'other')
  words = {label: label for label in reversed(LABELS)}
  with open(other, 'w') as file:
    json.dump({'pattern': '{{ text }}?', 'words': words}, file)
  with pytest.raises(ValueError, match='tells .* apart, and objective.template='):
    head_of(whole, HEAD, 'last', mesh, dataclasses.replace(made.objective, template=other))


@pytest.mark.slow
def test_dropout_is_of_the_body(tmp_path):
  made = config(tmp_path, 'pooled bert', train={'dropout': ('residual=0.1',)})
  assert np.isfinite(Run(made).step(batch_of(made))['loss'])


def test_a_text_that_is_too_long_is_cut_inside():
  assert within([1, 5, 6, 7, 2], 4, 'right', False) == [1, 5, 6, 2]
  assert within([1, 5, 6, 7, 2], 4, 'left', False) == [1, 6, 7, 2]
  assert within([1, 5, 6, 7], 3, 'left', True) == [1, 6, 7]
  with pytest.raises(ValueError, match='rows of 2 tokens have no room for a text'):
    within([1, 5, 2], 2, 'right', False)


@pytest.mark.parametrize(
  'too_long, ids', [('left', [1, 7, 8]), ('right', [1, 5, 6]), ('drop', None)]
)
def test_training_cuts_so_too(tmp_path, too_long, ids):
  made = config(tmp_path, 'decoder', objective={'too_long': too_long}, data={'sequence_length': 3})
  writer, _ = made.objective.writer(ByteTokenizer())
  example = writer.example('here', LabelRecord('\x02\x03\x04\x05', 'side'))
  assert example.ids.tolist() == [1, 5, 6, 7, 8, 2]
  fitted = made.objective.fitted(example, made.data)
  if ids is None:
    assert fitted.example is None and fitted.dropped == 'too_long'
    return
  assert fitted.example.ids.tolist() == [*ids, 2]
  assert fitted.example.scored.tolist() == [False] * 3 + [True]


@pytest.mark.parametrize('name', ['decoder', 'bert'])
def test_examples_are_shown_with_their_labels(tmp_path, name):
  made = config(tmp_path, name)
  prepared = made.objective.read(made.data, lambda line: None)
  shown = showing.examples(made, prepared, 3)
  known = dict(TEXTS)
  texts = [text for text in known if f'{text}' in shown]
  assert shown.count('\x1b[32m') == 3 and any(
    f'\x1b[32m{known[text]}\x1b' in shown for text in texts
  )


REFUSED = [
  ('decoder', {'encoder_layers': 2}, {}, "use objective.kind='classify_seq2seq'"),
  ('decoder', {}, {'pooled': 'first'}, "set objective.pooled='last'"),
  ('bert', {}, {'pooled': 'last'}, "set objective.pooled='first'"),
]


@pytest.mark.parametrize('name, model, fields, said', REFUSED, ids=range(3))
def test_models_that_it_does_not_fit_are_refused(tmp_path, name, model, fields, said):
  made = config(tmp_path, name, model=model, objective=fields)
  with pytest.raises((NotImplementedError, ValueError), match=said):
    program.check_models(made)


def test_what_else_it_cannot_do_is_refused(tmp_path):
  made = config(tmp_path, 'decoder')
  network = made.model.with_execution(pipeline=PipelineConfig(schedule='1f1b'))
  with pytest.raises(NotImplementedError, match="'1f1b' is of one; use 'gpipe'"):
    made.objective.accepts({'policy': network})
  soft = dataclasses.replace(made, adapter=AdapterConfig(kind='prompt', tokens=2))
  with pytest.raises(NotImplementedError, match="or adapter.kind='lora'"):
    program.check_models(soft)
  writer, _ = made.objective.writer(ByteTokenizer())
  with pytest.raises(ValueError, match="here: label='out' is unknown"):
    writer.example('here', LabelRecord('a', 'out'))


@pytest.mark.slow
def test_a_head_goes_with_the_run_that_is_made_smaller_and_not_with_an_export(tmp_path, capsys):
  made = config(tmp_path, 'decoder')
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    trained = {name: states.new_model(made, name) for name in states.roles(made)}
  ByteTokenizer().save(tmp_path / 'run' / 'tokenizer')
  write_run(tmp_path / 'run', made, {'models': trained}, lambda _: None)

  def run(name, *options):
    convert.main([name, '--workdir', f'{tmp_path}/run', '--to', f'{tmp_path}/{name}', *options])
    return tmp_path / name

  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  for directory in (run('quantise', '--scheme=int8'), run('prune', '--scheme=0.5')):
    head = head_of(directory, HEAD, 'last', mesh, made.objective)
    assert_close(head, trained[HEAD], 0)
    assert open_run(directory).model.config.V == made.model.V
  capsys.readouterr()
  (tmp_path / 'template.json').unlink()  # which says of what labels the head was
  run('export')
  assert "NOTE: head of objective.kind='classify_head' stays behind" in capsys.readouterr().out
