"""Is BERTScore what its definition says, whatever is beside a pair, on any mesh, of models of every
kind?
"""

import functools
import json
import math

import jax
import numpy as np
import pytest

from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from evaluation.bertscore import BertScore, BertSettings, estimates, main, read
from model import rearranged, transformer
from parallel.mesh import MeshConfig, make_mesh
from tests.evaluation.test_label_scores import CONFIGS

SAID = ['a film', 'nothing of the kind, they said, and left', '', 'an hour', 'an hour, and ' * 3]
TRUE = [
  ['the film', 'a movie'],
  ['nothing of this kind'],
  ['what'],
  ['an hour'],
  ['an hour and', ''],
]


@functools.cache
def generator(name: str, **sizes: int) -> Generator:
  devices = int(np.prod([*sizes.values()])) if sizes else 1
  mesh = make_mesh(MeshConfig(**{'data': 1} | sizes), jax.devices()[:devices])
  with jax.set_mesh(mesh):
    model = jax.jit(transformer.init, static_argnums=(0, 1))(CONFIGS[name], 3)
  return Generator(model, ByteTokenizer(), mesh)


@functools.cache
def scores(name: str, layer: int = 1, idf: bool = False) -> np.ndarray:
  return BertScore(generator(name), BertSettings(layer, idf))(SAID, TRUE)


@jax.jit
def hidden(model, tokens, segments):
  if model.config.encoder_layers:
    return model.encode(tokens, segments=segments)
  return model(tokens, segments=segments).hidden


def by_hand(name: str, said: str, true: str, layer: int, weight) -> list[float]:
  """Of one pair, from states of texts that are read alone, token by token."""
  model, tokenizer = generator(name), ByteTokenizer()
  if name == 't5':
    cut = BertScore(model, BertSettings(layer))._model
    assert len(cut.encoder.blocks) == layer
  else:
    cut = rearranged.shallow(model.model, layer)
  around = {'t5': (0, 1), 'llama': (1, 0)}.get(name, (1, 1))

  def states(text):
    ids = [*[tokenizer.bos] * around[0], *tokenizer.encode(text), *[tokenizer.eos] * around[1]]
    tokens = np.array([ids], np.int32)
    tokens = np.array([ids + [tokenizer.pad] * (64 - len(ids))], np.int32)
    real = (np.arange(64)[None] < len(ids)).astype(np.int32)
    with jax.set_mesh(model.mesh):
      x = hidden(cut, *map(model.put, (tokens, real)))
    return ids, np.asarray(x[0, : len(ids)], np.float64)

  (a, x), (b, y) = states(said.strip()), states(true.strip())
  alike = x @ y.T / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))
  P, R = (
    np.average(best, weights=[weight(i) for i in ids])
    for best, ids in ((alike.max(1), a), (alike.max(0), b))
  )
  return [P, R, 2 * P * R / (P + R)]


@pytest.mark.parametrize(
  'name, layer',
  [
    ('bert', 1),
    pytest.param('t5', 1, marks=pytest.mark.slow),
    pytest.param('bert', 2, marks=pytest.mark.slow),
    pytest.param('llama', 1, marks=pytest.mark.slow),
  ],
)
def test_scores_are_those_of_the_definition(name, layer):
  made = scores(name, layer)
  ends = () if name == 't5' else (ByteTokenizer().bos, ByteTokenizer().eos)

  def weight(i):
    return float(i not in ends)

  for i in (0, 1, 3):
    each = [by_hand(name, SAID[i], true, layer, weight) for true in TRUE[i]]
    np.testing.assert_allclose(made[i], np.max(each, 0), atol=2e-5)
  assert made[3] == pytest.approx([1, 1, 1], abs=1e-5) and not made[2].any()


def test_weights_are_those_of_rare_tokens():
  made, tokenizer = scores('bert', 1, True), ByteTokenizer()
  texts = [{*tokenizer.encode(text.strip())} for each in TRUE for text in each]

  def weight(i):
    c = len(texts) if i in (tokenizer.bos, tokenizer.eos) else sum(i in text for text in texts)
    return math.log((len(texts) + 1) / (c + 1))

  np.testing.assert_allclose(made[1], by_hand('bert', SAID[1], TRUE[1][0], 1, weight), atol=2e-5)


@pytest.mark.parametrize('name', ['bert', pytest.param('t5', marks=pytest.mark.slow)])
def test_a_score_is_of_its_pair_alone(name):
  scorer = BertScore(generator(name), BertSettings(1))
  alone = np.concatenate([scorer([said], [true]) for said, true in zip(SAID, TRUE)])
  np.testing.assert_allclose(alone, scores(name), atol=1e-5)
  np.testing.assert_allclose(scorer(SAID[::-1], TRUE[::-1])[::-1], scores(name), atol=1e-5)


@pytest.mark.parametrize(
  'name, sizes',
  [
    pytest.param('bert', {'data': 2, 'context': 2, 'tensor': 2}, marks=pytest.mark.slow),
    pytest.param('t5', {'fsdp': 2, 'tensor': 2}, marks=pytest.mark.slow),
  ],
)
def test_meshes_give_the_same_scores(name, sizes):
  made = BertScore(generator(name, **sizes), BertSettings(1))(SAID, TRUE)
  np.testing.assert_allclose(made, scores(name), atol=1e-5)


def test_a_baseline_becomes_nothing(tmp_path):
  path = tmp_path / 'table.tsv'
  path.write_text('LAYER,P,R,F\n0,0,0,0\n1,0.2,0.3,0.25\n')
  scorer = BertScore(generator('bert'), BertSettings(1, baseline=str(path)))
  expected = (scores('bert') - [0.2, 0.3, 0.25]) / (1 - np.array([0.2, 0.3, 0.25]))
  np.testing.assert_allclose(scorer(SAID, TRUE), expected, atol=1e-5)
  assert scorer.settings.name == 'BERTScore (layer 1, no idf, rescaled by table.tsv)'
  with pytest.raises(ValueError, match='has no line of layer 2; it has 2 layers'):
    BertScore(generator('bert'), BertSettings(baseline=str(path)))
  path.write_text('LAYER;P\n1;2\n')
  with pytest.raises(ValueError, match='no lines of LAYER,P,R,F'):
    BertScore(generator('bert'), BertSettings(1, baseline=str(path)))


def test_means_have_intervals():
  made = estimates(scores('bert'))
  for i, part in enumerate(('precision', 'recall', 'f1')):
    assert made[part].value == pytest.approx(scores('bert')[:, i].mean())
    assert made[part].low <= made[part].value <= made[part].high


def test_what_is_written_says_what_it_is_of(tmp_path, monkeypatch):
  """By the command: the file, its texts, and the checkpoint."""
  run = {'workdir': 'r', 'step': 3, 'digest': 'd3', 'weights': ''}
  monkeypatch.setattr(Generator, 'told', lambda *_: run)
  monkeypatch.setattr(Generator, 'load', lambda *_: None)

  class Same:
    settings = BertSettings(1)

    def __init__(self, *_):
      pass

    def __call__(self, answers, references):
      return np.ones((len(answers), 3))

  monkeypatch.setattr('evaluation.bertscore.BertScore', Same)
  made = []
  for said in ('a film', 'a film', 'an hour'):
    line = {'judged': [said], 'references': ['the film']}
    (tmp_path / 'task-0.jsonl').write_text(json.dumps(line) + '\n')
    answers = f'--answers={tmp_path}/task-0.jsonl'
    main(['--workdir=r', answers, '--layer=1', f'--json={tmp_path}/made.json'])
    made.append(json.loads((tmp_path / 'made.json').read_text())['results'])
  assert made[0]['run'] == run and made[0]['answers'] == f'{tmp_path}/task-0.jsonl'
  assert made[0] == made[1] and made[0]['texts'] != made[2]['texts']


def test_what_cannot_be_scored_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'layer=3: this model has 2; give one in \[1, 2\]'):
    BertScore(generator('bert'), BertSettings(3))
  scorer = BertScore(generator('bert'), BertSettings(1))
  for answers, references in (([], []), (['a'], [[]]), (['a'], [])):
    with pytest.raises(ValueError, match='give each answer a list'):
      scorer(answers, references)
  file = tmp_path / 'answers.jsonl'
  file.write_text(json.dumps({'answer': 'a', 'reference': 'b'}) + '\n')
  assert read(str(file)) == (['a'], [['b']])
  written = {'answers': ['a \n', 'x'], 'judged': ['a', 'x'], 'references': ['b', 'c']}
  file.write_text(json.dumps(written) + '\n')
  assert read(str(file)) == (['a'], [['b', 'c']]), "an evaluation's own lines"
  file.write_text('{"answer": "a", "references": ["b", "c"]}\n{"answer": "a", "true": 3}\n')
  with pytest.raises(ValueError, match='answers.jsonl:2 needs an answer.*it has answer, true'):
    read(str(file))
