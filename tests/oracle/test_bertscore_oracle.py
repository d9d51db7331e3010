"""Is BERTScore what bert-score computes, of the same model and texts?"""

import pathlib

import numpy as np
import pytest

from data import tokenizers
from data.huggingface import HuggingFaceTokenizer
from decode.generator import Generator
from evaluation.bertscore import BertScore, BertSettings
from model import checkpoint
from tests.data import tokenizer_families as families
from tests.goldens import ours

pytestmark = pytest.mark.oracle
utils = pytest.importorskip('bert_score.utils', reason='bert-score is not installed')

SAID = [
  'the quick brown fox',
  'Is it 12 or 3456? naïve café',
  'dogs and cats',
  '  lazy dogs  ',
  'two cats; ' * 3,
  'größte über',
  'Привет, мир! Καλημέρα',
  '你好，世界 こんにちは',
  'مرحبا بالعالم שלום',
  'क्या हाल है? 👩‍👩‍👧 e\u0301',
  'a' * 300,
  'the\u200b quick\ufeff \x00fox\x7f\tdogs',
  '?!?!?!',
  '',
  'lazy dogs',
  '',
  ' \n\t',
]
TRUE = [
  'the lazy brown dogs',
  'is it 12?',
  'hello world',
  'lazy dogs',
  'and two cats',
  'please stop, please!',
  'привет мир',
  '世界，你好',
  'العالم',
  'है हाल क्या 👧 \u00e9',
  'the quick brown fox ' * 4,
  'the quick fox dogs',
  '...',
  'hello world',
  '',
  '',
  'two cats',
]


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  """A BERT of transformers with its tokenizer, and the same one here."""
  import transformers

  directory: pathlib.Path = tmp_path_factory.mktemp('bert')
  HuggingFaceTokenizer(families.contents('bert')).save(directory / 'tokenizer')
  tokenizer = tokenizers.load(directory / 'tokenizer')
  hf = dict(
    architectures=['BertModel'],
    model_type='bert',
    vocab_size=tokenizer.vocabulary,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    hidden_act='gelu',
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    tie_word_embeddings=True,
  )
  ours.build(hf, directory / 'model')
  _, model = checkpoint.load(directory / 'model', mesh=ours.MESH)
  theirs = transformers.BertModel.from_pretrained(directory / 'model').eval()
  fast = transformers.PreTrainedTokenizerFast.from_pretrained(directory / 'tokenizer')
  fast.model_max_length = 64  # without one, bert-score fails
  # It asks for the marks around an empty text by a name that transformers 5 no longer has.
  fast.build_inputs_with_special_tokens = lambda ids: fast('').input_ids
  return Generator(model, tokenizer, ours.MESH), theirs, fast


def table(directory, rows) -> str:
  path = directory / 'table.tsv'
  path.write_text('LAYER,P,R,F\n' + ''.join(f'{i},{row}\n' for i, row in enumerate(rows)))
  return str(path)


@pytest.mark.parametrize('layer', [2, 3])
@pytest.mark.parametrize('idf', [False, True])
def test_scores_are_those_of_bert_score(both, layer, idf, tmp_path):
  import torch

  model, theirs, fast = both
  weights = utils.get_idf_dict(TRUE, fast, nthreads=0)
  if not idf:  # as bert_score.score has it
    weights = utils.defaultdict(lambda: 1.0, {fast.sep_token_id: 0, fast.cls_token_id: 0})
  whole = theirs.encoder.layer
  theirs.encoder.layer = whole[:layer]
  try:
    expected = utils.bert_cos_score_idf(theirs, TRUE, SAID, fast, weights, device='cpu')
  finally:
    theirs.encoder.layer = whole
  made = BertScore(model, BertSettings(layer, idf))(SAID, [[text] for text in TRUE])
  np.testing.assert_allclose(made, expected.numpy(), atol=2e-5)
  assert made[:, 2].min() < 0.9 and made[3] == pytest.approx([1, 1, 1], abs=1e-5)

  # As bert_score.score rescales.
  baseline = torch.tensor([0.3, 0.2, 0.25])
  file = table(tmp_path, ['0,0,0', '0,0,0', *['0.3,0.2,0.25'] * 2])
  made = BertScore(model, BertSettings(layer, idf, file))(SAID, [[text] for text in TRUE])
  expected = (expected - baseline) / (1 - baseline)
  np.testing.assert_allclose(made, expected.numpy(), atol=3e-5)


def test_matching_is_greedy_cos_idf(both):
  """Of the states that are ours, their own function gives the same."""
  import jax
  import torch

  from evaluation import bertscore

  model, _, _ = both
  scorer = BertScore(model, BertSettings(2, idf=True))
  ids = [[scorer._ids(text.strip()) for text in side] for side in (SAID, TRUE)]
  weights = scorer._weights(ids[1])
  arguments, states = [], []
  for side in ids:
    tokens, lengths = model.padded(side)
    with jax.set_mesh(model.mesh):
      put = map(model.put, (tokens, lengths))
      x = np.array(bertscore._states(scorer._model, *put, seq2seq=False))
    # Pads must not be 0 / 0 there.
    real = np.arange(tokens.shape[1])[None] < lengths[:, None]
    x[~real] = 2.0
    weighed = np.array([[weights[i] for i in row] for row in tokens.tolist()]) * real
    arguments += [torch.tensor(x), torch.tensor(real), torch.tensor(weighed, dtype=torch.float32)]
    states.append(x)
  expected = torch.stack(utils.greedy_cos_idf(*arguments[3:], *arguments[:3]), 1)
  made = scorer(SAID, [[text] for text in TRUE])
  np.testing.assert_allclose(made, expected.numpy(), atol=2e-5)


def test_of_several_references_each_number_is_the_best(both):
  model, _, _ = both
  scorer = BertScore(model, BertSettings(2))
  one, other = (scorer(SAID, [[text] for text in texts]) for texts in (TRUE, TRUE[::-1]))
  made = scorer(SAID, [[*pair] for pair in zip(TRUE, TRUE[::-1])])
  np.testing.assert_allclose(made, np.maximum(one, other), atol=1e-6)
