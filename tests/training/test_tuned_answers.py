"""Does an encoder-decoder learn to classify as it is asked to, and what it is asked?"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from data import labelled
from data.answers import AnswerWriter
from data.config import CleanConfig, SourceConfig
from data.records import LabelRecord
from data.template import Template
from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from decode.loaded import LoadedModel
from evaluation import classify
from evaluation.prompts import Shots
from model import transformer
from objectives.classify_seq2seq import ClassifySeq2Seq
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import run_here, tiny
from tests.training.test_denoise import T5
from training import program

# The first letter tells the label.
TEXTS = [(f'{"ab"[n % 2]}{n}', ('up', 'down')[n % 2]) for n in range(40)]
WORDS = {'up': ['yes', 'yeah'], 'down': 'no'}
S, T = 16, 8


def config(directory, objective=None, **parts):
  """Of a template and records that are written there."""
  path, template = directory / 'texts.csv', directory / 'template.json'
  path.write_text('\n'.join(['text,label', *(','.join(each) for each in TEXTS)]) + '\n')
  template.write_text(json.dumps({'pattern': '{{ text }}?', 'words': WORDS}))
  data = {
    'sources': (SourceConfig(kind='csv', path=str(path), format='label'),),
    'validation_fraction': 0.3,
    'clean': CleanConfig(anonymise=(), near_duplicates=0),
    'split': 'hash',
    'cache_dir': str(directory / 'cache'),
  }
  made = tiny(**parts | {'model': T5 | parts.get('model', {}), 'data': data})
  objective = objective or ClassifySeq2Seq(template=str(template), target_length=T)
  return dataclasses.replace(made, objective=objective)


def test_what_is_learned_is_what_is_asked_and_answered(tmp_path, monkeypatch):
  """Ids of an example, of what the words are chosen from, and by hand; and so in the rows."""
  made = config(tmp_path)
  tokenizer, template = ByteTokenizer(), Template.read(made.objective.template)
  asked = []

  def choose(model, ids, words, mask):
    asked.append((ids, words))
    return np.zeros((len(ids), len(words)))

  monkeypatch.setattr(classify, 'choice_scores', choose)

  class Model(LoadedModel):
    context = 100

    def __init__(self):
      pass

  asking = classify.Asking(template, tokenizer, 'target')
  records = [('here', LabelRecord(*each)) for each in TEXTS]
  classify.scored(Model(), asking, records, Shots([], template.labels, 0))
  ((ids, words),) = asked
  writer, _ = made.objective.writer(tokenizer)
  assert isinstance(writer, AnswerWriter)
  expected = set()
  for (place, record), read in zip(records, ids):
    example = writer.example(place, record)
    word = {'up': b'yes', 'down': b'no'}[record.label]
    answer = [*(byte + 3 for byte in word), 2]
    assert example.ids[~example.scored].tolist() == [*read]
    assert [*read] == [*(byte + 3 for byte in f'{record.text}?'.encode()), 2]
    assert example.ids[example.scored].tolist() == answer and tuple(answer) in words
    expected.add((*read, *answer))

  prepared = made.objective.read(made.data, lambda line: None)
  batch = made.objective.batches(prepared, made.data, range(8)).take(None)
  for row in range(8):
    for segment in range(1, batch.segments[row].max() + 1):
      source = batch.source[row][batch.source_segments[row] == segment]
      assert (*source, *batch.targets[row][batch.segments[row] == segment]) in expected


REFUSED = [
  ({'prefix': 'is it: '}, "objective.prefix='is it: ' would stand .*put it into the template"),
  ({'too_long': 'right'}, "objective.too_long='right' would cut off .*use 'drop'"),
  ({'target_too_long': 'left'}, "objective.target_too_long='left' would cut off .*use 'drop'"),
]


@pytest.mark.parametrize('fields, said', REFUSED, ids=range(3))
def test_what_would_be_asked_otherwise_is_refused(fields, said):
  with pytest.raises(ValueError, match=said):
    ClassifySeq2Seq(**fields)


@pytest.mark.parametrize(
  'model, form',
  [({'encoder_layers': 0}, 'prefix'), ({'encoder_layers': 0, 'causal': False}, 'cloze')],
)
def test_other_models_are_told_what_tunes_them(tmp_path, model, form):
  said = f"use objective.kind='classify' with objective.form='{form}'"
  with pytest.raises(NotImplementedError, match=said):
    program.check_models(config(tmp_path, model={'position': 'rope'} | model))


def test_other_records_are_refused(tmp_path):
  made = config(tmp_path)
  pairs = dataclasses.replace(made.data.sources[0], format='pair')
  data = dataclasses.replace(made.data, sources=(pairs,))
  with pytest.raises(ValueError, match="is not of the records that objective.kind='classify_seq2"):
    made.objective.read(data, lambda line: None)
  writer, _ = made.objective.writer(ByteTokenizer())
  with pytest.raises(ValueError, match="here: label='side' is unknown"):
    writer.example('here', LabelRecord('a', 'side'))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('mesh', [{'data': -1}, {'data': 2, 'fsdp': 2, 'tensor': 2}], ids=range(2))
def test_a_tuned_model_classifies_what_was_held_out(tmp_path, mesh):
  """Better than chance by far, by the prompts that an untuned model is asked."""
  made = config(
    tmp_path,
    optimizer={'name': 'adamw', 'learning_rate': 0.01, 'clip_norm': 1.0},
    train={'steps': 80, 'save_every': 80, 'log_every': 80, 'eval_every': 0},
    mesh=mesh,
  )
  template = Template.read(made.objective.template)
  _, held_out = labelled.split(made.data)
  assert len(held_out) >= 8

  run_here(made, tmp_path / 'run')
  shots = Shots([], template.labels, 0)

  def asked(g):
    return classify.scored(g, classify.asking_of(g, template), held_out, shots)

  here = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  with jax.set_mesh(here):
    model = jax.jit(transformer.init, static_argnums=(0, 1))(made.model, 0)
  before = asked(Generator(model, ByteTokenizer(), here))
  after = asked(Generator.load(tmp_path / 'run'))
  assert before.prompts == after.prompts
  result = classify.Result.of(after, template, 'none', 0, {})
  assert result.metrics['accuracy'].value > 0.9
