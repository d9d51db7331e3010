"""Are scores of labels what the model says of their words, whatever stands beside them, for
decoders, encoders and encoder-decoders, on any mesh? And is calibration what its definition says?
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.extra import extended
from data.records import LabelRecord
from data.template import Template
from data.tokenizers import ByteTokenizer
from decode import choices
from decode.choices import choice_scores
from decode.front import Front
from decode.generator import Generator
from evaluation.classify import (
  CONTENT_FREE,
  Result,
  Scores,
  asking_of,
  confusion_picture,
  confusion_text,
  probabilities,
  scored,
)
from evaluation.examples import Manner, examples
from evaluation.prompts import Shots
from evaluation.task import Classification, Task
from model import adapters, transformer
from model.adaptation import AdapterConfig
from model.config import ModelConfig
from parallel.mesh import MeshConfig, make_mesh

MASKED = extended(ByteTokenizer(), ['<mask>'])
V = 264  # that of MASKED, rounded up to split
SIZES = dict(
  vocabulary=V, width=16, layers=2, heads=4, feed_forward=24, max_length=96, init_scale=1.0
)
CONFIGS = {
  'llama': ModelConfig(**SIZES, kv_heads=2),
  'gemma': ModelConfig(**SIZES, window=5, global_every=2, logit_softcap=1.5, tie_embeddings=True),
  't5': ModelConfig(
    **SIZES, encoder_layers=2, position='relative', relative_buckets=8, relative_distance=12
  ),
  'bert': ModelConfig(
    **SIZES,
    causal=False,
    norm='layer',
    norm_placement='post',
    position='learned',
    biases='all',
    gated=False,
    tie_embeddings=True,
    head='mlm',
    token_types=2,
  ),
}
WORDS = {'up': ['good', 'fun'], 'down': ['bad'], 'level': ['so so']}
TEMPLATE = Template.of({'pattern': '{{ text }}:[MASK]', 'words': WORDS, 'between': ';'})
CLOZE = Template.of(
  {'pattern': '{{ text }}:[MASK].', 'words': {'up': ['g', 'f'], 'down': 'b', 'level': 's'}}
)
TEXTS = ['a film', 'nothing of the kind, they said, and left', 'x', 'an hour']


def template_of(name: str) -> Template:
  return CLOZE if name == 'bert' else TEMPLATE


@functools.cache
def generator(name: str, **sizes: int) -> Generator:
  devices = int(np.prod([*sizes.values()])) if sizes else 1
  mesh = make_mesh(MeshConfig(**{'data': 1} | sizes), jax.devices()[:devices])
  with jax.set_mesh(mesh):
    model = jax.jit(transformer.init, static_argnums=(0, 1))(CONFIGS[name], 0)
  return Generator(model, MASKED, mesh)


def by_hand(name: str, asking, texts) -> np.ndarray:
  """Of every text and word alone, from all logits of a forward pass."""
  g, rows = generator(name), []
  for text in texts:
    read, row = list(asking.ids(text)), []
    for word in asking.words:
      if name == 'bert':
        logits = logits_of(g, read)[[read.index(259)]]
      elif name == 't5':
        logits = logits_of(g, [g.tokenizer.pad, *word.ids[:-1]], read)
      else:
        logits = logits_of(g, read + list(word.ids[:-1]))[len(read) - 1 :]
      logs = jax.nn.log_softmax(logits[:, : MASKED.vocabulary])
      row.append(sum(float(logs[i, token]) for i, token in enumerate(word.ids)))
    rows.append(row)
  return np.array(rows)


def logits_of(g, ids, source=None):
  """[T, V] of one row, by a forward pass over it and padding that it does not see."""
  with jax.set_mesh(g.mesh):
    given = {} if source is None else dict(zip(('source', 'source_segments'), padded(source)))
    return np.asarray(whole(g.model, *padded(ids), given))[0]


def padded(ids):
  ids = np.array([[*ids, *[0] * (48 - len(ids))]], np.int32)
  return ids, (ids != 0).astype(np.int32)


@jax.jit
def whole(model, tokens, segments, given):
  segments = segments if not model.config.causal else jnp.ones_like(segments)
  return model.logits(model(tokens, segments=segments, **given).hidden)


def sums(name: str, asking, texts, **sizes) -> np.ndarray:
  rows = [asking.ids(text) for text in texts]
  mask = -1 if asking.mask is None else asking.mask
  return choice_scores(generator(name, **sizes), rows, [w.ids for w in asking.words], mask)


@pytest.mark.parametrize(
  'name',
  ['llama', *(pytest.param(name, marks=pytest.mark.slow) for name in ('t5', 'bert', 'gemma'))],
)
def test_scores_are_those_of_each_word_alone(name):
  asking = asking_of(generator(name), template_of(name))
  expected = by_hand(name, asking, TEXTS[:2])
  np.testing.assert_allclose(sums(name, asking, TEXTS[:2]), expected, atol=2e-5)
  assert np.ptp(expected, 1).min() > 0.1, 'labels differ, or nothing could go wrong'


def test_scores_are_sums_of_what_generation_scores():
  g = generator('llama')
  asking = asking_of(g, TEMPLATE)
  made = sums('llama', asking, TEXTS)
  for i, text in enumerate(TEXTS):
    read = asking.ids(text)
    for j, word in enumerate(asking.words):
      (logs,) = g.score([[*read, *word.ids]])
      np.testing.assert_allclose(made[i, j], logs[len(read) - 1 :].sum(), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['llama', 't5', 'bert'])
def test_soft_tokens_stand_before_what_is_asked(name):
  """The scores are those of texts whose ids begin with theirs."""
  g, settings = generator(name), AdapterConfig(kind='prompt', tokens=3, initial='random')
  with jax.set_mesh(g.mesh):
    soft = jax.jit(lambda model: adapters.new(model, settings, jax.random.key(1)))(g.model)
    model = adapters.applied(g.model, soft, settings)
  prompted, asking = Generator(model, MASKED, g.mesh), asking_of(g, template_of(name))
  rows, words = [list(asking.ids(text)) for text in TEXTS], [w.ids for w in asking.words]
  mask = -1 if asking.mask is None else asking.mask
  made = choice_scores(prompted, rows, words, mask)
  assert prompted.plain.soft == (V, V + 1, V + 2)

  prompted.plain = Front()  # asked for by their ids, they are read as any others
  expected = choice_scores(prompted, [[V, V + 1, V + 2, *row] for row in rows], words, mask)
  np.testing.assert_allclose(made, expected, atol=2e-5)
  assert np.abs(made - choice_scores(g, rows, words, mask)).max() > 0.01


def test_company_and_order_change_nothing(monkeypatch):
  asking = asking_of(generator('llama'), TEMPLATE)
  expected = sums('llama', asking, TEXTS)
  np.testing.assert_allclose(sums('llama', asking, TEXTS[::-1])[::-1], expected, atol=1e-5)
  np.testing.assert_allclose(sums('llama', asking, TEXTS[1:2]), expected[1:2], atol=1e-5)
  words = [word.ids for word in asking.words]
  rows = [asking.ids(text) for text in TEXTS]
  turned = choice_scores(generator('llama'), rows, words[::-1])[:, ::-1]
  np.testing.assert_allclose(turned, expected, atol=1e-5)
  monkeypatch.setattr(choices, 'ROWS', 4)  # a text at a time
  np.testing.assert_allclose(sums('llama', asking, TEXTS), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, sizes',
  [
    ('llama', {'data': 2, 'tensor': 2}),
    ('llama', {'fsdp': 2, 'context': 2}),
    ('llama', {'stage': 2}),
    ('bert', {'data': 2, 'tensor': 2}),
    ('bert', {'context': 2}),
    ('t5', {'data': 2, 'tensor': 2}),
  ],
  ids=str,
)
def test_devices_change_rounding_only(name, sizes):
  asking = asking_of(generator(name), template_of(name))
  made = sums(name, asking, TEXTS[:3], **sizes)
  np.testing.assert_allclose(made, sums(name, asking, TEXTS[:3]), atol=2e-5)


RECORDS = [(f'f:{i}', LabelRecord(text, [*WORDS][i % 3])) for i, text in enumerate(TEXTS)]
POOL = [LabelRecord(f'{i}', [*WORDS][i % 3]) for i in range(12)]


def test_what_is_asked_is_what_is_said_to_be():
  """Scores with shots are those of the texts with the shots before them, and a digest tells every
  other set of prompts.
  """
  g = generator('llama')
  asking = asking_of(g, TEMPLATE)
  shots = Shots(POOL, asking.template.labels, 3, seed=0)
  made = scored(g, asking, RECORDS, shots)
  assert made.truth.tolist() == [0, 1, 2, 0] and made.free.shape == (len(CONTENT_FREE), 3)
  before = ''.join(f'{r.text}:{WORDS[r.label][0]};' for r in shots.before())
  texts = [before + text for text in (*TEXTS, *CONTENT_FREE)]
  expected = asking.label_scores(sums('llama', asking, texts))
  np.testing.assert_allclose(np.concatenate([made.labels, made.free]), expected, atol=1e-5)

  digests = {made.prompts}
  for records, seed in ((RECORDS[:3], 0), (RECORDS, 1)):
    others = Shots(POOL, asking.template.labels, 3, seed)
    digests.add(scored(g, asking, records, others).prompts)
  relabelled = [(place, LabelRecord(r.text, 'up')) for place, r in RECORDS]
  digests.add(scored(g, asking, relabelled, shots).prompts)
  assert len(digests) == 4
  assert scored(g, asking, RECORDS, shots).prompts == made.prompts


def test_prompts_beyond_the_context_are_cut_and_counted():
  g = generator('llama')
  asking = asking_of(g, TEMPLATE)
  long = [('f:1', LabelRecord('x' * 100 + 'an hour', 'up')), ('f:2', LabelRecord('a', 'up'))]
  made = scored(g, asking, long, Shots([], asking.template.labels, 0))
  assert made.cut == 1
  kept = ('x' * 100 + 'an hour')[-(96 - 5 - 2) :]  # 5 of the longest word, bos, and the colon
  expected = asking.label_scores(sums('llama', asking, [kept]))
  np.testing.assert_allclose(made.labels[:1], expected, atol=1e-5)
  with pytest.raises(ValueError, match='f:9: label=.upp. is unknown; did you mean .up.'):
    scored(g, asking, [('f:9', LabelRecord('a', 'upp'))], Shots([], 'ab', 0))


SCORES = np.log([[0.6, 0.2], [0.3, 0.3], [0.1, 0.3]])
FREE = np.log([[0.6, 0.2], [0.2, 0.2], [0.3, 0.1]])


def follows_its_definition(calibrated) -> None:
  """By hand: the mean over content-free texts of label probabilities is (3/4 + 1/2 + 3/4) / 3 = 2/3
  and 1/3.
  """
  p = np.array([[3 / 4, 1 / 4], [1 / 2, 1 / 2], [1 / 4, 3 / 4]])
  expected = p / np.array([[2 / 3, 1 / 3]])
  expected /= expected.sum(1, keepdims=True)
  np.testing.assert_allclose(calibrated(SCORES, FREE), expected, rtol=1e-12)


def test_calibration_divides_by_what_is_said_of_nothing():
  follows_its_definition(functools.partial(probabilities, calibration='contextual'))
  np.testing.assert_allclose(probabilities(SCORES, FREE)[0], [3 / 4, 1 / 4])
  # The second of the texts without content is the empty one.
  np.testing.assert_allclose(
    probabilities(SCORES, FREE + np.log([[1, 1], [2, 1], [1, 1]]), 'pmi')[1], [1 / 3, 2 / 3]
  )
  with pytest.raises(ValueError, match="calibration='context' is unknown"):
    probabilities(SCORES, FREE, 'context')


def test_planted_faults_are_found(monkeypatch):
  def wrong_sign(scores, free):
    return probabilities(scores, -free, 'contextual')

  with pytest.raises(AssertionError):
    follows_its_definition(wrong_sign)
  laid = choices._laid

  def cut(*given):
    *rest, counts = laid(*given)
    return *rest, np.maximum(counts - 1, 1)

  def turned(*given):
    pairs, *rest = laid(*given)
    return dict(zip(reversed(pairs), pairs.values())), *rest

  monkeypatch.setattr(choices, 'SHARED', 1)
  for fault in (cut, turned):
    monkeypatch.setattr(choices, '_laid', fault)
    with pytest.raises(AssertionError):
      test_scores_are_those_of_each_word_alone('llama')


def test_a_result_says_what_it_is_of():
  rng = np.random.default_rng(0)
  truth = rng.integers(0, 3, 40)
  scores = Scores(np.log(np.eye(3)[truth] + 0.5), FREE[:, [0, 1, 1]], truth, 'abc', 0)
  result = Result.of(scores, TEMPLATE, 'none', 0, {'shots': 2, 'workdir': 'runs/x'})
  values = result.values()
  assert values['n'] == 40 and values['prompts'] == 'abc' and values['shots'] == 2
  assert values['metrics']['accuracy']['value'] == 1
  assert values['metrics']['accuracy']['low'] == pytest.approx(40 / (40 + 1.96**2), abs=1e-4)
  assert np.trace(values['confusion']) == 40
  text = confusion_text(result.labels, result.confusion)
  assert '1 up' in text and str(result.confusion[1, 1]) in text.splitlines()[2]
  assert confusion_picture(result.labels, result.confusion, 'x').startswith(b'\x89PNG')


def test_what_is_asked_of_a_label_has_the_words_of_its_template(tmp_path):
  """In the digest: the settings name the template's file alone."""
  file, texts = tmp_path / 'template.json', [{'text': f'it is {i}', 'label': 'up'} for i in 'ab']
  task = Task(Classification(str(file)), lambda: iter(texts))
  digests = []
  for words in ({'up': ['good'], 'down': ['bad']}, {'up': ['bad'], 'down': ['good']}):
    file.write_text(json.dumps({'pattern': '{{ text }}:', 'words': words}))
    digests.append([each.digest for each in examples(task, 0, Manner())])
    assert digests[-1] == [each.digest for each in examples(task, 0, Manner())]
  assert not {*digests[0]} & {*digests[1]}
