"""Are numbers of answers those of the libraries that define them, whatever the texts, and those of
the definitions? And do sums over documents say all that there is to say?
"""

import math
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evaluation import text_metrics
from evaluation.text_metrics import METRICS, Metric, made, pass_at
from evaluation.words import split_words, split_words_and_signs

# Words of several scripts, marks that tokenizers and markup stumble over, and what is no word.
PIECES = [
  *('the', 'The', 'cat', 'cats', 'sat', 'running', 'runs', 'a', '1,000.50', 'U.S.', "don't", '"'),
  *(
    'straße',
    'größer',
    'élève',
    'Привет',
    'мир',
    'नमस्ते',
    '你好',
    '世界。',
    'こんにちは',
    '안녕',
    'שלום',
  ),
  *('<script>', '&amp;', '&quot;', '<skipped>', '|', '%', '\n', '\t', ' ', '\u200b', '\ufeff'),
  *('\x00', '🙂', 'e\u0301', '...', '-\n', '\\', '$1', '{}', 'İ'),
]
TEXT = st.one_of(
  st.lists(st.sampled_from(PIECES), max_size=12).map(' '.join),
  st.lists(st.sampled_from(PIECES[:6]), max_size=8).map(' '.join),
  st.text(max_size=20),
)
REFERENCES = st.lists(TEXT, min_size=1, max_size=3)
DOCUMENTS = st.lists(st.tuples(TEXT, REFERENCES), min_size=1, max_size=5)
ONCE = {name: made(name) for name in METRICS}


def value(metric: Metric, documents) -> float:
  return metric.value(sum(metric.statistics(said, [*true], {}) for said, true in documents))


def whole(documents):
  """Those whose references sacrebleu takes, as its streams: None where a document has fewer."""
  kept = [(said, true) for said, true in documents if any(true)]
  kept = [(said, [text for text in true if text]) for said, true in kept]
  most = max((len(true) for _, true in kept), default=0)
  streams = [[true[i] if i < len(true) else None for _, true in kept] for i in range(most)]
  return kept, [said for said, _ in kept], streams


SACREBLEU = {
  **{f'bleu_{name}': ('BLEU', {'tokenize': name}) for name in ('intl', 'zh', 'char', 'none')},
  'bleu': ('BLEU', {}),
  'chrf': ('CHRF', {}),
  'chrf++': ('CHRF', {'word_order': 2}),
  'ter': ('TER', {}),
}


@settings(max_examples=40)
@given(DOCUMENTS)
def test_corpus_scores_are_those_of_sacrebleu(documents):
  from sacrebleu import metrics

  kept, answers, streams = whole(documents)
  if not kept:
    return
  for name, (kind, arguments) in SACREBLEU.items():
    theirs = getattr(metrics, kind)(**arguments)
    expected = theirs.corpus_score(answers, streams).score
    ours = made(name)
    assert value(ours, kept) == pytest.approx(expected, abs=1e-9), name
    assert ours.signature == str(theirs.get_signature()), name


@settings(max_examples=40)
@given(DOCUMENTS)
def test_rouge_and_meteor_are_those_of_their_libraries(documents):
  from nltk.tokenize import word_tokenize
  from nltk.translate.meteor_score import meteor_score
  from rouge_score.rouge_scorer import RougeScorer

  class Without:
    def synsets(self, word):
      return []

  for stemmed in (False, True):
    theirs = RougeScorer([*text_metrics.ROUGE], use_stemmer=stemmed)
    scores = [theirs.score_multi(true, said) for said, true in documents]
    for kind in text_metrics.ROUGE:
      expected = np.mean([score[kind].fmeasure for score in scores])
      ours = ONCE[kind + '_stemmed' * stemmed]
      assert value(ours, documents) == pytest.approx(expected, abs=1e-12)

  def words(text):
    return word_tokenize(text, preserve_line=True)

  scores = [
    meteor_score([*map(words, true)], words(said), wordnet=Without()) for said, true in documents
  ]
  assert value(text_metrics.Meteor(), documents) == pytest.approx(np.mean(scores), abs=1e-12)


@settings(max_examples=40)
@given(DOCUMENTS)
def test_of_any_texts_numbers_are_finite_and_of_the_right_range(documents):
  kept, _, _ = whole(documents)
  row = {'samples': 3, 'passed': 2}
  for name, metric in ONCE.items():
    if name == 'number_match' or name.startswith('pass@') or not kept:
      continue
    number = value(metric, kept)
    top = {'bleu': 100, 'chrf': 100, 'ter': math.inf, 'length': math.inf}
    assert -1e-9 <= number <= top.get(name.partition('_')[0].rstrip('+'), 1) + 1e-9, name
    rows = [metric.statistics(said, true, row) for said, true in kept]
    assert {array.shape for array in rows} == {rows[0].shape} and rows[0].dtype == np.float64


@given(TEXT)
def test_who_says_what_is_true_is_right(text):
  for name in ('exact_match', 'token_f1'):
    assert value(ONCE[name], [(text, ['something else', text])]) == 1


def test_rouge_is_that_of_its_definition():
  """By hand: of 'the cats sat down' and 'the cat sat on the mat' in common: the, sat; stemmed: cat,
  too, in the same order.
  """
  document = [('the cats sat down', ['the cat sat on the mat'])]
  for name, expected in {
    'rouge1': 2 * 2 / (4 + 6),
    'rouge1_stemmed': 2 * 3 / (4 + 6),
    'rouge2': 0.0,
    'rouge2_stemmed': 2 * 2 / (3 + 5),
    'rougeL_stemmed': 2 * 3 / (4 + 6),
  }.items():
    assert value(ONCE[name], document) == pytest.approx(expected), name
  # A line is a sentence of Lsum, whose order is no matter; it is one of L.
  document = [('b b\na a', ['a a\nb b'])]
  assert value(ONCE['rougeLsum'], document) == 1 and value(ONCE['rougeL'], document) == 0.5


def test_words_of_other_scripts_are_words_where_that_is_asked():
  document = [('Привет, мир', ['привет мир']), ('größe', ['größer'])]
  assert value(ONCE['rouge1'], document[:1]) == 0, 'rouge-score knows a to z'
  assert value(ONCE['rouge1_unicode'], document[:1]) == 1
  assert value(ONCE['rouge1'], document[1:]) > 0, "it sees 'gr' in both"
  assert value(ONCE['rouge1_unicode'], document[1:]) == 0


def test_words_that_differ_in_their_marks_are_others():
  """Vowel signs of Hindi, and an accent by itself, are in words; those of an emoji are not."""
  assert value(ONCE['rouge1_unicode'], [('का', ['की'])]) == 0
  assert value(ONCE['rouge1_unicode'], [('हिन्दी की', ['हिन्दी का'])]) == 0.5
  hindi, accent = 'हिन्दी की किताब', 'cafe\u0301 a\u0300'
  assert split_words(f'{hindi}; {accent}') == [*hindi.split(), *accent.split()]
  assert split_words_and_signs('हिन्दी, यह!') == ['हिन्दी', ',', 'यह', '!']
  plain = 'It is 3_4 o’clock: Привет, größe 語言 ❤\ufe0f 2²!'
  assert split_words(plain) == re.findall(r'\w+', plain)
  assert split_words_and_signs(plain) == re.findall(r'\w+|[^\w\s]', plain)


def test_meteor_is_that_of_its_definition():
  """By hand: m matches in c chunks, P = m / said, R = m / true, 10PR / (R + 9P) times
  1 - (c / m)^3 / 2.
  """

  def score(m, said, true, chunks):
    precision, recall = m / said, m / true
    mean = 10 * precision * recall / (recall + 9 * precision)
    return mean * (1 - 0.5 * (chunks / m) ** 3)

  meteor = ONCE['meteor']
  assert value(meteor, [('the cat sat', ['the cat sat'])]) == pytest.approx(score(3, 3, 3, 1))
  assert value(meteor, [('sat the cat', ['the cat sat'])]) == pytest.approx(score(3, 3, 3, 2))
  assert value(meteor, [('he runs', ['he is running'])]) == pytest.approx(score(2, 2, 3, 2))
  assert value(meteor, [('', ['a'])]) == 0 and value(meteor, [('a', [''])]) == 0


# One noun with two words, as WordNet lays it out: a line is named by where it begins.
LEMMAS = 'car n 1 0 1 1 00000000\nauto n 1 0 1 1 00000000\n'
SYNSET = '00000000 06 n 02 car 0 auto 0 000 | a vehicle\n'


@pytest.fixture
def wordnet(tmp_path):
  for name in ('noun', 'verb', 'adj', 'adv'):
    (tmp_path / f'index.{name}').write_text(LEMMAS if name == 'noun' else '')
    (tmp_path / f'data.{name}').write_text(SYNSET if name == 'noun' else '')
    (tmp_path / f'{name}.exc').write_text('')
  (tmp_path / 'cntlist.rev').write_text('')
  return str(tmp_path)


def test_synonyms_are_looked_for_where_there_is_a_wordnet(wordnet, monkeypatch):
  document = [('a car', ['an auto'])]
  assert ONCE['meteor'].name == 'METEOR (exact, stem; no synonyms)'
  assert value(ONCE['meteor'], document) == 0
  monkeypatch.setenv('WNSEARCHDIR', wordnet)
  with_synonyms = made('meteor')
  assert with_synonyms.name == 'METEOR (exact, stem, synonyms)'
  # P = R = 1 / 2, in one chunk.
  assert value(with_synonyms, document) == pytest.approx(0.5 * (1 - 0.5))
  monkeypatch.setenv('WNSEARCHDIR', wordnet + '/nowhere')
  with pytest.raises(ValueError, match='nowhere has no WordNet .*WNSEARCHDIR'):
    made('meteor')


def test_squads_measures_are_those_of_their_definition():
  exact, f1 = ONCE['exact_match'], ONCE['token_f1']
  documents = [
    ('The Norman   dynasty!', ['norman dynasty']),
    ('an answer', ['answers', 'Answer.']),
    ('in the year 1066', ['1066']),
    ('', ['something']),
    ('the', ['a']),
  ]
  assert [value(exact, [each]) for each in documents] == [1, 1, 0, 0, 1]
  assert [value(f1, [each]) for each in documents] == [1, 1, 0.5, 0, 1]
  assert value(exact, documents) == 0.6 and value(f1, documents) == pytest.approx(0.7)


def test_numbers_are_compared_as_numbers():
  match = ONCE['number_match']
  assert value(match, [('so 1,000 + 8 = $1,008.00.', ['... #### 1008'])]) == 1
  assert value(match, [('18 eggs, 2 are left', ['#### 18'])]) == 0
  assert value(match, [('', ['#### 0'])]) == 0
  with pytest.raises(ValueError, match="number match: the reference 'none' names no number"):
    value(match, [('1', ['none'])])


def test_repetition_and_variety_are_those_of_their_definitions():
  assert value(ONCE['distinct_1'], [('a b a b', []), ('a', [])]) == 3 / 5
  assert value(ONCE['distinct_2'], [('a b a b', []), ('a', [])]) == 2 / 3
  loop = 'a b ' * 10
  assert value(ONCE['repetition'], [(loop, []), ('one two', [])]) == pytest.approx(15 / 17)
  assert value(ONCE['repetition'], [('one two', [])]) == 0 == value(ONCE['distinct_3'], [('', [])])
  assert value(ONCE['length'], [('one  two\nthree', []), ('', [])]) == 1.5
  assert value(ONCE['length_characters'], [('größe', [])]) == 5


@pytest.mark.parametrize('n, c', [(1, 0), (1, 1), (5, 0), (5, 2), (6, 6), (10, 3)])
def test_pass_at_k_is_the_share_of_draws_with_one_that_passed(n, c):
  for k in range(1, n + 1):
    expected = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert pass_at(k, n, c) == pytest.approx(expected, abs=1e-12)
  rows = [{'samples': n, 'passed': c}, {'samples': n, 'passed': 0}]
  total = sum(ONCE['pass@1'].statistics('', [], row) for row in rows)
  assert ONCE['pass@1'].value(total) == pytest.approx(c / n / 2)


def test_pass_at_k_of_too_few_samples_is_an_error():
  with pytest.raises(ValueError, match=r'pass@10 of 5 samples, .* k must be in \[1, 5\]'):
    pass_at(10, 5, 2)
  with pytest.raises(ValueError, match=r'what passed in \[0, 5\]'):
    pass_at(1, 5, 6)
  with pytest.raises(ValueError, match="pass@1: a record has no 'passed'; it has samples"):
    ONCE['pass@1'].statistics('', [], {'samples': 3})


def test_the_number_of_references_is_in_the_signature():
  metric = made('bleu')
  metric.statistics('a', ['a', 'b'], {})
  assert metric.signature.startswith('nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:')
  metric.statistics('a', ['a'], {})
  assert metric.signature.startswith('nrefs:var|')
  assert made('rouge1').signature == ''


def test_names_say_what_changes_the_number():
  assert len({metric.name for metric in ONCE.values()}) == len(ONCE)
  assert ONCE['rougeL_stemmed'].name == 'rougeL (stemmed)'
  assert {name for name, metric in ONCE.items() if metric.lower_is_better} == {'ter', 'repetition'}


def test_what_cannot_be_measured_is_an_error():
  for name in ('bleu', 'rouge1', 'meteor', 'exact_match', 'token_f1', 'number_match'):
    with pytest.raises(ValueError, match='a document has no references'):
      ONCE[name].statistics('a', [], {})
  with pytest.raises(ValueError, match='a document has empty references only'):
    ONCE['chrf'].statistics('a', ['', ''], {})
  with pytest.raises(ValueError, match="metric='blue' is unknown; did you mean 'bleu'"):
    made('blue')
  with pytest.raises(ValueError, match='rules are those of English'):
    text_metrics.Rouge('rouge1', stemmed=True, words='unicode')


def test_a_library_that_is_not_there_is_named_with_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'sacrebleu.metrics', None)
  with pytest.raises(ImportError, match=r'pip install sacrebleu \(the extra tandem\[evaluate\]\)'):
    made('bleu')
